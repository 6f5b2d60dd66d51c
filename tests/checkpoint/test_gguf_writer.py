"""GGUF files as they are written: blocks as the reference makes them, and what the reader reads back."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llm_boost.checkpoint.gguf_quantize import quantize
from llm_boost.checkpoint.gguf_quants import BLOCK_TYPES, dequantize
from llm_boost.checkpoint.gguf_reader import GGUFFile
from llm_boost.checkpoint.gguf_writer import GGUFSpec, write_gguf

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_blocks_are_the_references(kind):
    with np.load(GOLDENS / "gguf_blocks.npz") as arrays:
        rows, expected = arrays["rows"], arrays[kind]
    np.testing.assert_array_equal(quantize(rows, kind), expected)


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the gguf package")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_blocks_are_the_references_live(kind):
    import gguf

    rows = np.random.default_rng().standard_normal((300, 256)).astype(np.float32)
    rows *= np.exp(np.random.default_rng().uniform(-40, 5, (300, 1))).astype(np.float32)
    wanted = gguf.quants.quantize(rows, getattr(gguf.GGMLQuantizationType, kind))
    np.testing.assert_array_equal(quantize(rows, kind), wanted)


@pytest.mark.parametrize(("kind", "steps"), [("Q8_0", 127), ("Q4_0", 8)])
def test_blocks_are_within_half_a_step(kind, steps):
    rows = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    back = dequantize(quantize(rows, kind).reshape(-1), BLOCK_TYPES[kind]).reshape(rows.shape)
    step = np.abs(rows.reshape(-1, 32)).max(1) / steps
    error = np.abs(back - rows).reshape(-1, 32).max(1)
    assert (error <= step * (1.01 if kind == "Q4_0" else 0.57)).all()  # Q4_0's last code on one side is cut


def test_everything_comes_back(tmp_path):
    metadata = {
        "text": "ü\n",
        "none": "",
        "texts": ["a", "", "€"],
        "int": 7,
        "negative": -3,
        "big": 1 << 40,
        "real": 0.5,
        "yes": True,
        "no": np.bool_(False),
        "int32s": np.array([-1, 2], np.int32),
        "floats": np.array([1.5, -2], np.float32),
    }
    rows = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    tensors = {
        "f32": ("F32", rows),
        "bf16": ("BF16", rows.astype(ml_dtypes.bfloat16)),
        "f16": ("F16", rows[:, :3].astype(np.float16)),
        "q8": ("Q8_0", quantize(rows, "Q8_0")),
        "vector": ("F32", rows[0]),
    }
    specs = [
        GGUFSpec(n, kind, rows.shape if n == "q8" else array.shape) for n, (kind, array) in tensors.items()
    ]
    pieces = ((name, iter([array[:2], array[2:]])) for name, (_, array) in tensors.items())
    write_gguf(tmp_path / "m.gguf", metadata, specs, pieces)
    file = GGUFFile(tmp_path / "m.gguf")
    assert list(file.metadata) == list(metadata)
    for key, value in metadata.items():
        np.testing.assert_array_equal(file.metadata[key], value)
    for spec in specs:
        assert (file.tensors[spec.name].type, file.tensors[spec.name].shape) == (spec.type, spec.shape)
        array = tensors[spec.name][1]
        assert file.raw_rows(spec.name, 0, spec.shape[0]).tobytes() == array.tobytes()
    assert (tmp_path / "m.gguf").stat().st_size % 32 == 0


def test_what_was_not_announced_leaves_nothing(tmp_path):
    spec = GGUFSpec("a", "F32", (2, 4))
    for tensors in ([], [("b", np.zeros((2, 4), np.float32))], [("a", np.zeros((1, 4), np.float32))]):
        with pytest.raises(ValueError, match="announced"):
            write_gguf(tmp_path / "m.gguf", {}, [spec], iter(tensors))
    assert list(tmp_path.iterdir()) == []
