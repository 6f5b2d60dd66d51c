"""Writes a GGUF file, version 3, tensor by tensor (gguf_reader.py has the format)."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_boost.checkpoint.gguf_quants import BLOCK_TYPES
from llm_boost.checkpoint.gguf_reader import ARRAY, FLOAT_TYPES, SCALARS, STRING, TENSOR_TYPES
from llm_boost.checkpoint.whole_file import Progress, Rows, chunk_bytes, whole_file

ALIGNMENT = 32  # the format's default
_NUMBERS = {kind: number for number, kind in TENSOR_TYPES.items()}
_SCALAR_TYPES = {np.dtype(code.format): number for number, code in SCALARS.items()}


@dataclass(frozen=True)
class GGUFSpec:
    """A tensor before its data exists; `type` is ggml's name, `shape` slowest first, as numpy has it."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        if self.type in FLOAT_TYPES:
            return math.prod(self.shape) * FLOAT_TYPES[self.type].itemsize
        block = BLOCK_TYPES[self.type]
        return math.prod(self.shape) // block.size * block.bytes


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    specs: Sequence[GGUFSpec],
    tensors: Iterator[tuple[str, Rows]],
    progress: Progress | None = None,
    verify: Callable[[Path], object] | None = None,
) -> None:
    """Writes `tensors`, which come in the order of `specs`, blocks of a quantised one as bytes.

    Metadata are texts, lists of them, numpy scalars and arrays; a plain int becomes uint32, a float float32.
    The file takes its name once it is whole, on the disk and accepted by `verify`.

    Raises:
        CheckpointError: the folder cannot be written to, or the disk lacks the space.
        ValueError: `tensors` are not those of `specs`.
    """
    header, starts, total = _layout(metadata, specs)
    with whole_file(path, total, progress, verify) as file:
        file.write(header)
        for spec, start in zip(specs, starts, strict=True):
            file.seek(start)
            name, rows = next(tensors, ("nothing", np.empty(0)))
            if name != spec.name:
                raise ValueError(f"{spec} was announced, {name} came")
            for chunk in chunk_bytes(rows):
                file.write(chunk)
            del rows
            if file.at != start + spec.nbytes:
                raise ValueError(f"{spec} was announced, {file.at - start} bytes came")
        if next(tensors, None) is not None:
            raise ValueError("more tensors came than were announced")


def _layout(metadata: Mapping[str, Any], specs: Sequence[GGUFSpec]) -> tuple[bytes, list[int], int]:
    """The bytes before the data, where in the file each tensor begins, and the file's size."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(specs), len(metadata))]
    for key, value in metadata.items():
        kind, data = _value(value)
        parts += [_string(key), struct.pack("<I", kind), data]
    offset, offsets = 0, []
    for spec in specs:
        dims = tuple(reversed(spec.shape))
        parts += [_string(spec.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        parts.append(struct.pack("<IQ", _NUMBERS[spec.type], offset))
        offsets.append(offset)
        offset += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    header = b"".join(parts)
    header += bytes(-len(header) % ALIGNMENT)
    return header, [len(header) + each for each in offsets], len(header) + offset


def _value(value: Any) -> tuple[int, bytes]:
    """A metadata value's type and its bytes."""
    if isinstance(value, str):
        return STRING, _string(value)
    if isinstance(value, list):
        return ARRAY, struct.pack("<IQ", STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value, int) and not isinstance(value, bool):
        value = np.array([value]).astype(np.uint32)[0] if 0 <= value < 1 << 32 else np.int64(value)
    elif isinstance(value, float):
        value = np.float32(value)
    array = np.asarray(value)
    kind = _SCALAR_TYPES[array.dtype]
    if array.ndim == 0:
        return kind, array.tobytes()
    return ARRAY, struct.pack("<IQ", kind, len(array)) + array.tobytes()


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data
