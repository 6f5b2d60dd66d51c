"""A progress bar on stderr, with rate and time left, for what takes longer than two seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE_SECONDS = 2.0


class ProgressBar:
    """Called with (done, total), in bytes or in `unit`; shows nothing before `PATIENCE_SECONDS` have passed.

    Where stderr is not a terminal it shows nothing at all.
    """

    def __init__(self, what: str, unit: str = "bytes") -> None:
        self._what, self._unit = what, unit
        self._start = time.monotonic()
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        seconds = time.monotonic() - self._start
        if self._bar is None:
            if seconds < PATIENCE_SECONDS or not sys.stderr.isatty():
                return
            self._bar = _bar()
            self._task = self._bar.add_task(self._what, total=total, rate="")
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, rate=self._rate(done / seconds))

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _rate(self, rate: float) -> str:
        return f"{rate / 1e6:.0f} MB/s" if self._unit == "bytes" else f"{rate:.1f} {self._unit}/s"


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=Console(stderr=True),
        transient=True,
    )
