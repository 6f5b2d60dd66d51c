"""A file that takes its name once it is whole, verified and on the disk; until then it is `NAME.PID.tmp`."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.errors import CheckpointError

CHUNK_BYTES = 16 << 20  # written at a time, between calls of `progress`
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Rows = NDArray[Any] | Iterable[NDArray[Any]]  # a tensor, or its rows in order, some at a time


class FileWriter:
    """Writes a file of a size known before, from front to back or with gaps (`seek`), which read as zeros."""

    def __init__(self, file: int, path: Path, total: int, progress: Progress | None) -> None:
        self._file, self._path, self._total, self._progress = file, path, total, progress
        self.at = 0

    def write(self, data: bytes | memoryview) -> None:
        """Appends `data` at `at`, in chunks."""
        view = memoryview(data)
        for offset in range(0, len(view), CHUNK_BYTES):
            chunk = view[offset : offset + CHUNK_BYTES]
            self.at += len(chunk)
            with disk_errors(self._path, self._total):
                while chunk:
                    chunk = chunk[os.write(self._file, chunk) :]
            if self._progress:
                self._progress(self.at, self._total)

    def seek(self, at: int) -> None:
        self.at = os.lseek(self._file, at, os.SEEK_SET)


@contextlib.contextmanager
def whole_file(
    path: Path,
    total: int,
    progress: Progress | None = None,
    verify: Callable[[Path], object] | None = None,
) -> Iterator[FileWriter]:
    """A FileWriter of `path`, `total` bytes large.

    The file takes its name when the block ends without an error and `verify` accepts what was written;
    whatever fails before leaves nothing behind, and what a killed process left is removed.

    Raises:
        CheckpointError: the folder cannot be written to, or the disk lacks the space (both sizes are named).
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    remove_abandoned(path)
    try:
        with disk_errors(path, total):
            check_free_space(path.parent, total)
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            yield FileWriter(file, path, total, progress)
            with disk_errors(path, total):
                os.ftruncate(file, total)
                os.fsync(file)
        finally:
            os.close(file)
        if verify:
            verify(temporary)
        with disk_errors(path, total):
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, total: int) -> Iterator[Path]:
    """A folder to fill, `total` bytes large, renamed to `path` (absent, or empty) when the block ends.

    Whatever fails before leaves nothing behind, and what a killed process left is removed.

    Raises:
        CheckpointError: the folder above cannot be written to, or the disk lacks the space.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    remove_abandoned(path)
    try:
        with disk_errors(path, total):
            check_free_space(path.parent, total)
            temporary.mkdir()
        yield temporary
        with disk_errors(path, total):
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free_space(folder: Path, total: int) -> None:
    """Raises OSError where the disk has fewer than `total` bytes left."""
    if shutil.disk_usage(folder).free < total:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def remove_abandoned(path: Path) -> None:
    """Removes what processes that live no more left of `path` (a file, or a folder) under temporary names."""
    pattern = re.compile(re.escape(path.name) + r"\.(\d+)\.tmp")
    with contextlib.suppress(OSError):
        for entry in os.scandir(path.parent):
            match = pattern.fullmatch(entry.name)
            if match and not _lives(int(match[1])):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def chunk_bytes(tensor: Rows) -> Iterator[memoryview]:
    """The tensor's bytes, row-major, piece by piece."""
    for chunk in [tensor] if isinstance(tensor, np.ndarray) else tensor:
        yield np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def disk_errors(path: Path, total: int) -> Iterator[None]:
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
