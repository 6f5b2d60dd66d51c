"""MindSpore's `.ckpt`, read and written: a protobuf whose schema is `mindspore/ccsrc/utils/checkpoint.proto`.

    Checkpoint  { repeated Value value = 1 }
    Value       { string tag = 1; oneof { TensorProto tensor = 2; MapTensorProto maptensor = 3 } }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

The bytes of a tensor are little endian and row-major. One larger than 512 MiB is cut into consecutive Values
of the same tag and dims, whose bytes follow each other. `crc_num` and ten bytes may follow the message: the
CRC-32 of all before, big endian.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.fields import shown
from llm_boost.checkpoint.safetensors_reader import DTYPES, MAX_DIM, MAX_DIMS, drop_pages, map_bytes
from llm_boost.checkpoint.safetensors_writer import TensorSpec, announced_bytes
from llm_boost.checkpoint.whole_file import FileWriter, Progress, Rows, whole_file
from llm_boost.errors import CheckpointError
from llm_boost.protobuf import (
    as_bytes,
    as_integers,
    as_text,
    bytes_field,
    bytes_prefix,
    integer_field,
    read_fields,
)

SLICE_BYTES = 512 << 20
CRC_MARK, CRC_TAIL_BYTES = b"crc_num", 17

# MindSpore's name of a type -> safetensors'
TENSOR_TYPES = {
    "Float32": "F32",
    "Float16": "F16",
    "BFloat16": "BF16",
    "Float64": "F64",
    "Int8": "I8",
    "Int16": "I16",
    "Int32": "I32",
    "Int64": "I64",
    "UInt8": "U8",
    "UInt16": "U16",
    "UInt32": "U32",
    "UInt64": "U64",
    "Bool": "BOOL",
}
_NAMES_OF_TYPES = {dtype: name for name, dtype in TENSOR_TYPES.items()}
TEXT_TYPE = "str"  # a Python string among the parameters, in UTF-32


@dataclass
class _Entry:
    """A tensor's slices: views of the map."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    slices: list[memoryview] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.slices))


class MindSporeFile:
    """A validated, memory-mapped `.ckpt`. Raises CheckpointError, one line, for anything wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mapped = map_bytes(path)
        if mapped[0] != 1 << 3 | 2:
            raise CheckpointError(
                f"{path}: not a MindSpore checkpoint (it begins with byte {mapped[0]}); "
                "one that is encrypted must be decrypted first"
            )
        self._mapped: NDArray[np.uint8] | None = mapped
        data = mapped.view(np.ndarray).data
        tail = bytes(data[-CRC_TAIL_BYTES:])
        self.crc = int.from_bytes(tail[7:], "big") if tail.startswith(CRC_MARK) else None
        self._message = data[:-CRC_TAIL_BYTES] if self.crc is not None else data
        self._entries = _read_entries(self._message, path)
        self._infos = {
            name: TensorInfo(name, entry.shape, entry.dtype.name) for name, entry in self._entries.items()
        }

    def infos(self) -> dict[str, TensorInfo]:
        """The tensors by name; strings among the parameters are left out."""
        return self._infos

    def read(self, name: str) -> NDArray[Any]:
        """The tensor: a read-only view of the map, or a copy where it is in slices or not aligned."""
        entry = self._entries[name]
        return self._typed(entry, 0, entry.nbytes).reshape(entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of the first dimension; no other row is touched."""
        entry = self._entries[name]
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        return self._typed(entry, start * row, stop * row).reshape(stop - start, *entry.shape[1:])

    def crc_holds(self) -> bool | None:
        """Whether the checksum is that of the file, which is read whole; None where it has none."""
        if self.crc is None:
            return None
        value = 0
        for start in range(0, len(self._message), SLICE_BYTES // 32):
            value = zlib.crc32(self._message[start : start + SLICE_BYTES // 32], value)
        return value == self.crc

    def forget(self) -> None:
        """See Checkpoint.forget."""
        if self._mapped is not None:
            drop_pages(self._mapped)

    def close(self) -> None:
        """Lets go of the map; arrays already read stay valid."""
        self._mapped, self._message, self._entries = None, memoryview(b""), {}

    def _typed(self, entry: _Entry, begin: int, end: int) -> NDArray[Any]:
        """Bytes [begin, end) of the tensor as its elements."""
        parts, at = [], 0
        for part in entry.slices:
            if at < end and begin < at + len(part):
                parts.append(np.frombuffer(part[max(begin - at, 0) : end - at], dtype=np.uint8))
            at += len(part)
        data = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint8), *parts])
        view = data.view(entry.dtype)
        return view if view.flags.aligned else view.copy()


