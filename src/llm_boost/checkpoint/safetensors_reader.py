"""Reads one safetensors file: checked first, then mapped into memory, not copied.

The format (https://huggingface.co/docs/safetensors): 8 bytes n, little endian; n bytes of JSON,
`{name: {dtype, shape, data_offsets: [begin, end]}}`, with an optional `__metadata__` of strings; the data,
where no byte is without its tensor.
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.fields import parse_json_object, shown
from llm_boost.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIM = 1 << 48
MAX_DIMS = 8
PADDING = "__padding__"  # names that the writer gives to the bytes between aligned tensors

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `begin` and `end` are bytes from the start of the data."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A validated, memory-mapped file. Raises CheckpointError, one line, for anything wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mapped = map_bytes(path)
        self.header = _read_header(mapped, path)
        self.data_start = 8 + len(self.header)
        table = parse_json_object(self.header, f"{path}: header")
        self.metadata = _metadata(table.pop("__metadata__", {}), path)
        self.entries = {name: _entry(name, fields, path) for name, fields in table.items()}
        _check_layout(self.entries, mapped.size - self.data_start, path)
        self._bytes: NDArray[np.uint8] | None = mapped
        self._infos = {
            name: TensorInfo(name, entry.shape, entry.dtype.name)
            for name, entry in self.entries.items()
            if not name.startswith(PADDING)
        }

    def infos(self) -> dict[str, TensorInfo]:
        """The tensors by name, without the writer's padding."""
        return self._infos

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, a read-only view of the map."""
        if self._bytes is None:
            raise CheckpointError(f"{self.path}: read after it was closed")
        entry = self.entries[name]
        return self._bytes[self.data_start + entry.begin : self.data_start + entry.end]

    def read(self, name: str) -> NDArray[Any]:
        """The tensor, a read-only view of the map (a copy where the file does not align its elements)."""
        entry = self.entries[name]
        return _typed(self.raw(name), entry.dtype).reshape(entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of the first dimension; no other row is touched."""
        entry = self.entries[name]
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        return _typed(self.raw(name)[start * row : stop * row], entry.dtype).reshape(
            stop - start, *entry.shape[1:]
        )

    def forget(self) -> None:
        """See Checkpoint.forget."""
        if self._bytes is not None:
            drop_pages(self._bytes)

    def close(self) -> None:
        """Lets go of the map; arrays already read stay valid."""
        self._bytes = None


def map_bytes(path: Path) -> NDArray[np.uint8]:
    """The whole file as a read-only memory map."""
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                raise CheckpointError(f"{path}: the file is empty; download it again")
            return np.memmap(file, dtype=np.uint8, mode="r")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def drop_pages(mapped: NDArray[np.uint8]) -> None:
    """Takes the pages of `map_bytes`' map out of this process's memory; who reads one again gets it again."""
    pages: Any = mapped.base
    pages.madvise(mmap.MADV_DONTNEED)


def _typed(data: NDArray[np.uint8], dtype: np.dtype[Any]) -> NDArray[Any]:
    view = data.view(np.ndarray).view(dtype)
    return view if view.flags.aligned else view.copy()


def _read_header(mapped: NDArray[np.uint8], path: Path) -> bytes:
    """The header's JSON bytes."""
    length = int.from_bytes(mapped[:8].tobytes(), "little")
    if mapped.size < 8:
        raise CheckpointError(f"{path}: {mapped.size} bytes, too short for safetensors; download it again")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: header length {length}, at most {MAX_HEADER_BYTES} is allowed; not a safetensors file"
        )
    if 8 + length > mapped.size:
        raise CheckpointError(
            f"{path}: header length {length} in a file of {mapped.size} bytes; it is cut off or damaged"
        )
    return mapped[8 : 8 + length].tobytes()


def _metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(
            f"{path}: header: __metadata__ is {shown(value)}; it must map strings to strings"
        )
    return value


def _entry(name: str, fields: object, path: Path) -> Entry:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is {shown(fields)}; it must hold dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {shown(dtype)} is not known; known: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(dim) for dim in shape):
        raise CheckpointError(
            f"{where}: shape {shown(shape)}; it must be at most {MAX_DIMS} integers from 0 to 2^48"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise CheckpointError(
            f"{where}: data_offsets {shown(offsets)}; it must be two integers from 0 to 2^48"
        )
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{where}: data_offsets {offsets} descend; the file is damaged")
    entry = Entry(DTYPES[dtype], tuple(shape), begin, end)
    needed = math.prod(shape) * entry.dtype.itemsize
    if needed != end - begin:
        raise CheckpointError(
            f"{where}: {end - begin} bytes of data, but shape {shape} of {dtype} takes {needed}; "
            "the file is damaged"
        )
    return entry


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_DIM


def _check_layout(entries: dict[str, Entry], data_size: int, path: Path) -> None:
    """The tensors must fill the data from first byte to last: no overlap, no hole, none beyond the file."""
    at, previous = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > data_size:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} ends at byte {entry.end} of the data, "
                f"which has {data_size}; the file is cut off, download it again"
            )
        if entry.begin < at:
            raise CheckpointError(
                f"{path}: tensors {shown(previous)} and {shown(name)} overlap at byte {entry.begin}"
            )
        if entry.begin > at:
            raise CheckpointError(
                f"{path}: bytes {at} to {entry.begin} before {shown(name)} belong to no tensor"
            )
        at, previous = entry.end, name
    if at != data_size:
        raise CheckpointError(
            f"{path}: the last {data_size - at} bytes belong to no tensor; the file is damaged"
        )
