"""The real checkpoints: tensors equal to the reference library's, and GGUF equal to its Hugging Face twin."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from llm_boost.checkpoint.checkpoint import open_checkpoint
from llm_boost.models.config import ModelConfig, check_tensors

MODELS = Path(os.environ.get("LLM_BOOST_MODELS", "~/.cache/llm-boost/models")).expanduser()
TWINS = {
    "smollm2-135m": "smollm2-135m-q4_1.gguf",
    "smollm2-135m-smooth": "smollm2-135m-smooth.gguf",
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b-q4_k_m.gguf",
}
MANY_ROWS = 10000  # of larger tensors, the embeddings, a part stands for all

pytestmark = pytest.mark.models


def real(name: str) -> Path:
    if not (MODELS / name).exists():
        pytest.skip(f"{MODELS / name} is not there")
    return MODELS / name


def sample(rows: int) -> slice:
    return slice(0, rows) if rows < MANY_ROWS else slice(rows // 2, rows // 2 + 1000)


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_tensors_are_those_of_the_reference(name):
    checkpoint = open_checkpoint(real(name))
    check_tensors(ModelConfig.from_hf(checkpoint.config, name, checkpoint.tensors), checkpoint)
    with safe_open(real(name) / "model.safetensors", framework="np") as reference:
        assert set(reference.keys()) == set(checkpoint.tensors)
        for tensor, info in checkpoint.tensors.items():
            rows = sample(info.shape[0])
            expected = reference.get_slice(tensor)[rows]
            ours = checkpoint.read(tensor)
            assert (ours.dtype, ours.shape) == (expected.dtype, info.shape)
            assert np.array_equal(ours[rows].view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize(("name", "gguf"), TWINS.items())
def test_gguf_is_its_hugging_face_twin(name, gguf):
    """The Hugging Face directories were written from the GGUF files with gguf-py, in bfloat16."""
    twin, checkpoint = open_checkpoint(real(name)), open_checkpoint(real(gguf))
    config = ModelConfig.from_hf(checkpoint.config, gguf, checkpoint.tensors)
    check_tensors(config, checkpoint)
    expected = ModelConfig.from_hf(twin.config, name, twin.tensors)
    differing = {field for field in vars(config) if getattr(config, field) != getattr(expected, field)}
    assert differing == {"torch_dtype"}
    assert set(checkpoint.tensors) == set(twin.tensors)
    for tensor, info in twin.tensors.items():
        rows = sample(info.shape[0])
        theirs = twin.read_rows(tensor, rows.start, rows.stop)
        ours = checkpoint.read_rows(tensor, rows.start, rows.stop).astype(theirs.dtype)
        assert np.array_equal(ours.view(np.uint16), theirs.view(np.uint16)), tensor
