"""Reads a written file back, and compares every tensor's checksum with that of the bytes that went out."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.whole_file import Progress, chunk_bytes
from llm_boost.convert.tensors import OutTensor, Rows, chunk_rows
from llm_boost.errors import LLMBoostError


class Readable(Protocol):
    """What a reader of any format offers."""

    def infos(self) -> dict[str, TensorInfo]: ...

    def read(self, name: str) -> Any: ...

    def read_rows(self, name: str, start: int, stop: int) -> Any: ...

    def forget(self) -> None: ...

    def close(self) -> None: ...


class Checksums:
    """CRC-32 of each tensor's bytes, taken on their way out."""

    def __init__(self) -> None:
        self._sums: dict[str, int] = {}

    def outgoing(self, tensors: Sequence[OutTensor[Any]]) -> Iterator[tuple[str, Rows]]:
        """The tensors as the writers take them."""
        for tensor in tensors:
            yield tensor.spec.name, self._summed(tensor.spec.name, tensor.rows())

    def check(self, path: Path, file: Readable, progress: Progress | None = None) -> None:
        """Compares the file, read back through its format's reader.

        Raises:
            LLMBoostError: a tensor is not what was written.
        """
        infos = file.infos()
        total = len(self._sums)
        for done, (name, expected) in enumerate(self._sums.items()):
            if name not in infos or self._of(file, infos[name]) != expected:
                raise LLMBoostError(
                    f"{path}: tensor {name} reads back differently than it was written; check the disk"
                )
            if progress:
                progress(done + 1, total)
        file.close()

    def _summed(self, name: str, rows: Rows) -> Rows:
        value = 0
        for chunk in rows:
            for data in chunk_bytes(chunk):
                value = zlib.crc32(data, value)
            yield chunk
        self._sums[name] = value

    def _of(self, file: Readable, info: TensorInfo) -> int:
        value = 0
        for data in chunk_bytes(_rows(file, info)):
            value = zlib.crc32(data, value)
        return value


def _rows(file: Readable, info: TensorInfo) -> Rows:
    if not info.shape:
        yield file.read(info.name)
        return
    step = chunk_rows(info.shape)
    for start in range(0, info.shape[0], step):
        yield file.read_rows(info.name, start, min(start + step, info.shape[0]))
        file.forget()
