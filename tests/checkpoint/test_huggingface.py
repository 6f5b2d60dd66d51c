"""Hugging Face directories: which files are read, and what is said when one of them is wrong."""

from __future__ import annotations

import os
import sys

import ml_dtypes
import numpy as np
import pytest
from checkpoint_samples import one_line, tiny_tensors, write_huggingface
from safetensors.numpy import save_file

from llm_boost.checkpoint.checkpoint import open_checkpoint
from llm_boost.errors import CheckpointError

SHARD = "model-0000{}-of-00002.safetensors"


def two_shards(folder, index=None):
    shards = {SHARD.format(1): tiny_tensors("x."), SHARD.format(2): tiny_tensors("y.")}
    full = {f"{prefix}.{name}": SHARD.format(i) for i, prefix in ((1, "x"), (2, "y")) for name in "ab"}
    return write_huggingface(folder, shards, full if index is None else index)


def refused(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return one_line(caught.value, path)


def test_one_file(tmp_path):
    write_huggingface(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    checkpoint = open_checkpoint(str(tmp_path))
    assert (checkpoint.format, checkpoint.path, checkpoint.metadata) == ("huggingface", tmp_path, {})
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert checkpoint.tensors["a"].shape == (3, 4)
    assert checkpoint.tensors["b"].dtype == "float16"
    np.testing.assert_array_equal(checkpoint.read("a"), tiny_tensors()["a"])
    np.testing.assert_array_equal(checkpoint.read_rows("a", 1, 3), tiny_tensors()["a"][1:3])
    assert checkpoint.read_rows("a", 2, 2).shape == (0, 4)
    with pytest.raises(ValueError, match="rows 2 to 4 of a, which has 3"):
        checkpoint.read_rows("a", 2, 4)
    with pytest.raises(CheckpointError, match="has no tensor 'c'"):
        checkpoint.read("c")
    checkpoint.close()


def test_shards_with_and_without_an_index(tmp_path):
    checkpoint = open_checkpoint(two_shards(tmp_path))
    assert set(checkpoint.tensors) == {"x.a", "x.b", "y.a", "y.b"}
    np.testing.assert_array_equal(checkpoint.read("y.b"), tiny_tensors()["b"])
    (tmp_path / "model.safetensors.index.json").unlink()
    assert set(open_checkpoint(tmp_path).tensors) == {"x.a", "x.b", "y.a", "y.b"}


def test_doubles_become_floats_and_integers_are_refused(tmp_path):
    write_huggingface(tmp_path, {"model.safetensors": {"d": np.ones(3), "i": np.ones(3, dtype=np.int32)}})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("d").dtype == np.float32
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: tensor i is int32; weights must be float32"
    ):
        checkpoint.read("i")


def test_the_fingerprint_follows_the_files(tmp_path):
    write_huggingface(tmp_path)
    weights = tmp_path / "model.safetensors"
    os.utime(weights, ns=(10**18, 10**18))
    first = open_checkpoint(tmp_path).fingerprint()
    assert open_checkpoint(tmp_path).fingerprint() == first
    os.utime(weights, ns=(10**18, 10**18 + 1))
    touched = open_checkpoint(tmp_path).fingerprint()
    save_file({"a": tiny_tensors()["a"].T.copy(), "b": tiny_tensors()["b"]}, weights)
    os.utime(weights, ns=(10**18, 10**18 + 1))
    reshaped = open_checkpoint(tmp_path).fingerprint()
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    configured = open_checkpoint(tmp_path).fingerprint()
    assert len({first, touched, reshaped, configured}) == 4


def test_nothing_there(tmp_path):
    assert "cannot open the model (No such file or directory)" in refused(tmp_path / "absent")
    assert "the directory is empty" in refused(tmp_path)
    (tmp_path / "readme.txt").write_text("hello")
    assert "no *.safetensors, pytorch_model*.bin, .ckpt or .gguf file there" in refused(tmp_path)
    assert "not a model; give a .gguf or .ckpt file, or the directory" in refused(tmp_path / "readme.txt")


def test_no_config(tmp_path):
    (write_huggingface(tmp_path) / "config.json").unlink()
    assert "config.json is missing" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "must be a JSON object"), ('{"a":1,"a":2}', "twice")],
)
def test_a_bad_config(tmp_path, text, message):
    write_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert message in refused(tmp_path)


def test_a_bad_generation_config(tmp_path):
    write_huggingface(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(b"\xff")
    assert "generation_config.json: not valid JSON" in refused(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\0b", 3, None, ["x"]]
)
def test_an_index_that_points_elsewhere(tmp_path, name):
    two_shards(tmp_path, {"x.a": name})
    message = refused(tmp_path)
    assert "model.safetensors.index.json" in message
    assert "points outside the model's folder; it must be a file name" in message


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map(tmp_path, index):
    two_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert "weight_map is" in refused(tmp_path)


def test_a_missing_shard(tmp_path):
    (two_shards(tmp_path) / SHARD.format(2)).unlink()
    assert "model-00002-of-00002.safetensors: this part of the model is missing" in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "model-00002-of-00002.safetensors: this part of the model is missing" in refused(tmp_path)


def test_an_index_that_names_a_tensor_its_shard_lacks(tmp_path):
    two_shards(tmp_path, {"x.a": SHARD.format(1), "y.a": SHARD.format(2), "z": SHARD.format(2)})
    assert "model-00002-of-00002.safetensors: has no tensor 'z', though the index says so" in refused(
        tmp_path
    )
    two_shards(tmp_path, {"x.a": SHARD.format(2), "y.a": SHARD.format(1)})
    assert "has no tensor 'x.a', though the index says so" in refused(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    shards = {SHARD.format(1): tiny_tensors(), SHARD.format(2): tiny_tensors()}
    write_huggingface(tmp_path, shards)
    assert "tensor 'a' is in both model-00001-of-00002.safetensors and" in refused(tmp_path)


def test_several_ggufs_are_named(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "b.gguf").write_bytes(b"")
    assert "holds 2 GGUF files; name the one to use: ['a.gguf', 'b.gguf']" in refused(tmp_path)


def test_bin_weights_need_torch(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pytorch_model.bin: reading .bin weights needs torch; install it, or use" in refused(tmp_path)


@pytest.mark.reference
def test_bin_weights(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "config.json").write_text("{}")
    half = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    torch.save(
        {"w": half, "f": torch.ones(3), "i": torch.ones(2, dtype=torch.int64)}, tmp_path / "pytorch_model.bin"
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors["w"].dtype == "bfloat16"
    assert checkpoint.read("w").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(checkpoint.read("w").astype(np.float32), half.float().numpy())
    np.testing.assert_array_equal(
        checkpoint.read_rows("w", 1, 2).astype(np.float32), half[1:].float().numpy()
    )
    with pytest.raises(CheckpointError, match="tensor i is int64"):
        checkpoint.read("i")


@pytest.mark.reference
def test_a_bin_file_that_would_run_code_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "config.json").write_text("{}")
    torch.save({"w": CreatesFile(str(tmp_path / "owned"))}, tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin: torch refuses the file" in refused(tmp_path)
    assert not (tmp_path / "owned").exists()
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    assert "must hold a dict of tensors, holds list" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"nonsense")
    assert "torch refuses the file" in refused(tmp_path)


class CreatesFile:
    """What an attacker would pickle."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")
