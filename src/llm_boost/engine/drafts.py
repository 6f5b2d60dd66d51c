"""How many tokens to guess: as many as pay, by the measured acceptance and the measured time of a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Sequences
from statistics import median
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llm_boost.engine.sequence import Sequence

_LEARNING = 0.15  # what the latest guess counts in a rate
_GAIN = 1.03  # what guessing must promise, as a factor of the speed without
_GUESSED_COST = 0.05
_SAMPLES = 7  # of a step's time that are kept
_FORGET_AFTER = 300  # steps: a time that was not measured again since may have been a bad moment


class Drafting:
    """What a drafter knows of a sequence: how often its first guess is right, and one after a right one."""

    __slots__ = ("available", "first", "later", "streak")

    def __init__(self) -> None:
        self.first = 0.5
        self.later = 0.75
        self.streak = False  # the latest guess was right
        self.available = False  # a guess can be made

    def learn(self, hit: bool) -> None:
        if self.streak:
            self.later += _LEARNING * (hit - self.later)
        else:
            self.first += _LEARNING * (hit - self.first)
        self.streak = hit

    def chances(self, count: int) -> list[float]:
        """Of each of the next guesses, that it and all before it are right."""
        chance, chances = self.later if self.streak else self.first, []
        for _ in range(count if self.available else 0):
            chances.append(chance)
            chance *= self.later
        return chances


class Drafter(Protocol):
    """Where guesses come from."""

    @property
    def seconds(self) -> float:
        """What it takes to guess one token of every sequence."""
        ...

    def follow(self, sequences: Sequences[Sequence]) -> None:
        """Brings each sequence's `drafting` up to date."""
        ...

    def propose(self, wanted: Sequences[tuple[Sequence, int]]) -> None:
        """Gives each sequence so many drafts, or fewer."""
        ...


class StepTimes:
    """Seconds of a decode step by its number of tokens: measured as it goes, interpolated between."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._last: dict[int, int] = {}
        self._steps = 0

    def measure(self, num_tokens: int, seconds: float) -> None:
        self._steps += 1
        self._samples.setdefault(num_tokens, deque(maxlen=_SAMPLES)).append(seconds)
        self._last[num_tokens] = self._steps
        if self._steps % _FORGET_AFTER == 0:
            for old in [n for n, step in self._last.items() if step <= self._steps - _FORGET_AFTER]:
                del self._samples[old], self._last[old]

    def table(self, low: int, high: int) -> NDArray[np.float64]:
        """Of low .. high tokens; beyond what is measured a token adds 5 %, so that it is tried."""
        known = sorted(self._samples) or [low]
        seconds = [median(self._samples[n]) if self._samples else 1.0 for n in known]
        tokens = np.arange(low, high + 1)
        times: NDArray[np.float64] = np.interp(tokens, known, seconds)
        times *= 1 + _GUESSED_COST * np.maximum(tokens - known[-1], 0)
        return times / (1 + _GUESSED_COST * np.maximum(known[0] - tokens, 0))


class _Guess(NamedTuple):
    """The `depth`-th next token of a sequence."""

    minus_chance: float
    depth: int
    owner: int


class Speculator:
    """Chooses, for the sequences of a decode step, the drafts that give most tokens a second.

    Drafts are taken by their chance, the best first, for as many as make (expected tokens) / (time of a step)
    largest. So none is taken where none pays, and a large batch, which has no idle arithmetic, takes none.
    """

    def __init__(self, drafter: Drafter, most: int) -> None:
        self._drafter = drafter
        self._most = most
        self.times = StepTimes()
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0

    def propose(self, sequences: Sequences[Sequence], budget: int) -> None:
        """Gives drafts to decoding sequences, at most `budget` in all."""
        self._drafter.follow(sequences)
        guesses = [
            _Guess(-chance, depth, index)
            for index, sequence in enumerate(sequences)
            if sequence.drafting is not None
            for depth, chance in enumerate(
                sequence.drafting.chances(min(self._most, sequence.num_left - 1)), 1
            )
        ]
        guesses.sort()  # a sequence's chances fall, so that of each the first are taken
        del guesses[max(budget, 0) :]
        if not guesses:
            return
        counts = [0] * len(sequences)
        for guess in guesses[: self._best(guesses, len(sequences))]:
            counts[guess.owner] += 1
        self._drafter.propose([(s, n) for s, n in zip(sequences, counts, strict=True) if n])

    def _best(self, guesses: Sequences[_Guess], num_sequences: int) -> int:
        """How many of the guesses, best first, to take."""
        expected = num_sequences + np.cumsum([0.0] + [-guess.minus_chance for guess in guesses])
        rounds = np.maximum.accumulate([0] + [guess.depth for guess in guesses])
        times = self.times.table(num_sequences, num_sequences + len(guesses))
        speeds = expected / (times + rounds * self._drafter.seconds)
        best = int(np.argmax(speeds))
        return best if speeds[best] > _GAIN * speeds[0] else 0
