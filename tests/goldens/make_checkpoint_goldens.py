"""Makes gguf_types.gguf, gguf_types.npz and rope.npz with the reference implementations.

usage: python tests/goldens/make_checkpoint_goldens.py (needs gguf, torch and transformers)
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quantize
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HERE = Path(__file__).parent
RNG = np.random.default_rng(0)

# Where a block holds float16 numbers; the other bytes may be anything.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}

ROPES = {
    "default": {"rope_theta": 500000.0},
    "linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "yarn": {
        "rope_theta": 1000000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    },
}
# (prompt length, positions asked for in one step); the original length is 512
STEPS = [
    (300, range(0, 300, 71)),
    (700, range(0, 700, 233)),
    (700, [700]),
    (700, [901]),
    (100, [511]),
    (100, [640]),
]


def random_blocks(kind: str, rows: int, row_elements: int) -> np.ndarray:
    size, nbytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = RNG.integers(0, 256, (rows * row_elements // size, nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = RNG.standard_normal(len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def make_gguf() -> None:
    writer = gguf.GGUFWriter(HERE / "gguf_types.gguf", "llama")
    for name, value in {
        "UINT8": 200,
        "INT8": -100,
        "UINT16": 60000,
        "INT16": -30000,
        "UINT32": 4000000000,
        "INT32": -2000000000,
    }.items():
        writer.add_key_value(f"test.{name}", value, GGUFValueType[name])
    for name, value in {
        "UINT64": 1 << 63,
        "INT64": -(1 << 62),
        "FLOAT32": 0.5,
        "FLOAT64": 0.1,
        "BOOL": True,
        "STRING": "上海 ☂",
    }.items():
        writer.add_key_value(f"test.{name}", value, GGUFValueType[name])
    writer.add_array("test.ints", [1, -2, 3])
    writer.add_array("test.floats", [0.5, -1.5])
    writer.add_array("test.bools", [True, False, True])
    writer.add_array("test.strings", ["a", "", "中文", "\n"])
    expected = {}
    for kind in HALVES:
        blocks = random_blocks(kind, 3, 512)
        qtype = GGMLQuantizationType[kind]
        writer.add_tensor(kind, blocks, raw_dtype=qtype)
        expected[kind] = dequantize(blocks, qtype)
    values = RNG.standard_normal((3, 16)).astype(np.float32)
    writer.add_tensor("F32", values)
    writer.add_tensor("F16", values.astype(np.float16))
    writer.add_tensor(
        "BF16", quantize(values, GGMLQuantizationType.BF16), raw_dtype=GGMLQuantizationType.BF16
    )
    expected["F32"] = values
    expected["F16"] = values.astype(np.float16).astype(np.float32)
    expected["BF16"] = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.savez_compressed(HERE / "gguf_types.npz", **expected)


def make_rope() -> None:
    steps = [(prompt_len, list(positions)) for prompt_len, positions in STEPS]
    arrays = {"settings": np.array(json.dumps(ROPES)), "steps": np.array(json.dumps(steps))}
    for name, settings in ROPES.items():
        for head_dim in (64, 128):
            config = LlamaConfig(
                hidden_size=4 * head_dim,
                num_attention_heads=4,
                max_position_embeddings=512,
                **{key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()},
            )
            rope = LlamaRotaryEmbedding(config)
            arrays[f"{name}.{head_dim}.inv_freq"] = rope.inv_freq.numpy().copy()
            for step, (prompt_len, positions) in enumerate(STEPS):
                rope = LlamaRotaryEmbedding(config)
                dummy = torch.zeros(1, 1, 1)
                rope(
                    dummy, torch.arange(prompt_len)[None]
                )  # the prefill, which sets the base of a dynamic one
                if len(positions) > 1:
                    cos, sin = (
                        rows[0, list(positions)] for rows in rope(dummy, torch.arange(prompt_len)[None])
                    )
                else:
                    cos, sin = (rows[0] for rows in rope(dummy, torch.tensor(positions)[None]))
                arrays[f"{name}.{head_dim}.{step}.cos"] = cos[:, : head_dim // 2].numpy()
                arrays[f"{name}.{head_dim}.{step}.sin"] = sin[:, : head_dim // 2].numpy()
    np.savez_compressed(HERE / "rope.npz", **arrays)


if __name__ == "__main__":
    make_gguf()
    make_rope()
