"""Writes a safetensors file tensor by tensor: the header first, from sizes known before, then the data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_boost.checkpoint.safetensors_reader import DTYPES, PADDING
from llm_boost.checkpoint.whole_file import FileWriter, Progress, Rows, chunk_bytes, whole_file

ALIGNMENT = 64  # a cache line, and the widest vector


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before its data exists; `dtype` is the format's own name, as "U8" or "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterator[tuple[str, Rows]],
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    alignment: int = ALIGNMENT,
    verify: Callable[[Path], object] | None = None,
) -> None:
    """Writes `tensors`, which come in the order of `specs`, to `path`.

    Each begins at a multiple of `alignment`, and is an array, or its rows in order, some at a time. The file
    takes its name once it is whole, on the disk and accepted by `verify`; whatever fails before leaves
    nothing behind. The format allows no holes: bytes between tensors are tensors of their own,
    `__padding__.N`; an alignment of 1 makes none.

    Raises:
        CheckpointError: the folder cannot be written to, or the disk lacks the space (both sizes are named).
        ValueError: `tensors` are not those of `specs`.
    """
    for _ in safetensors_steps(path, specs, tensors, metadata, progress, alignment, verify):
        pass


def safetensors_steps(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterator[tuple[str, Rows]],
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    alignment: int = ALIGNMENT,
    verify: Callable[[Path], object] | None = None,
) -> Generator[None, None, None]:
    """`write_safetensors`, a tensor a step, for files written side by side; closed early it undoes all."""
    header, starts, total = _layout(specs, dict(metadata or {}), alignment)
    with whole_file(path, total, progress, verify) as file:
        file.write(header)
        for spec, start in zip(specs, starts, strict=True):
            file.seek(start)
            _write_tensor(file, spec, next(tensors, None))  # a call of its own: nothing of it stays
            yield
        if next(tensors, None) is not None:
            raise ValueError("more tensors came than were announced")


def announced_bytes(spec: TensorSpec, item: tuple[str, Rows] | None) -> Iterator[memoryview]:
    """The bytes of the tensor that came, which must be the one that was announced."""
    if item is None:
        raise ValueError(f"{spec} was announced and did not come")
    name, tensor = item
    came = (name, tensor.dtype, tensor.shape) if isinstance(tensor, np.ndarray) else (name,)
    if came != (spec.name, DTYPES[spec.dtype], spec.shape)[: len(came)]:
        raise ValueError(f"{spec} was announced, {' '.join(map(str, came))} came")
    done = 0
    for chunk in chunk_bytes(tensor):
        done += len(chunk)
        if done > spec.nbytes:
            break
        yield chunk
    if done != spec.nbytes:
        raise ValueError(f"{spec} was announced, {done} bytes came")


def _write_tensor(file: FileWriter, spec: TensorSpec, item: tuple[str, Rows] | None) -> None:
    for chunk in announced_bytes(spec, item):
        file.write(chunk)


def _layout(
    specs: Sequence[TensorSpec], metadata: dict[str, str], alignment: int
) -> tuple[bytes, list[int], int]:
    """The header's bytes, where in the file each tensor begins, and the file's size."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at, starts = 0, []
    for index, spec in enumerate(specs):
        gap = -at % alignment
        if gap:
            table[f"{PADDING}.{index}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [at, at + gap]}
        at += gap
        if spec.name in table or spec.name.startswith(PADDING):
            raise ValueError(f"the tensor name {spec.name!r} is taken")
        table[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        starts.append(at)
        at += spec.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)  # the format lets a header end in spaces
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + start for start in starts], len(header) + at
