"""MindSpore's .ckpt: files that MindSpore wrote, slices, damage; MindSpore itself where it is installed."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_samples import assert_refused_or_read, one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_boost.checkpoint import mindspore_ckpt
from llm_boost.checkpoint.mindspore_ckpt import MindSporeFile, write_ckpt
from llm_boost.checkpoint.safetensors_reader import DTYPES, SafetensorsFile
from llm_boost.checkpoint.safetensors_writer import TensorSpec
from llm_boost.errors import CheckpointError
from llm_boost.protobuf import bytes_field, integer_field

GOLDENS = Path(__file__).parent.parent / "goldens" / "mindspore"
CODES = {dtype: code for code, dtype in DTYPES.items()}


def spec(name: str, array: np.ndarray) -> TensorSpec:
    return TensorSpec(name, CODES[array.dtype], array.shape)


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    write_ckpt(path, [spec(name, array) for name, array in tensors.items()], iter(tensors.items()))
    return path


def value(name: bytes, *tensor: bytes) -> bytes:
    return bytes_field(1, bytes_field(1, name) + b"".join(tensor))


def tensor(content: bytes, kind: bytes = b"Float32", dims: tuple[int, ...] = (2,)) -> bytes:
    return bytes_field(
        2, b"".join(integer_field(1, d) for d in dims) + bytes_field(2, kind) + bytes_field(3, content)
    )


@pytest.mark.parametrize("name", ["types.ckpt", "types.safetensors"])
def test_every_type_as_mindspore_wrote_it(name):
    file = (MindSporeFile if name.endswith("ckpt") else SafetensorsFile)(GOLDENS / name)
    with np.load(GOLDENS / "types.npz") as expected:
        assert {*file.infos(), "version"} == set(expected)
        for each, info in file.infos().items():
            array = file.read(each)
            assert (info.shape, info.dtype) == (expected[each].shape, array.dtype.name)
            np.testing.assert_array_equal(array.astype(np.float64), expected[each])
        assert file.infos()["model.BFloat16"].dtype == "bfloat16"
        assert file.infos()["scalar"].shape == ()


def test_ours_is_mindspores_to_the_byte(tmp_path):
    file = MindSporeFile(GOLDENS / "types.ckpt")
    ours = write(tmp_path / "ours.ckpt", {name: file.read(name) for name in file.infos()})
    assert ours.read_bytes() == (GOLDENS / "types.ckpt").read_bytes()


def test_a_checksum_and_a_string_beside_the_parameters(tmp_path):
    file = MindSporeFile(GOLDENS / "crc.ckpt")
    assert file.crc_holds() is True
    assert list(file.infos()) == ["model.Float32"]
    data = bytearray((GOLDENS / "crc.ckpt").read_bytes())
    data[60] ^= 1
    (tmp_path / "damaged.ckpt").write_bytes(data)
    assert MindSporeFile(tmp_path / "damaged.ckpt").crc_holds() is False
    training = MindSporeFile(GOLDENS / "text.ckpt")
    assert set(training.infos()) == {"model.Float32", "epoch_num"}
    assert training.crc_holds() is None


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.integers(8, 40),
    st.sampled_from(sorted(mindspore_ckpt.TENSOR_TYPES.values())),
)
def test_slices_join(tmp_path_factory, shape, slice_bytes, code):
    folder = tmp_path_factory.mktemp("slices")
    count = int(np.prod(shape))
    array = np.arange(count * DTYPES[code].itemsize, dtype=np.uint8).view(DTYPES[code]).reshape(shape)
    if code == "BOOL":
        array = array.view(np.uint8) % 2 == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mindspore_ckpt, "SLICE_BYTES", slice_bytes)
        after = np.ones(3, np.float32)
        rows = iter([("t", iter([array[: shape[0] // 2], array[shape[0] // 2 :]])), ("after", after)])
        write_ckpt(folder / "t.ckpt", [spec("t", array), spec("after", after)], rows)
    file = MindSporeFile(folder / "t.ckpt")
    assert file.read("t").tobytes() == array.tobytes()
    assert file.infos()["t"].shape == tuple(shape)
    for start in range(shape[0] + 1):
        assert file.read_rows("t", start, shape[0]).tobytes() == array[start:].tobytes()
    np.testing.assert_array_equal(file.read("after"), after)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04", "not a MindSpore checkpoint (it begins with byte 80); one that is encrypted"),
        (value(b"a", tensor(bytes(8)))[:-1], "it is cut off or damaged"),
        (value(b"a", tensor(bytes(4))), "'a': 4 bytes of data, but shape [2] of float32 takes 8"),
        (value(b"a", tensor(bytes(8), b"Float8")), "'a' is of type 'Float8'; known types are Float32"),
        (value(b"a", tensor(bytes(8), dims=(-1,))), "has the shape [-1]; dimensions are from 0 to 2^48"),
        (value(b"a", tensor(bytes(8), dims=(1,) * 9)), "more than 8 dimensions"),
        (value(b"a"), "parameter 'a' is empty"),
        (value(b"a", bytes_field(3, b"")), "parameter 'a' is a map parameter (MapTensor)"),
        (value(b"\xff", tensor(bytes(8))), "can't decode byte 0xff"),
        (
            value(b"a", tensor(bytes(8))) + value(b"b", tensor(bytes(8))) + value(b"a", tensor(bytes(8))),
            "twice",
        ),
        (value(b"a", tensor(bytes(4))) + value(b"a", tensor(bytes(4), dims=(3,))), "its slices differ"),
        (b"\x0a\x00", "a parameter without a name"),
        (bytes_field(1, tensor(bytes(8))), "a parameter without a name"),
        (value(b"a", tensor(bytes(8))) + bytes_field(2, b""), "field 2 where a parameter belongs"),
    ],
)
def test_damage_is_named(tmp_path, data, message):
    path = tmp_path / "m.ckpt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        MindSporeFile(path)
    assert message in one_line(caught.value, path)


def test_no_damage_gets_through_unseen_or_takes_memory(tmp_path):
    whole = (GOLDENS / "types.ckpt").read_bytes()
    path = tmp_path / "m.ckpt"

    def read_all() -> None:
        file = MindSporeFile(path)
        for name in file.infos():
            file.read(name)

    rng = np.random.default_rng(0)
    for at in [*range(1, len(whole), 53), *rng.integers(0, len(whole), 60)]:
        data = bytearray(whole)
        data[at] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(data))
        assert_refused_or_read(read_all, len(whole))
        path.write_bytes(whole[:at])
        assert_refused_or_read(read_all, len(whole))


def test_a_type_that_mindspore_lacks_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"tensor 'a' is F8_E4M3; a .ckpt has no such type"):
        write_ckpt(tmp_path / "m.ckpt", [TensorSpec("a", "F8_E4M3", (1,))], iter([]))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "m.ckpt.4194304.tmp").write_bytes(b"half")  # beyond the largest process id
    mine = tmp_path / "m.ckpt.1.tmp"
    mine.write_bytes(b"of a process that lives")
    write(tmp_path / "m.ckpt", {"a": np.ones(2, np.float32)})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.ckpt", mine.name]


@pytest.mark.mindspore
def test_mindspore_reads_ours(tmp_path):
    import mindspore

    rng = np.random.default_rng(0)
    tensors = {
        f"model.{code}": rng.integers(0, 2, (7, 5)).astype(DTYPES[code])
        for code in mindspore_ckpt.TENSOR_TYPES.values()
    }
    tensors["scalar"] = np.array(3.5, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mindspore_ckpt, "SLICE_BYTES", 24)
        path = write(tmp_path / "ours.ckpt", tensors)
    loaded = mindspore.load_checkpoint(str(path))
    assert list(loaded) == list(tensors)
    for name, array in tensors.items():
        assert loaded[name].shape == array.shape
        theirs = loaded[name].float() if array.dtype == ml_dtypes.bfloat16 else loaded[name]
        np.testing.assert_array_equal(theirs.asnumpy().astype(np.float64), array.astype(np.float64))


@pytest.mark.mindspore
def test_a_tensor_of_over_512_mib_crosses_both_ways(tmp_path):
    import mindspore

    array = np.arange(135 << 20, dtype=np.float32).reshape(27, -1)  # 540 MiB: two slices
    ours = write(tmp_path / "ours.ckpt", {"a": array, "b": array[:1]})
    loaded = mindspore.load_checkpoint(str(ours))
    assert np.array_equal(loaded["a"].asnumpy(), array)
    assert np.array_equal(loaded["b"].asnumpy(), array[:1])
    theirs = tmp_path / "theirs.ckpt"
    mindspore.save_checkpoint([{"name": name, "data": loaded[name]} for name in "ab"], str(theirs))
    assert np.array_equal(MindSporeFile(theirs).read("a"), array)
    assert np.array_equal(MindSporeFile(theirs).read("b"), array[:1])
