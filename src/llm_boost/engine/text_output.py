"""The text of one completion: detokenised as tokens arrive, cut at stop strings."""

from __future__ import annotations

from typing import Protocol

from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.engine.stop_strings import StopStrings


class TextStream(Protocol):
    """An incremental detokeniser; it never gives half a character."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class NoText:
    """A stream that gives none, for those who want token ids alone."""

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class TextOutput:
    """`text` grows as tokens are pushed; `take_delta` gives what is new since it was last called."""

    def __init__(self, stream: TextStream, params: SamplingParams) -> None:
        self.text = ""
        self._stream = stream
        self._stops = StopStrings(params.stop_strings, include=params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._taken = 0

    def push(self, token: int) -> str | None:
        """Adds a token's text; the stop string that it completes, or None. Stops count from min_tokens on."""
        self._num_tokens += 1
        piece = self._stream.push(token)
        if self._num_tokens < self._min_tokens:
            self.text += piece
            return None
        shown, stop = self._stops.push(piece)
        self.text += shown
        return stop

    def finish(self) -> str | None:
        """No more tokens come: shows what was held back, unless that completes a stop string."""
        shown, stop = self._stops.push(self._stream.finish())
        self.text += shown if stop else shown + self._stops.flush()
        return stop

    def take_delta(self) -> str:
        delta = self.text[self._taken :]
        self._taken = len(self.text)
        return delta
