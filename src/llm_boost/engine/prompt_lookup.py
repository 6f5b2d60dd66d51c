"""Guesses from the text itself: after words that stood before come, often, the words that came after them."""

from __future__ import annotations

from collections.abc import Sequence as Sequences

import numpy as np

from llm_boost.engine.batch import Int32Array
from llm_boost.engine.drafts import Drafting
from llm_boost.engine.sequence import Sequence


class PromptLookup:
    """Where the longest of a sequence's endings of `low` to `high` tokens stood last before, it goes on."""

    seconds = 0.0

    def __init__(self, low: int, high: int) -> None:
        self._low = low
        self._high = high

    def follow(self, sequences: Sequences[Sequence]) -> None:
        """Learns from the tokens that came since, and finds where each sequence may go on."""
        for sequence in sequences:
            drafting = sequence.drafting or _Lookup(sequence.num_tokens)
            assert isinstance(drafting, _Lookup)
            sequence.drafting = drafting
            tokens = sequence.tokens
            while drafting.seen < len(tokens):
                if drafting.source >= 0:
                    hit = bool(tokens[drafting.source] == tokens[drafting.seen])
                    drafting.learn(hit)
                    drafting.source = drafting.source + 1 if hit else -1
                drafting.seen += 1
            if drafting.source < 0:
                drafting.source = self._find(tokens)
            drafting.available = drafting.source >= 0

    def propose(self, wanted: Sequences[tuple[Sequence, int]]) -> None:
        """Gives each sequence so many drafts."""
        for sequence, count in wanted:
            drafting = sequence.drafting
            assert isinstance(drafting, _Lookup)
            # Where the source ends the guess begins again: a text that repeats itself goes round.
            sequence.propose(np.resize(sequence.tokens[drafting.source :], count))

    def _find(self, tokens: Int32Array) -> int:
        """The position after the earlier occurrence; -1 where there is none."""
        ends = np.flatnonzero(tokens[:-1] == tokens[-1])
        length = 1
        while length < self._high and len(ends) and length < len(tokens):
            longer = ends[ends >= length]
            longer = longer[tokens[longer - length] == tokens[-1 - length]]
            if len(longer) == 0:
                break
            ends, length = longer, length + 1
        return int(ends[-1]) + 1 if len(ends) and length >= self._low else -1


class _Lookup(Drafting):
    """`source` is where the token that should come next stands, or -1; `seen` counts the tokens looked at."""

    __slots__ = ("seen", "source")

    def __init__(self, seen: int) -> None:
        super().__init__()
        self.seen = seen
        self.source = -1
