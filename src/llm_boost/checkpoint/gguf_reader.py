"""Reads one GGUF file, version 2 or 3: header and tensor table are checked first, the data is mapped.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little endian: magic, version, two
counts; the metadata, `key, type, value` each; the tensor table, `name, dimensions (fastest first), type,
offset` each; the data, from the next multiple of `general.alignment`. A count is compared with the bytes left
before it is believed.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.fields import shown
from llm_boost.checkpoint.gguf_quants import BLOCK_TYPES, dequantize
from llm_boost.checkpoint.safetensors_reader import MAX_DIM, drop_pages, map_bytes
from llm_boost.errors import CheckpointError

VERSIONS = (2, 3)
MAX_KEY_BYTES = 65535  # the format's own limit
MAX_DIMS = 4
MAX_NESTING = 4
MAX_ALIGNMENT = 1 << 20
MIN_KEY_VALUE_BYTES = 8 + 4 + 1
MIN_TENSOR_BYTES = 8 + 4 + 4 + 8

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS: dict[int, struct.Struct] = {
    number: struct.Struct("<" + code)
    for number, code in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d",
    }.items()
}  # fmt: skip

FLOAT_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# ggml's numbers of the types read here
TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16",
}  # fmt: skip
# and of those that are not, for messages
OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: `shape` as numpy has it, slowest first; `begin` and `end` are bytes of the file."""

    type: str
    shape: tuple[int, ...]
    begin: int
    end: int


class GGUFFile:
    """A validated, memory-mapped file. Raises CheckpointError, one line, for anything wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: NDArray[np.uint8] | None = None
        mapped = map_bytes(path)
        cursor = _Cursor(mapped, path)
        tensor_count, metadata_count = _read_counts(cursor)
        self.metadata = _read_metadata(cursor, metadata_count)
        self.alignment = _alignment(self.metadata, path)
        table = _read_tensor_table(cursor, tensor_count)
        self.header_size = cursor.at
        start = -(-cursor.at // self.alignment) * self.alignment
        self.tensors = {
            name: _place(name, entry, start, self.alignment, mapped.size, path) for name, entry in table
        }
        _check_overlap(self.tensors, path)
        self._bytes = mapped

    def header(self) -> NDArray[np.uint8]:
        """The bytes before the data."""
        return self._map()[: self.header_size]

    def raw_rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of rows [start, stop) of the first dimension, flat: a read-only view."""
        tensor = self.tensors[name]
        row_bytes = (tensor.end - tensor.begin) // tensor.shape[0]
        first = tensor.begin + start * row_bytes
        return self._map()[first : tensor.begin + stop * row_bytes].view(np.ndarray)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of the first dimension: a read-only view, or dequantised to float32."""
        tensor = self.tensors[name]
        data = self.raw_rows(name, start, stop)
        shape = (stop - start, *tensor.shape[1:])
        if tensor.type in BLOCK_TYPES:
            return dequantize(data, BLOCK_TYPES[tensor.type]).reshape(shape)
        return data.view(FLOAT_TYPES[tensor.type]).reshape(shape)

    def forget(self) -> None:
        """See Checkpoint.forget."""
        drop_pages(self._map())

    def close(self) -> None:
        """Lets go of the map; arrays already read stay valid."""
        self._bytes = None

    def _map(self) -> NDArray[np.uint8]:
        if self._bytes is None:
            raise CheckpointError(f"{self.path}: read after it was closed")
        return self._bytes


class _Cursor:
    """Reads the header front to back; nothing is read, and no memory taken, beyond the end of the file."""

    def __init__(self, data: NDArray[np.uint8], path: Path) -> None:
        self._data = data.view(np.ndarray).data
        self._path = path
        self.size = len(self._data)
        self.at = 0

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {text}")

    def _advance(self, size: int, what: str) -> int:
        at = self.at
        if size > self.size - at:
            raise self.error(
                f"{what} at byte {at} takes {size} bytes, "
                f"the file ends after {self.size - at}; it is cut off or damaged"
            )
        self.at += size
        return at

    def check_count(self, count: int, item_bytes: int, what: str) -> int:
        """`count` items of at least `item_bytes` must fit in what is left."""
        if count * item_bytes > self.size - self.at:
            raise self.error(
                f"{what}: {count} is more than the {self.size - self.at} bytes left can hold; "
                "the file is damaged"
            )
        return count

    def scalar(self, kind: struct.Struct, what: str) -> Any:
        return kind.unpack_from(self._data, self._advance(kind.size, what))[0]

    def u32(self, what: str) -> int:
        return int(self.scalar(SCALARS[4], what))

    def u64(self, what: str) -> int:
        return int(self.scalar(SCALARS[10], what))

    def string(self, what: str) -> str:
        length = self.u64(what)
        at = self._advance(length, what)
        try:
            return str(self._data[at : at + length], "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} at byte {at} is not UTF-8; the file is damaged") from None

    def strings(self, count: int, what: str) -> list[str]:
        """`string`, `count` times, in one tight loop: vocabularies have hundreds of thousands."""
        data, at, size, unpack = self._data, self.at, self.size, SCALARS[10].unpack_from
        texts = []
        try:
            for _ in range(count):
                (length,) = unpack(data, at)
                at += 8
                if length > size - at:
                    raise self.error(f"{what}: a string of {length} bytes, the file ends after {size - at}")
                texts.append(str(data[at : at + length], "utf-8"))
                at += length
        except struct.error:
            raise self.error(f"{what}: the file ends within its strings; it is cut off") from None
        except UnicodeDecodeError:
            raise self.error(f"{what}: the string at byte {at} is not UTF-8; the file is damaged") from None
        self.at = at
        return texts

    def numbers(self, kind: struct.Struct, count: int, what: str) -> NDArray[Any]:
        at = self._advance(count * kind.size, what)
        data = np.frombuffer(self._data[at : self.at], dtype=np.uint8)
        return np.not_equal(data, 0) if kind is SCALARS[BOOL] else data.view(kind.format)


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Tensors and metadata entries, after the magic and the version."""
    if cursor.size < 24 or cursor.u32("magic") != int.from_bytes(b"GGUF", "little"):
        raise cursor.error(f"not a GGUF file (it does not begin with GGUF and has {cursor.size} bytes)")
    version = cursor.u32("version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        detail = "a big-endian file" if swapped else f"version {version}"
        raise cursor.error(f"{detail} is not supported; supported: little-endian GGUF, versions 2 and 3")
    tensors, entries = cursor.u64("tensor count"), cursor.u64("metadata count")
    cursor.check_count(entries, MIN_KEY_VALUE_BYTES, "metadata count")
    cursor.check_count(tensors, MIN_TENSOR_BYTES, "tensor count")
    return tensors, entries


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string("a metadata key")
        if len(key) > MAX_KEY_BYTES:
            raise cursor.error(f"the metadata key {shown(key)} is longer than {MAX_KEY_BYTES} bytes")
        if key in metadata:
            raise cursor.error(f"the metadata key {shown(key)} stands there twice")
        metadata[key] = _read_value(cursor, cursor.u32(shown(key)), key, 0)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str, depth: int) -> Any:
    """A number, a string, an array of numbers (numpy) or a list of anything else."""
    what = f"metadata {shown(key)}"
    if kind in SCALARS:
        return cursor.scalar(SCALARS[kind], what)
    if kind == STRING:
        return cursor.string(what)
    if kind != ARRAY:
        raise cursor.error(f"{what} has the type {kind}; GGUF has 0 to 12")
    if depth == MAX_NESTING:
        raise cursor.error(f"{what}: arrays nested deeper than {MAX_NESTING}; the file is damaged")
    item, count = cursor.u32(what), cursor.u64(what)
    if item in SCALARS:
        return cursor.numbers(SCALARS[item], cursor.check_count(count, SCALARS[item].size, what), what)
    if item == STRING:
        return cursor.strings(cursor.check_count(count, 8, what), what)
    cursor.check_count(count, 4 + 8, what)  # an array's item type and count
    return [_read_value(cursor, item, key, depth + 1) for _ in range(count)]


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 4 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise CheckpointError(
            f"{path}: general.alignment is {shown(value)}; it must be a power of two "
            f"from 4 to {MAX_ALIGNMENT}"
        )
    return value


