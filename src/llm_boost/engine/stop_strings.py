"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations


class StopStrings:
    """Passes text on, holding back what may be the beginning of a stop string.

    The stop string that is complete first counts; of two complete at the same character, the longer. So the
    result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: tuple[str, ...], *, include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """The text that may be shown, and the stop string that ended it, if one did."""
        if not self._stops:
            return piece, None
        text = self._held + piece
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            end, start, stop = min(ends)
            self._held = ""
            return text[: end if self._include else start], stop
        keep = self._longest_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back: no more text comes."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
