"""How far a conversion is: half of a file's way is writing it, half is reading it back."""

from __future__ import annotations

from llm_boost.checkpoint.whole_file import Progress


class Steps:
    """Adds up files of `total` bytes together, written and verified one after the other."""

    def __init__(self, total: int, progress: Progress | None = None) -> None:
        self._total, self._progress = total, progress
        self._before = self._size = 0

    def writing(self, done: int, size: int) -> None:
        self._size = size
        self._tell(done // 2)

    def verifying(self, done: int, count: int) -> None:
        """`done` of the file's `count` tensors are read back."""
        self._tell(self._size // 2 + self._size * done // max(count, 1) // 2)

    def finish_file(self) -> None:
        self._before += self._size

    def _tell(self, done: int) -> None:
        if self._progress:
            self._progress(self._before + done, max(self._total, self._before + self._size))
