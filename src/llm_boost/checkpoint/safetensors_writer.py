"""Writes a safetensors file tensor by tensor: the header first, from sizes known before, then the data."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.safetensors_reader import DTYPES, PADDING
from llm_boost.errors import CheckpointError

ALIGNMENT = 64  # a cache line, and the widest vector
CHUNK_BYTES = 16 << 20  # written at a time, between calls of `progress`
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[int, int], None]  # bytes done, bytes in all


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
    tensors: Iterator[tuple[str, NDArray[Any]]],
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes `tensors`, which come in the order of `specs`, to `path`; each begins at a multiple of 64 bytes.

    The file takes its name once it is whole and on the disk; whatever fails before leaves nothing behind.
    One tensor at a time is held. The format allows no holes: bytes between tensors are tensors of their own,
    `__padding__.N`.

    Raises:
        CheckpointError: the folder cannot be written to, or the disk lacks the space (both sizes are named).
        ValueError: `tensors` are not those of `specs`.
    """
    header, starts, total = _layout(specs, dict(metadata or {}))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with _disk_errors(path, total):
            if shutil.disk_usage(path.parent).free < total:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            with _disk_errors(path, total):
                _write(file, memoryview(header))
            for spec, start in zip(specs, starts, strict=True):
                for done in _write_tensor(file, spec, start, next(tensors, None), path, total):
                    if progress:
                        progress(done, total)
            if next(tensors, None) is not None:
                raise ValueError("more tensors came than were announced")
            with _disk_errors(path, total):
                os.ftruncate(file, total)
                os.fsync(file)
        finally:
            os.close(file)
        with _disk_errors(path, total):
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _layout(specs: Sequence[TensorSpec], metadata: dict[str, str]) -> tuple[bytes, list[int], int]:
    """The header's bytes, where in the file each tensor begins, and the file's size."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at, starts = 0, []
    for index, spec in enumerate(specs):
        gap = -at % ALIGNMENT
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


def _write_tensor(
    file: int, spec: TensorSpec, start: int, item: tuple[str, NDArray[Any]] | None, path: Path, total: int
) -> Iterator[int]:
    """Writes the tensor that was announced, in chunks; yields where in the file each chunk ends."""
    if item is None:
        raise ValueError(f"{spec} was announced and did not come")
    name, tensor = item
    if (name, tensor.dtype, tensor.shape) != (spec.name, DTYPES[spec.dtype], spec.shape):
        raise ValueError(f"{spec} was announced, {name} {tensor.dtype} {tensor.shape} came")
    data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    for offset in range(0, len(data), CHUNK_BYTES):
        chunk = data[offset : offset + CHUNK_BYTES]
        with _disk_errors(path, total):
            os.lseek(file, start + offset, os.SEEK_SET)
            _write(file, chunk)
        yield start + offset + len(chunk)


def _write(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]


@contextlib.contextmanager
def _disk_errors(path: Path, total: int) -> Iterator[None]:
    """What the system says of writing `path`, `total` bytes large, as a CheckpointError."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None
        free = shutil.disk_usage(path.parent).free
        raise CheckpointError(
            f"{path.parent}: no space for {path.name} ({error.strerror}): it takes {total / 1e6:.1f} MB, "
            f"{free / 1e6:.1f} MB are available; make room, or choose another folder"
        ) from None
