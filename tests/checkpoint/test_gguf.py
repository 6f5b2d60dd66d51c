"""The GGUF reader: equal to gguf-py on every type, Hugging Face's view of it, one line on bad files."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_samples import GGUF, assert_refused_or_read, one_line, tiny_llama_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_boost.checkpoint.checkpoint import open_checkpoint
from llm_boost.checkpoint.gguf_quants import BLOCK_TYPES, CHUNK_ELEMENTS, dequantize
from llm_boost.checkpoint.gguf_reader import GGUFFile
from llm_boost.errors import CheckpointError
from llm_boost.models.config import ModelConfig, check_tensors

GOLDENS = Path(__file__).parents[1] / "goldens"  # make_checkpoint_goldens.py
VALUES = np.arange(8, dtype=np.float32)


def test_every_tensor_type_is_equal_to_the_reference():
    file = GGUFFile(GOLDENS / "gguf_types.gguf")
    expected = np.load(GOLDENS / "gguf_types.npz")
    assert set(file.tensors) == set(expected.files) == {*BLOCK_TYPES, "F32", "F16", "BF16"}
    for name in expected.files:
        rows = expected[name].shape[0]
        np.testing.assert_array_equal(file.read_rows(name, 0, rows).astype(np.float32), expected[name])
        np.testing.assert_array_equal(file.read_rows(name, 1, 2).astype(np.float32), expected[name][1:2])
    assert file.read_rows("BF16", 0, 1).dtype == ml_dtypes.bfloat16
    assert file.read_rows("F16", 0, 1).dtype == np.float16


def test_every_metadata_type_is_read():
    metadata = GGUFFile(GOLDENS / "gguf_types.gguf").metadata
    scalars = {
        key: metadata[f"test.{key}"] for key in ("UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32")
    }
    assert list(scalars.values()) == [200, -100, 60000, -30000, 4000000000, -2000000000]
    assert (metadata["test.UINT64"], metadata["test.INT64"]) == (1 << 63, -(1 << 62))
    assert (metadata["test.FLOAT32"], metadata["test.FLOAT64"]) == (0.5, 0.1)
    assert metadata["test.BOOL"] is True
    assert metadata["test.STRING"] == "上海 ☂"
    assert metadata["test.strings"] == ["a", "", "中文", "\n"]
    assert metadata["test.ints"].tolist() == [1, -2, 3]
    assert metadata["test.floats"].tolist() == [0.5, -1.5]
    assert metadata["test.bools"].tolist() == [True, False, True]


def test_dequantising_in_chunks_changes_nothing():
    kind = BLOCK_TYPES["Q8_0"]
    blocks = np.tile(np.arange(34, dtype=np.uint8), CHUNK_ELEMENTS // 32 + 5)
    values = dequantize(blocks, kind).reshape(-1, 32)
    assert len(values) == CHUNK_ELEMENTS // 32 + 5
    assert (values == values[0]).all()


def test_an_infinite_scale_makes_nan_without_a_warning(recwarn):
    block = np.zeros(18, dtype=np.uint8)
    block[:2] = np.array([np.inf], dtype=np.float16).view(np.uint8)
    block[2:] = 0x88  # zeros
    assert np.isnan(dequantize(block, BLOCK_TYPES["Q4_0"])).all()
    assert len(recwarn) == 0


def test_a_sliding_window_caps_the_length(tmp_path):
    file, _ = tiny_llama_gguf()
    file.set("llama.attention.sliding_window", 64)
    assert open_checkpoint(file.write(tmp_path / "m.gguf")).config["max_position_embeddings"] == 64


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_a_model_is_seen_as_hugging_face_has_it(tmp_path, arch):
    file, expected = tiny_llama_gguf(arch)
    checkpoint = open_checkpoint(file.write(tmp_path / "m.gguf"))
    assert open_checkpoint(tmp_path).tensors == checkpoint.tensors  # a directory that holds one GGUF
    config = ModelConfig.from_hf(checkpoint.config, "m.gguf", checkpoint.tensors)
    check_tensors(config, checkpoint)
    assert checkpoint.format == "gguf"
    assert config.architecture == {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[arch] + "ForCausalLM"
    assert (config.vocab_size, config.head_dim, config.num_kv_heads, config.max_model_len) == (10, 8, 2, 128)
    assert (config.bos_token_id, config.eos_token_ids, config.rope.theta) == (1, (2,), 50000.0)
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.tie_word_embeddings
    assert config.qkv_bias == (arch == "qwen2")
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.norm.weight": "output_norm.weight",
    }.items():
        np.testing.assert_array_equal(checkpoint.read(ours), expected[theirs])
        for start, stop in ((0, 1), (3, 9), (5, 5), (7, 10)):  # within a head and across heads
            np.testing.assert_array_equal(
                checkpoint.read_rows(ours, start, stop), expected[theirs][start:stop]
            )
    with pytest.raises(ValueError, match="rows 0 to 11"):
        checkpoint.read_rows("model.embed_tokens.weight", 0, 11)
    with pytest.raises(CheckpointError, match="has no tensor 'x'"):
        checkpoint.read("x")
    checkpoint.close()
    with pytest.raises(CheckpointError, match="after it was closed"):
        checkpoint.read("model.norm.weight")


def test_biases_and_head_come_from_the_tensors(tmp_path):
    file, _ = tiny_llama_gguf(tied=False)
    for part, rows in (("q", 32), ("k", 16), ("v", 16)):
        file.tensor(f"blk.0.attn_{part}.bias", np.arange(rows, dtype=np.float32))
    checkpoint = open_checkpoint(file.write(tmp_path / "m.gguf"))
    config = ModelConfig.from_hf(checkpoint.config, "m.gguf", checkpoint.tensors)
    check_tensors(config, checkpoint)
    assert (config.qkv_bias, config.o_bias, config.tie_word_embeddings) == (True, False, False)
    bias = checkpoint.read("model.layers.0.self_attn.q_proj.bias")
    assert bias.tolist()[:8] == [0, 2, 4, 6, 1, 3, 5, 7]  # llama.cpp pairs neighbours in biases too


def test_rope_scaling(tmp_path):
    def rope(**settings):
        file, _ = tiny_llama_gguf()
        for key, value in settings.items():
            file.set(f"llama.rope.{key.replace('__', '.')}", value)
        checkpoint = open_checkpoint(file.write(tmp_path / "m.gguf"))
        return ModelConfig.from_hf(checkpoint.config, "m.gguf", checkpoint.tensors).rope

    assert rope().rope_type == "default"
    assert rope(scaling__type="none").rope_type == "default"
    assert (rope(scale_linear=4.0).rope_type, rope(scale_linear=4.0).factor) == ("linear", 4.0)
    assert rope(scaling__type="linear", scaling__factor=2.0).factor == 2.0
    yarn = rope(scaling__type="yarn", scaling__factor=4.0, scaling__original_context_length=32)
    assert (yarn.rope_type, yarn.factor, yarn.original_max_position_embeddings) == ("yarn", 4.0, 32)
    with pytest.raises(
        CheckpointError, match=r"llama.rope.scaling.type is 'longrope'; it must be one of none"
    ):
        rope(scaling__type="longrope")
    with pytest.raises(CheckpointError, match=r"llama.rope.dimension_count is 4; it must be 8"):
        rope(dimension_count=4)


def test_llama3_frequencies(tmp_path):
    file, _ = tiny_llama_gguf()
    file.tensor("rope_freqs.weight", np.array([1, 1, 2.5, 8], dtype=np.float32))
    checkpoint = open_checkpoint(file.write(tmp_path / "m.gguf"))
    config = ModelConfig.from_hf(checkpoint.config, "m.gguf", checkpoint.tensors)
    assert config.rope.freq_factors == (1, 1, 2.5, 8)
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_all_ends_of_text_and_sampling_values(tmp_path):
    file, _ = tiny_llama_gguf()
    file.set("tokenizer.ggml.eot_token_id", 7).set("tokenizer.ggml.eom_token_id", 2)
    file.set("tokenizer.ggml.padding_token_id", 0xFFFFFFFF)
    file.set("general.sampling.temp", 0.5).set("general.sampling.top_k", 20)
    generation = open_checkpoint(file.write(tmp_path / "m.gguf")).generation_config
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 7], "temperature": 0.5, "top_k": 20}


def test_the_fingerprint_follows_the_file(tmp_path):
    path = tiny_llama_gguf()[0].write(tmp_path / "m.gguf")
    os.utime(path, ns=(10**18, 10**18))
    first = open_checkpoint(path).fingerprint()
    assert open_checkpoint(path).fingerprint() == first
    os.utime(path, ns=(10**18, 10**18 + 1))
    assert open_checkpoint(path).fingerprint() != first


def refused(tmp_path: Path, content: bytes | GGUF, name: str = "bad.gguf") -> str:
    path = tmp_path / name
    path.write_bytes(content.bytes() if isinstance(content, GGUF) else content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return one_line(caught.value, path)


def array(item: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", item, count) + data


HUGE = (1 << 64) - 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"GGUF", "not a GGUF file"),
        (b"PK\3\4" + bytes(100), "not a GGUF file"),
        (GGUF(version=1), "version 1 is not supported; supported: little-endian GGUF, versions 2 and 3"),
        (GGUF(version=3 << 24), "a big-endian file is not supported"),
        (GGUF(version=9), "version 9 is not supported"),
        (GGUF(tensor_count=HUGE), "tensor count: 18446744073709551615 is more than the"),
        (GGUF(metadata_count=HUGE), "metadata count: 18446744073709551615 is more than the"),
        (GGUF(metadata_count=1).raw("k", 8, struct.pack("<Q", HUGE)), "metadata 'k' at byte"),
        (GGUF().raw("k", 8, struct.pack("<Q", 1 << 40)), "takes 1099511627776 bytes, the file ends after"),
        (GGUF().raw(b"\xff", 4, bytes(4)), "a metadata key at byte 32 is not UTF-8"),
        (GGUF().raw("k" * 70000, 4, bytes(4)), "is longer than 65535 bytes"),
        (GGUF().set("k", "\0").raw("j", 8, GGUF.string(b"\xc3")), "metadata 'j' at byte"),
        (GGUF().raw("k", 13, bytes(8)), "metadata 'k' has the type 13; GGUF has 0 to 12"),
        (GGUF().set("k", 1).set("k", 2), "the metadata key 'k' stands there twice"),
        (GGUF().raw("k", 9, array(4, HUGE)), "metadata 'k': 18446744073709551615 is more than the"),
        (GGUF().raw("k", 9, array(8, 1 << 60)), "metadata 'k': 1152921504606846976 is more than the"),
        (GGUF().raw("k", 9, array(9, 1 << 60)), "metadata 'k': 1152921504606846976 is more than the"),
        (GGUF().raw("k", 9, array(10, 1 << 61)), "metadata 'k': 2305843009213693952 is more than the"),
        (GGUF().raw("k", 9, array(77, 1, bytes(99))), "metadata 'k' has the type 77"),
        (GGUF().raw("k", 9, array(8, 1, struct.pack("<Q", 1 << 50))), "a string of 1125899906842624 bytes"),
        (GGUF().raw("k", 9, array(8, 1, GGUF.string(b"\xff"))), "the string at byte"),
        (GGUF().raw("k", 9, array(9, 1) * 6 + bytes(99)), "arrays nested deeper than 4"),
        (GGUF().set("general.alignment", 0), "general.alignment is 0; it must be a power of two"),
        (GGUF().set("general.alignment", 48), "general.alignment is 48; it must be a power of two"),
        (GGUF().set("general.alignment", "32"), "general.alignment is '32'"),
        (GGUF().tensor("t", VALUES).tensor("t", VALUES), "tensor 't' stands there twice"),
        (GGUF().tensor(b"\xff", VALUES), "a tensor's name at byte 32 is not UTF-8"),
        (GGUF().tensor("t", VALUES, shape=()), "tensor 't' has 0 dimensions; GGUF allows 1 to 4"),
        (GGUF().tensor("t", VALUES, shape=(1, 1, 1, 1, 8)), "tensor 't' has 5 dimensions"),
        (GGUF().tensor("t", VALUES, shape=(HUGE,)), "every dimension must be from 1 to 2^48"),
        (GGUF().tensor("t", VALUES, shape=(0,)), "every dimension must be from 1 to 2^48"),
        (GGUF().tensor("t", VALUES, shape=(1 << 32, 1 << 32)), "tensor 't' ends at byte"),
        (GGUF().tensor("t", VALUES, shape=(1 << 48,) * 4), "tensor 't' ends at byte"),
        (GGUF().tensor("t", VALUES, kind=99), "tensor 't' has the type 99; supported: BF16, F16, F32, Q4_0"),
        (GGUF().tensor("t", VALUES, kind=11), "tensor 't' has the type Q3_K; supported"),
        (GGUF().tensor("t", VALUES, kind=2), "tensor 't': rows of 8 elements; Q4_0 has blocks of 32"),
        (GGUF().tensor("t", VALUES, offset=4), "tensor 't' has the offset 4; it must be a multiple of 32"),
        (GGUF().tensor("t", VALUES, offset=1 << 63), "tensor 't' ends at byte"),
        (GGUF().tensor("t", VALUES, offset=32), "ends at byte 128, the file at 96; it is cut off"),
        (GGUF().tensor("t", VALUES).tensor("u", VALUES, offset=0), "tensors 't' and 'u' overlap"),
        (
            GGUF().tensor("t", VALUES),
            "general.architecture is missing; it must be one of llama, qwen2, qwen3",
        ),
        (
            GGUF().set("general.architecture", "gpt2"),
            "general.architecture is 'gpt2'; it must be one of llama",
        ),
        (GGUF().set("general.architecture", "llama"), "llama.attention.head_count is missing"),
        (
            GGUF().set("split.count", 3),
            "one part of a split GGUF; merge the parts with llama.cpp's gguf-split",
        ),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, content, message):
    assert message in refused(tmp_path, content)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.attention.head_count", 0, "llama.attention.head_count is 0; it must be an integer from 1"),
        ("llama.attention.head_count", "4", "llama.attention.head_count is '4'"),
        (
            "llama.expert_count",
            8,
            "llama.expert_count is 8; it must be 0: mixtures of experts are not supported",
        ),
        ("llama.attention.value_length", 16, "llama.attention.value_length is 16; it must be 8"),
        ("llama.attention.head_count", 8, "has 16 rows, 2 heads of 4 make 8"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon is nan"),
        ("tokenizer.ggml.bos_token_id", "x", "tokenizer.ggml.bos_token_id is 'x'"),
    ],
)
def test_bad_metadata_is_named(tmp_path, key, value, message):
    file, _ = tiny_llama_gguf()
    file.metadata = [entry for entry in file.metadata if not entry.startswith(GGUF.string(key))]
    assert message in refused(tmp_path, file.set(key, value))


def test_tensors_that_contradict_the_metadata(tmp_path):
    file, _ = tiny_llama_gguf()
    file.tensors = [entry for entry in file.tensors if not entry.startswith(GGUF.string("token_embd.weight"))]
    assert "tensor token_embd.weight is missing" in refused(tmp_path, file)
    file, _ = tiny_llama_gguf()
    assert "it must be F32 [4]" in refused(tmp_path, file.tensor("rope_freqs.weight", VALUES))
    file, _ = tiny_llama_gguf()
    twins = file.tensor("model.norm.weight", VALUES)
    assert "two tensors mean the same part of the model" in refused(tmp_path, twins)


def test_a_part_of_a_split_model_is_refused_by_its_name(tmp_path):
    file, _ = tiny_llama_gguf()
    assert "one part of a split GGUF" in refused(tmp_path, file, "m-00001-of-00002.gguf")


GOOD = (
    tiny_llama_gguf()[0]
    .raw("nested", 9, array(9, 2, array(5, 1, bytes(4)) + array(8, 1, GGUF.string("x"))))
    .bytes()
)
HEADER = GOOD.index(b"rope.freq_base") + 600
EDITS = st.lists(
    st.tuples(
        st.integers(0, HEADER),
        st.binary(min_size=1, max_size=8)
        | st.sampled_from([b"\xff" * 8, b"\xff" * 4, bytes(8), (1 << 62).to_bytes(8, "little")]),
    ),
    max_size=4,
)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    ModelConfig.from_hf(checkpoint.config, str(path), checkpoint.tensors)


def test_the_file_that_is_mutated_is_good(tmp_path):
    path = tmp_path / "good.gguf"
    path.write_bytes(GOOD)
    read_all(path)
    nested = open_checkpoint(path).metadata["nested"]
    assert [nested[0].tolist(), nested[1]] == [[0], ["x"]]


@FUZZ
@given(EDITS, st.one_of(st.just(len(GOOD)), st.integers(0, len(GOOD))))
def test_fuzz_mutated(tmp_path, edits, keep):
    content = bytearray(GOOD)
    for at, patch in edits:
        content[at : at + len(patch)] = patch
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(content[:keep])
    assert_refused_or_read(lambda: read_all(path), len(GOOD))


@FUZZ
@given(st.binary(max_size=300), st.integers(0, 20), st.integers(0, 20))
def test_fuzz_random(tmp_path, content, tensors, entries):
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + content)
    assert_refused_or_read(lambda: read_all(path), len(content))


def test_no_rows_of_a_rotated_tensor_are_no_rows(tmp_path):
    checkpoint = open_checkpoint(tiny_llama_gguf()[0].write(tmp_path / "m.gguf"))
    assert checkpoint.read_rows("model.layers.0.self_attn.q_proj.weight", 3, 3).shape == (0, 32)
