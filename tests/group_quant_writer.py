"""Writes a Hugging Face checkpoint's linears by round-to-nearest in the layout of AutoGPTQ or AutoAWQ.

    python tests/group_quant_writer.py MODEL_DIR OUTPUT_DIR gptq 4 128

For tests, and for measuring what the engine's own formats add to such a checkpoint.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from llm_boost.checkpoint import open_checkpoint
from llm_boost.checkpoint.group_quants import AWQ_ORDER


def words(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Neighbours of the last axis in one int32; position i of a word holds value order[i]."""
    per_word = 32 // bits
    parts = values.astype(np.uint32).reshape(*values.shape[:-1], -1, per_word)
    order = order or tuple(range(per_word))
    packed = np.zeros(parts.shape[:-1], np.uint32)
    for position, index in enumerate(order):
        packed |= parts[..., index] << np.uint32(bits * position)
    return packed.view(np.int32)


def quantized(weight: np.ndarray, method: str, bits: int, group_size: int) -> dict[str, np.ndarray]:
    """The parts of a linear of weight [outputs, inputs]."""
    outputs, inputs = weight.shape
    size, top = group_size if group_size > 0 else inputs, (1 << bits) - 1
    groups = weight.reshape(outputs, -1, size)
    low, high = groups.min(-1).clip(max=0), groups.max(-1).clip(min=0)
    scales = ((high - low) / top).clip(1e-6).astype(np.float16)
    wide = scales.astype(np.float32)
    zeros = np.rint(-low / wide).clip(1, top)
    values = np.rint(groups / wide[..., None] + zeros[..., None]).clip(0, top).reshape(outputs, inputs)
    if method == "awq":
        packed = {"qweight": words(values.T, 4, AWQ_ORDER), "qzeros": words(zeros.T, 4, AWQ_ORDER)}
    else:
        packed = {
            "qweight": words(values, bits).T,
            "qzeros": words((zeros - 1).T, bits),
            "g_idx": (np.arange(inputs) // size).astype(np.int32),
        }
    return {name: np.ascontiguousarray(part) for name, part in {**packed, "scales": scales.T}.items()}


def write(model: Path, output: Path, method: str, bits: int, group_size: int) -> None:
    checkpoint = open_checkpoint(model)
    tensors = {}
    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        stem = name.removesuffix(".weight")
        if stem.endswith("_proj") and stem != name:
            parts = quantized(tensor.astype(np.float32), method, bits, group_size)
            tensors |= {f"{stem}.{part}": array for part, array in parts.items()}
        else:
            tensors[name] = np.array(tensor)
    output.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja", ".model") and "index" not in file.name:
            shutil.copy(file, output)
    own = {"version": "gemm", "zero_point": True} if method == "awq" else {"desc_act": False, "sym": False}
    settings = {"quant_method": method, "bits": bits, "group_size": group_size, **own}
    config = {**checkpoint.config, "quantization_config": settings}
    (output / "config.json").write_text(json.dumps(config))
    save_file(tensors, output / "model.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