def _read_tensor_table(cursor: _Cursor, count: int) -> list[tuple[str, GGUFTensor]]:
    """Names, types and shapes; `begin` and `end` are still relative to the data."""
    table: dict[str, GGUFTensor] = {}
    for _ in range(count):
        name = cursor.string("a tensor's name")
        what = f"tensor {shown(name)}"
        if name in table:
            raise cursor.error(f"{what} stands there twice")
        dimensions = cursor.u32(what)
        if not 1 <= dimensions <= MAX_DIMS:
            raise cursor.error(f"{what} has {dimensions} dimensions; GGUF allows 1 to {MAX_DIMS}")
        shape = tuple(reversed([cursor.u64(what) for _ in range(dimensions)]))
        kind, offset = cursor.u32(what), cursor.u64(what)
        if kind not in TENSOR_TYPES:
            supported = ", ".join(sorted(TENSOR_TYPES.values()))
            raise cursor.error(f"{what} has the type {OTHER_TYPES.get(kind, kind)}; supported: {supported}")
        table[name] = GGUFTensor(
            TENSOR_TYPES[kind], shape, offset, offset + _byte_size(TENSOR_TYPES[kind], shape, what, cursor)
        )
    return list(table.items())


def _byte_size(kind: str, shape: tuple[int, ...], what: str, cursor: _Cursor) -> int:
    if not all(1 <= dim <= MAX_DIM for dim in shape):
        raise cursor.error(f"{what} has the shape {list(shape)}; every dimension must be from 1 to 2^48")
    if kind in FLOAT_TYPES:
        return math.prod(shape) * FLOAT_TYPES[kind].itemsize
    block = BLOCK_TYPES[kind]
    if shape[-1] % block.size:
        raise cursor.error(f"{what}: rows of {shape[-1]} elements; {kind} has blocks of {block.size}")
    return math.prod(shape) // block.size * block.bytes


def _place(name: str, tensor: GGUFTensor, start: int, alignment: int, size: int, path: Path) -> GGUFTensor:
    """The tensor with its bytes counted from the file's start, if the file has them."""
    what = f"{path}: tensor {shown(name)}"
    if tensor.begin % alignment:
        raise CheckpointError(f"{what} has the offset {tensor.begin}; it must be a multiple of {alignment}")
    if start + tensor.end > size:
        raise CheckpointError(
            f"{what} ends at byte {start + tensor.end}, the file at {size}; it is cut off, download it again"
        )
    return GGUFTensor(tensor.type, tensor.shape, start + tensor.begin, start + tensor.end)


def _check_overlap(tensors: dict[str, GGUFTensor], path: Path) -> None:
    ordered = sorted(tensors.items(), key=lambda item: item[1].begin)
    for (name, tensor), (after, following) in pairwise(ordered):
        if following.begin < tensor.end:
            raise CheckpointError(
                f"{path}: tensors {shown(name)} and {shown(after)} overlap; the file is damaged"
            )
