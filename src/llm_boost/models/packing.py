"""From a checkpoint's tensors to packed entries, one tensor at a time (csrc/layout.h has the bytes)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llm_boost import _native
from llm_boost.checkpoint.checkpoint import Checkpoint
from llm_boost.checkpoint.packed import PackedEntry, PlannedEntry
from llm_boost.errors import CheckpointError
from llm_boost.models.weights import Matrix, Table, Vector, WeightSpec

LAYOUT_VERSION = f"2-{_native.GROUP}"  # a new one whenever the bytes of the same weights change
BLOCK_ROWS = 16


def plan_entries(checkpoint: Checkpoint, specs: Iterable[WeightSpec], dtype: str) -> list[PlannedEntry]:
    """Names, sizes and meta of the entries that `pack_entries` will make."""
    return [_planned(checkpoint, spec, dtype) for spec in specs]


def pack_entries(
    checkpoint: Checkpoint, specs: Iterable[WeightSpec], dtype: str, threads: int
) -> Iterator[PackedEntry]:
    """Packs one weight after the other.

    Raises:
        CheckpointError: a tensor holds a value that is not a number, or infinite.
    """
    for spec in specs:
        planned = _planned(checkpoint, spec, dtype)
        yield PackedEntry(
            planned.name, _pack(checkpoint, spec, planned.meta["format"], threads), planned.meta
        )
        checkpoint.forget()  # or the whole checkpoint would be in memory by the end


def _planned(checkpoint: Checkpoint, spec: WeightSpec, dtype: str) -> PlannedEntry:
    if isinstance(spec, Table):
        rows, cols = checkpoint.tensors[spec.part].shape
        fmt = _table_format(dtype)
        nbytes = rows * cols * (4 if fmt == "float32" else 2)
    elif isinstance(spec, Vector):
        rows, cols, fmt = 1, sum(_padded_rows(checkpoint, part, spec) for part in spec.parts), "float32"
        nbytes = cols * 4
    else:
        rows = sum(_padded_rows(checkpoint, part, spec) for part in spec.parts)
        cols = checkpoint.tensors[spec.parts[0]].shape[1]
        fmt = matrix_format(spec, dtype)
        nbytes = _native.packed_bytes(fmt, rows, cols)
    return PlannedEntry(spec.name, nbytes, {"format": fmt, "rows": rows, "cols": cols})


def _table_format(dtype: str) -> str:
    return "float32" if dtype == "float32" else "bfloat16"


def matrix_format(spec: Matrix, dtype: str) -> str:
    return spec.int4_as if dtype == "int4" else dtype


def _padded_rows(checkpoint: Checkpoint, part: str, spec: Matrix | Vector) -> int:
    """Interleaved parts are cut into whole blocks."""
    rows = checkpoint.tensors[part].shape[0]
    return -(-rows // BLOCK_ROWS) * BLOCK_ROWS if spec.interleave else rows


def _pack(checkpoint: Checkpoint, spec: WeightSpec, fmt: str, threads: int) -> NDArray[np.uint8]:
    if isinstance(spec, Table):
        dtype = np.float32 if fmt == "float32" else ml_dtypes.bfloat16
        table = checkpoint.read(spec.part).astype(dtype, copy=False)
        return np.ascontiguousarray(table).view(np.uint8).reshape(-1)
    if isinstance(spec, Vector):
        return read_vector(checkpoint, spec).view(np.uint8)
    parts = [np.ascontiguousarray(checkpoint.read(part)) for part in spec.parts]
    try:
        packed: NDArray[np.uint8] = _native.pack_matrix(
            [_native_view(p) for p in parts], fmt, spec.interleave, threads
        )
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {' + '.join(spec.parts)}: {error}") from None
    return packed


def read_vector(checkpoint: Checkpoint, spec: Vector) -> NDArray[np.float32]:
    """The parts one after the other, or block by block in turn, as the rows of their matrix are."""
    parts = [checkpoint.read(part).astype(np.float32) for part in spec.parts]
    for name, part in zip(spec.parts, parts, strict=True):
        if not np.isfinite(part).all():
            raise CheckpointError(f"{checkpoint.path}: {name}: holds values that are not finite numbers")
    if not spec.interleave:
        return np.concatenate(parts)
    blocks = [np.pad(part, (0, -len(part) % BLOCK_ROWS)).reshape(-1, BLOCK_ROWS) for part in parts]
    return np.stack(blocks, axis=1).reshape(-1)


def _native_view(array: NDArray[Any]) -> NDArray[Any]:
    """bfloat16 crosses to C++ as its bits."""
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