def _read_entries(message: memoryview, path: Path) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    seen: set[str] = set()
    last = None
    try:
        for number, value in read_fields(message):
            if number != 1:
                raise ValueError(f"field {number} where a parameter belongs")
            name, tensor = _read_value(as_bytes(value))
            if name in seen and name != last:
                raise CheckpointError(f"{path}: tensor {shown(name)} stands there twice")
            seen.add(name)
            last = name
            if tensor is None:
                continue
            entry = entries.setdefault(name, tensor)
            if entry is not tensor:
                if (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
                    raise ValueError(f"tensor {shown(name)}: its slices differ in type or shape")
                entry.slices += tensor.slices
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not a whole MindSpore checkpoint: {error}; it is cut off or damaged"
        ) from None
    for name, entry in entries.items():
        needed = math.prod(entry.shape) * entry.dtype.itemsize
        if entry.nbytes != needed:
            raise CheckpointError(
                f"{path}: tensor {shown(name)}: {entry.nbytes} bytes of data, but shape {list(entry.shape)} "
                f"of {entry.dtype.name} takes {needed}; the file is damaged"
            )
    return entries


def _read_value(message: memoryview) -> tuple[str, _Entry | None]:
    """A parameter's name and one slice of its tensor; None for a string."""
    name, tensor, other = None, None, False
    for number, value in read_fields(message):
        if number == 1:
            name = as_text(value)
        elif number == 2:
            tensor = as_bytes(value)
        else:
            other = True
    if name is None:
        raise ValueError("a parameter without a name")
    if tensor is None:
        kind = "a map parameter (MapTensor), which is not supported" if other else "empty"
        raise ValueError(f"parameter {shown(name)} is {kind}")
    dims: list[int] = []
    kind, content = "", memoryview(b"")
    for number, value in read_fields(tensor):
        if number == 1:
            dims += as_integers(value)
        elif number == 2:
            kind = as_text(value)
        elif number == 3:
            content = as_bytes(value)
        if len(dims) > MAX_DIMS:
            raise ValueError(f"tensor {shown(name)} has more than {MAX_DIMS} dimensions")
    if kind == TEXT_TYPE:
        return name, None
    if kind not in TENSOR_TYPES:
        raise ValueError(
            f"tensor {shown(name)} is of type {shown(kind)}; known types are {', '.join(TENSOR_TYPES)}"
        )
    if not all(0 <= dim <= MAX_DIM for dim in dims):
        raise ValueError(f"tensor {shown(name)} has the shape {dims}; dimensions are from 0 to 2^48")
    dtype = DTYPES[TENSOR_TYPES[kind]]
    shape = () if dims == [0] and len(content) == dtype.itemsize else tuple(dims)  # older files' scalars
    return name, _Entry(dtype, shape, [content])


def write_ckpt(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterator[tuple[str, Rows]],
    progress: Progress | None = None,
    verify: Callable[[Path], object] | None = None,
) -> None:
    """Writes `tensors`, which come in the order of `specs`, as MindSpore's save_checkpoint does.

    Each is an array, or its rows in order, some at a time. The file takes its name once it is whole, on the
    disk and accepted by `verify`; whatever fails before leaves nothing behind.

    Raises:
        CheckpointError: a type that MindSpore lacks, a folder that cannot be written to, a full disk.
        ValueError: `tensors` are not those of `specs`.
    """
    for _ in ckpt_steps(path, specs, tensors, progress, verify):
        pass


def ckpt_steps(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterator[tuple[str, Rows]],
    progress: Progress | None = None,
    verify: Callable[[Path], object] | None = None,
) -> Generator[None, None, None]:
    """`write_ckpt`, a tensor a step, for files written side by side; closed early it undoes all."""
    for spec in specs:
        if spec.dtype not in _NAMES_OF_TYPES:
            raise CheckpointError(
                f"{path}: tensor {shown(spec.name)} is {spec.dtype}; a .ckpt has no such type"
            )
    if len({spec.name for spec in specs}) != len(specs):
        raise ValueError("a name stands there twice")
    total = sum(size + len(_prefix(spec, size)) for spec in specs for size in _slices(spec.nbytes))
    with whole_file(path, total, progress, verify) as file:
        for spec in specs:
            _write_tensor(file, spec, next(tensors, None))
            yield
        if next(tensors, None) is not None:
            raise ValueError("more tensors came than were announced")


def _slices(nbytes: int) -> list[int]:
    """Sizes of the slices; an empty tensor has one, of no bytes."""
    return [min(SLICE_BYTES, nbytes - start) for start in range(0, max(nbytes, 1), SLICE_BYTES)]


def _prefix(spec: TensorSpec, size: int) -> bytes:
    """What stands before `size` bytes of content, from the Value's key on."""
    dims = b"".join(integer_field(1, dim) for dim in spec.shape)
    head = dims + bytes_field(2, _NAMES_OF_TYPES[spec.dtype].encode()) + bytes_prefix(3, size)
    tensor = bytes_field(1, spec.name.encode()) + bytes_prefix(2, len(head) + size) + head
    return bytes_prefix(1, len(tensor) + size) + tensor


def _write_tensor(file: FileWriter, spec: TensorSpec, item: tuple[str, Rows] | None) -> None:
    sizes = iter(_slices(spec.nbytes))
    left = 0
    if spec.nbytes == 0:
        file.write(_prefix(spec, next(sizes)))
    for chunk in announced_bytes(spec, item):
        while chunk:
            if not left:
                left = next(sizes)
                file.write(_prefix(spec, left))
            piece, chunk = chunk[:left], chunk[left:]
            file.write(piece)
            left -= len(piece)
