"""The safetensors reader and writer: equal to the reference library on good files, one line on bad ones."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_samples import assert_refused_or_read, one_line, safetensors_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from llm_boost.checkpoint.safetensors_reader import SafetensorsFile
from llm_boost.checkpoint.safetensors_writer import TensorSpec, write_safetensors
from llm_boost.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def opened(path: Path, content: bytes) -> SafetensorsFile:
    path.write_bytes(content)
    return SafetensorsFile(path)


def test_reads_what_the_reference_wrote(tmp_path):
    tensors = {
        "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f16": np.arange(3, dtype=np.float16),
        "bf16": np.arange(8).astype(ml_dtypes.bfloat16).reshape(4, 2),
        "i64": np.arange(2, dtype=np.int64),
        "u8": np.arange(3, dtype=np.uint8),
        "none": np.zeros((0, 4), dtype=np.float32),
        "scalar": np.array(2.5, dtype=np.float32),
    }
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "t.safetensors")
    assert file.metadata == {"format": "pt"}
    assert set(file.infos()) == set(tensors)
    for name, tensor in tensors.items():
        assert file.infos()[name].dtype == tensor.dtype.name
        np.testing.assert_array_equal(file.read(name), tensor)
    np.testing.assert_array_equal(file.read_rows("bf16", 1, 3), tensors["bf16"][1:3])
    assert file.read("f32").flags.aligned


def test_reads_without_a_copy_and_after_close_refuses(tmp_path):
    file = opened(tmp_path / "t", safetensors_bytes(json.dumps({"a": F32}).ljust(88).encode(), bytes(8)))
    tensor = file.read("a")
    assert not tensor.flags.owndata
    assert not tensor.flags.writeable
    file.close()
    assert tensor.tolist() == [0, 0]
    with pytest.raises(CheckpointError, match="after it was closed"):
        file.read("a")


def entry(**changes: object) -> dict:
    return {"a": {**F32, **changes}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\x01\x02", "2 bytes, too short"),
        (
            (1 << 62).to_bytes(8, "little") + bytes(100),
            "header length 4611686018427387904, at most 100000000",
        ),
        ((101).to_bytes(8, "little") + bytes(100), "header length 101 in a file of 108 bytes; it is cut off"),
        (safetensors_bytes(b"{not json"), "header: not valid JSON"),
        (safetensors_bytes(b"\xff\xfe{}"), "header: not valid JSON"),
        (safetensors_bytes(b"[" * 50000), "header: not valid JSON"),
        (safetensors_bytes(b'{"a":' + b"9" * 5000 + b"}"), "header: not valid JSON"),
        (safetensors_bytes([]), "header: must be a JSON object"),
        (safetensors_bytes(b'{"a":{},"a":{}}'), "header: the key 'a' stands there twice"),
        (safetensors_bytes(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "the key 'dtype' stands there twice"),
        (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__ is {'a': 1}; it must map strings"),
        (safetensors_bytes({"a": 3}), "tensor 'a' is 3; it must hold dtype, shape and data_offsets"),
        (safetensors_bytes({"a": {"dtype": "F32"}}), "it must hold dtype, shape and data_offsets"),
        (
            safetensors_bytes(entry(dtype="F13"), bytes(8)),
            "tensor 'a': dtype 'F13' is not known; known: BOOL",
        ),
        (safetensors_bytes(entry(dtype=["F32"]), bytes(8)), "dtype ['F32'] is not known"),
        (safetensors_bytes(entry(shape=[-1, -2]), bytes(8)), "shape [-1, -2]; it must be at most 8 integers"),
        (safetensors_bytes(entry(shape=[1 << 60]), bytes(8)), "shape [1152921504606846976]"),
        (safetensors_bytes(entry(shape=[2.0]), bytes(8)), "shape [2.0]"),
        (safetensors_bytes(entry(shape=[True, 2]), bytes(8)), "shape [True, 2]"),
        (safetensors_bytes(entry(shape=[1] * 9), bytes(8)), "at most 8 integers"),
        (safetensors_bytes(entry(shape=[1 << 40] * 8), bytes(8)), "8 bytes of data, but shape"),
        (safetensors_bytes(entry(shape=[3]), bytes(8)), "8 bytes of data, but shape [3] of F32 takes 12"),
        (safetensors_bytes(entry(data_offsets=[8, 0]), bytes(8)), "data_offsets [8, 0] descend"),
        (safetensors_bytes(entry(data_offsets=[0]), bytes(8)), "data_offsets [0]; it must be two integers"),
        (safetensors_bytes(entry(data_offsets=[-8, 0]), bytes(8)), "data_offsets [-8, 0]; it must be two"),
        (
            safetensors_bytes(entry(), bytes(7)),
            "ends at byte 8 of the data, which has 7; the file is cut off",
        ),
        (safetensors_bytes(entry(), bytes(9)), "the last 1 bytes belong to no tensor"),
        (safetensors_bytes({"a": F32, "b": F32}, bytes(8)), "tensors 'a' and 'b' overlap at byte 0"),
        (
            safetensors_bytes({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
            "tensors 'a' and 'b' overlap at byte 4",
        ),
        (safetensors_bytes(entry(data_offsets=[4, 12]), bytes(12)), "bytes 0 to 4 before 'a' belong to no"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    with pytest.raises(CheckpointError) as caught:
        opened(path, content)
    assert message in one_line(caught.value, path)


GOOD = safetensors_bytes(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    },
    bytes(range(32)),
)


def mutated(good: bytes, edits: list[tuple[int, bytes]], keep: int) -> bytes:
    content = bytearray(good)
    for at, patch in edits:
        content[at % len(good) : at % len(good) + len(patch)] = patch
    return bytes(content[: keep % (len(good) + 1)] if keep else content)


EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=8)), max_size=4)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read_all(path: Path) -> None:
    file = SafetensorsFile(path)
    for name in file.infos():
        file.read(name)


@FUZZ
@given(EDITS, st.integers(0, 1 << 16))
def test_fuzz_mutated(tmp_path, edits, keep):
    path = tmp_path / "fuzz"
    path.write_bytes(mutated(GOOD, edits, keep))
    assert_refused_or_read(lambda: read_all(path), len(GOOD))


@FUZZ
@given(st.binary(max_size=200), st.booleans())
def test_fuzz_random(tmp_path, content, framed):
    path = tmp_path / "fuzz"
    path.write_bytes(safetensors_bytes(content) if framed else content)
    assert_refused_or_read(lambda: read_all(path), len(content))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(
    st.dictionaries(
        st.text(max_size=3) | st.just("__metadata__"),
        JSON_VALUES
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8"]) | JSON_VALUES,
                "shape": JSON_VALUES,
                "data_offsets": JSON_VALUES,
            }
        ),
        max_size=3,
    )
)
def test_fuzz_json(tmp_path, table):
    path = tmp_path / "fuzz"
    path.write_bytes(safetensors_bytes(table, bytes(16)))
    assert_refused_or_read(lambda: read_all(path), path.stat().st_size)


def test_the_writer_aligns_and_the_reference_reads_it(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {
        "a": np.arange(7, dtype=np.uint8),
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "c": np.arange(64, dtype=np.uint8),
        "d": np.arange(3).astype(ml_dtypes.bfloat16),
    }
    codes = ["U8", "F32", "U8", "BF16"]
    specs = [TensorSpec(n, c, t.shape) for (n, t), c in zip(tensors.items(), codes, strict=True)]
    steps: list[tuple[int, int]] = []
    write_safetensors(path, specs, iter(tensors.items()), {"k": "v"}, lambda *step: steps.append(step))
    reference = load_file(path)
    file = SafetensorsFile(path)
    assert list(file.infos()) == list(tensors)
    assert file.metadata == {"k": "v"}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(reference[name], tensor)
        np.testing.assert_array_equal(file.read(name), tensor)
        assert file.raw(name).ctypes.data % 64 == 0
    assert steps == sorted(steps)
    assert steps[-1] == (path.stat().st_size, path.stat().st_size)


@pytest.mark.parametrize("count", [1, 3])
def test_the_writer_refuses_other_tensors_than_announced(tmp_path, count):
    specs = [TensorSpec("a", "U8", (4,)), TensorSpec("b", "U8", (4,))]
    tensors = iter([(name, np.zeros(4, dtype=np.uint8)) for name in "abc"[:count]])
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(tmp_path / "t", specs, tensors)
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(tmp_path / "t", specs, iter([("a", np.zeros(5, dtype=np.uint8))]))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(
        CheckpointError, match=r"no space for t \(No space left on device\): it takes 0.0 MB, .* MB are"
    ):
        write_safetensors(
            tmp_path / "t", [TensorSpec("a", "U8", (4,))], iter([("a", np.zeros(4, dtype=np.uint8))])
        )
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    huge = TensorSpec("a", "U8", (1 << 47,))
    with pytest.raises(
        CheckpointError, match=r"no space for t .* it takes 140737488.4 MB, .* MB are available"
    ):
        write_safetensors(tmp_path / "t", [huge], iter([]))
    assert list(tmp_path.iterdir()) == []


def test_a_file_size_limit_leaves_nothing_behind(tmp_path):
    """The real thing: the kernel refuses the write half-way."""
    script = f"""
import resource, numpy as np
from pathlib import Path
from llm_boost.checkpoint.safetensors_writer import TensorSpec, write_safetensors
from llm_boost.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    data = np.zeros(4 << 20, dtype=np.uint8)
    write_safetensors(Path({str(tmp_path)!r}) / "t", [TensorSpec("a", "U8", data.shape)], iter([("a", data)]))
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "no space for t (File too large): it takes 4.2 MB" in done.stdout
    assert list(tmp_path.iterdir()) == []
