"""Tiny checkpoints, and a guard that no reader takes memory that a damaged file talks it into."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from llm_boost.errors import CheckpointError


def safetensors_bytes(table: Any, data: bytes = b"") -> bytes:
    """A safetensors file whose header is `table`: JSON text, or what becomes it."""
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(header).to_bytes(8, "little") + header + data


def tiny_tensors(prefix: str = "") -> dict[str, np.ndarray]:
    return {
        f"{prefix}a": np.arange(12, dtype=np.float32).reshape(3, 4),
        f"{prefix}b": np.arange(5, dtype=np.float16),
    }


def one_line(error: CheckpointError, path: Path) -> str:
    """The message, which must be one line that begins with the file's name."""
    text = str(error)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text) - len(str(path)) < 400
    return text


def assert_refused_or_read(open_and_read: Callable[[], object], size: int) -> None:
    """Whatever the file holds: a CheckpointError or a result, and memory in proportion to the file."""
    tracemalloc.start()
    try:
        open_and_read()
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are right, a third is not
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1_000_000 + 100 * size


def write_huggingface(
    folder: Path, shards: dict[str, dict[str, np.ndarray]] | None = None, index: object = None
) -> Path:
    """A Hugging Face directory with these weight files (default: one) and maybe an index."""
    from safetensors.numpy import save_file

    for name, tensors in (shards or {"model.safetensors": tiny_tensors()}).items():
        save_file(tensors, folder / name)
    if index is not None:
        text = index if isinstance(index, str) else json.dumps({"weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


class GGUF:
    """A GGUF file put together field by field, so that any of them can be wrong."""

    TYPES: ClassVar = {int: (4, "<I"), float: (6, "<f"), bool: (7, "<?")}

    def __init__(
        self, version: int = 3, tensor_count: int | None = None, metadata_count: int | None = None
    ) -> None:
        self.version, self.tensor_count, self.metadata_count = version, tensor_count, metadata_count
        self.metadata: list[bytes] = []
        self.tensors: list[bytes] = []
        self.data = b""

    @staticmethod
    def string(text: str | bytes) -> bytes:
        raw = text.encode() if isinstance(text, str) else text
        return struct.pack("<Q", len(raw)) + raw

    def raw(self, key: str | bytes, kind: int, value: bytes) -> GGUF:
        self.metadata.append(self.string(key) + struct.pack("<I", kind) + value)
        return self

    def set(self, key: str, value: object) -> GGUF:
        if isinstance(value, str):
            return self.raw(key, 8, self.string(value))
        kind, code = self.TYPES[type(value)]
        return self.raw(key, kind, struct.pack(code, value))

    def tensor(
        self,
        name: str | bytes,
        array: np.ndarray,
        kind: int = 0,
        shape: Any = None,
        offset: int | None = None,
    ) -> GGUF:
        """`shape` is slowest first; by default the array's own, placed after the last one."""
        self.data += bytes(-len(self.data) % 32)
        shape = array.shape if shape is None else shape
        where = len(self.data) if offset is None else offset
        dims = b"".join(struct.pack("<Q", dim) for dim in reversed(shape))
        self.tensors.append(
            self.string(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, where)
        )
        self.data += array.tobytes()
        return self

    def bytes(self, alignment: int = 32) -> bytes:
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        metadata_count = len(self.metadata) if self.metadata_count is None else self.metadata_count
        head = b"GGUF" + struct.pack("<IQQ", self.version, tensor_count, metadata_count)
        head += b"".join(self.metadata) + b"".join(self.tensors)
        return head + bytes(-len(head) % alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.bytes())
        return path


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's q or k rows as llama.cpp stores those of Llama."""
    rows = weight.shape[0]
    return (
        weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def tiny_llama_gguf(arch: str = "llama", tied: bool = True) -> tuple[GGUF, dict[str, np.ndarray]]:
    """A one-layer model of 4 query and 2 key heads of 8, and its tensors under Hugging Face's names."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (10, 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (48, 32),
        "blk.0.ffn_up.weight": (48, 32),
        "blk.0.ffn_down.weight": (32, 48),
    }
    if arch == "qwen2":
        shapes |= {f"blk.0.attn_{part}.bias": (rows,) for part, rows in (("q", 32), ("k", 16), ("v", 16))}
    if arch == "qwen3":
        shapes |= {"blk.0.attn_q_norm.weight": (8,), "blk.0.attn_k_norm.weight": (8,)}
    if not tied:
        shapes["output.weight"] = (10, 32)
    file = GGUF().set("general.architecture", arch)
    for key, value in {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50000.0,
    }.items():
        file.set(f"{arch}.{key}", value)
    file.set("tokenizer.ggml.bos_token_id", 1).set("tokenizer.ggml.eos_token_id", 2)
    expected = {}
    for name, shape in shapes.items():
        weight = rng.standard_normal(shape).astype(np.float32)
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2], 0) if arch == "llama" else 0
        file.tensor(name, interleaved(weight, heads) if heads else weight)
        expected[name] = weight
    return file, expected
