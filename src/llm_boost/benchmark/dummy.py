"""Made weights: any config.json runs at full speed without its files, which is all that a benchmark asks."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llm_boost import _native
from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.packed import PackedModel, PlannedEntry
from llm_boost.engine.hardware import available_memory
from llm_boost.errors import ConfigError
from llm_boost.models import decoder
from llm_boost.models.config import ModelConfig, expected_tensors
from llm_boost.models.packing import BLOCK_ROWS, plan_entries

Bytes = NDArray[np.uint8]

# The root mean square of a value times its scale code times the transform, for random bytes (csrc/layout.h).
QUANTISED_RMS = 73 * 73 * 8


def dummy_model(config: ModelConfig, dtype: str, cache_bytes: int) -> PackedModel:
    """The model of `config` with packed entries of made values, in anonymous memory.

    Raises:
        ConfigError: it and a cache of `cache_bytes` do not fit into the memory that is free.
    """
    planned = _planned(config, dtype)
    needed, free = sum(entry.nbytes for entry in planned) + cache_bytes, available_memory()
    if needed > free:
        raise ConfigError(
            f"load_format: dummy weights in {dtype} and their cache take {needed / 1e9:.1f} GB, "
            f"allowed {free / 1e9:.1f} GB, the memory that is free; choose a smaller dtype, depth or batch"
        )
    return PackedModel(Path("dummy"), {entry.name: (_made(entry), entry.meta) for entry in planned}, True)


def planned_bytes(config: ModelConfig, dtype: str) -> int:
    """Of the packed weights of `config`."""
    return sum(entry.nbytes for entry in _planned(config, dtype))


def _planned(config: ModelConfig, dtype: str) -> list[PlannedEntry]:
    tensors = {name: TensorInfo(name, shape, dtype) for name, shape in expected_tensors(config).items()}
    shapes: Any = SimpleNamespace(tensors=tensors)  # as much of a checkpoint as planning looks at
    return list(plan_entries(shapes, decoder.weights(config), dtype))


def made_matrix(fmt: str, rows: int, cols: int) -> Bytes:
    """Packed bytes of a matrix whose product with a vector is about as large as the vector.

    One random block of rows is repeated: the kernels' speed does not depend on the values.
    """
    data = _memory(_native.packed_bytes(fmt, rows, cols))
    data.reshape(-1, _native.packed_bytes(fmt, BLOCK_ROWS, cols))[:] = _block(fmt, cols)
    return data


def _made(entry: PlannedEntry) -> Bytes:
    fmt, rows, cols = entry.meta["format"], entry.meta["rows"], entry.meta["cols"]
    if entry.name == "embed":
        table = _memory(entry.nbytes)
        table.reshape(rows, -1)[:] = _floats(fmt, cols, 1.0)
        return table
    if entry.name.endswith(".bias"):
        return _memory(entry.nbytes)
    if entry.name.endswith("norm"):
        return np.ones(cols, np.float32).view(np.uint8)
    return made_matrix(fmt, rows, cols)


def _block(fmt: str, cols: int) -> Bytes:
    nbytes = _native.packed_bytes(fmt, BLOCK_ROWS, cols)
    if fmt in ("float32", "bfloat16"):
        return _floats(fmt, nbytes // (4 if fmt == "float32" else 2), cols**-0.5)
    block = np.random.default_rng(0).integers(1, 256, nbytes, np.uint8)
    block[: 4 * BLOCK_ROWS].view(np.float32)[:] = cols**-0.5 / QUANTISED_RMS
    return block


def _floats(fmt: str, count: int, scale: float) -> Bytes:
    values = scale * np.random.default_rng(0).standard_normal(count)
    return values.astype(np.float32 if fmt == "float32" else ml_dtypes.bfloat16).view(np.uint8)


def _memory(nbytes: int) -> Bytes:
    """Zeros, aligned to a page as the packed cache's entries are to a cache line."""
    return np.frombuffer(
        mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE), np.uint8
    )
