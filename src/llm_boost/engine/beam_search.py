"""Beam search: the most probable texts, as far as a beam of `beam_width` beginnings finds them.

The search is transformers' (`generate(num_beams=...)`, early_stopping=False), the shape of parameters and
results vLLM's. Each step asks the engine for the likeliest tokens after every beginning, as requests of one
token: beginnings share their full blocks in the prefix cache, and the tokens after the last of these are
computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from llm_boost.engine.outputs import Logprob
from llm_boost.engine.sampling_params import SamplingParams, check_boolean, check_integer, check_real

MAX_BEAM_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """What to search for. Raises RequestError for a value out of range."""

    beam_width: int  # beginnings that are followed, and texts that come back, 1..64
    max_tokens: int  # of a text
    ignore_eos: bool = False  # only max_tokens ends a text
    temperature: float = 0.0  # as in vLLM; nothing is sampled, so only 0 is allowed
    length_penalty: float = 1.0  # a text's score: its log-probability / tokens ** length_penalty
    include_stop_str_in_output: bool = False  # the end-of-sequence token stays at the end of `tokens`
    skip_special_tokens: bool = True  # in the text

    def __post_init__(self) -> None:
        check_integer("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        check_real("temperature", self.temperature, 0, 0)
        check_real("length_penalty", self.length_penalty, -10, 10)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            check_boolean(name, getattr(self, name))


@dataclass(slots=True)
class BeamSearchSequence:
    """A text that was found, or its beginning."""

    tokens: list[int]  # prompt and output
    logprobs: list[dict[int, Logprob]]  # of the output, with the other candidates at each place
    cum_logprob: float = 0.0
    text: str | None = None  # of all tokens
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: int | str | None = None  # the end-of-sequence token that ended it


@dataclass(slots=True)
class BeamSearchOutput:
    """The `beam_width` best texts of a prompt, the best first; fewer where there are not so many."""

    sequences: list[BeamSearchSequence]


class NextTokenParams(SamplingParams):
    """One greedy token, with the logprobs of more candidates than others may ask for."""

    max_logprobs: ClassVar[int] = 1 << 20


# The likeliest `count` tokens after each text, with their logprobs.
NextTokens = Callable[[Sequence[list[int]], int], Sequence[dict[int, Logprob]]]


@dataclass(slots=True)
class Search:
    """The search from one prompt: what is followed, and what has ended."""

    prompt: list[int]
    params: BeamSearchParams
    eos_token_ids: frozenset[int]
    beams: list[BeamSearchSequence] = field(default_factory=list)
    found: list[tuple[float, BeamSearchSequence]] = field(default_factory=list)  # with scores, best first

    def __post_init__(self) -> None:
        self.beams = [BeamSearchSequence(list(self.prompt), [])]
        if self.params.ignore_eos:
            self.eos_token_ids = frozenset()

    @property
    def num_candidates(self) -> int:
        """Enough that `beam_width` go on, even if all of the best ones end."""
        return self.params.beam_width * (1 + len(self.eos_token_ids))

    def advance(self, next_tokens: Sequence[dict[int, Logprob]]) -> None:
        """Takes the likeliest tokens after each beam."""
        width, length = self.params.beam_width, len(self.beams[0].logprobs) + 1
        best = sorted(self._candidates(next_tokens), key=lambda found: found[0], reverse=True)
        best = best[: self.num_candidates]
        self.beams, parents = [], self.beams
        for place, (total, beam, token) in enumerate(best):
            reason = "stop" if token in self.eos_token_ids else "length" if self._is_last(length) else None
            if reason is None and len(self.beams) < width:
                self.beams.append(_extended(parents[beam], token, next_tokens[beam], total))
            elif reason is not None and place < width:
                ended = _extended(parents[beam], token, next_tokens[beam], total)
                ended.finish_reason, ended.stop_reason = reason, token if reason == "stop" else None
                self.found.append((total / length**self.params.length_penalty, ended))
        self.found = sorted(self.found, key=lambda found: found[0], reverse=True)[:width]
        if len(self.found) == width and self.beams:
            possible = self.beams[0].cum_logprob / length**self.params.length_penalty
            if possible <= self.found[-1][0]:
                self.beams = []  # none of them would be among the best

    def _is_last(self, length: int) -> bool:
        return length == self.params.max_tokens

    def _candidates(self, next_tokens: Sequence[dict[int, Logprob]]) -> Iterator[tuple[float, int, int]]:
        """(log-probability of the text, beam, token) of every continuation."""
        for index, (beam, likeliest) in enumerate(zip(self.beams, next_tokens, strict=True)):
            for token, logprob in likeliest.items():
                yield beam.cum_logprob + logprob.logprob, index, token


def _extended(
    beam: BeamSearchSequence, token: int, entry: dict[int, Logprob], total: float
) -> BeamSearchSequence:
    return BeamSearchSequence([*beam.tokens, token], [*beam.logprobs, entry], total)


def beam_search(
    prompts: Sequence[list[int]],
    params: BeamSearchParams,
    eos_token_ids: frozenset[int],
    next_tokens: NextTokens,
    decode: Callable[[list[int]], str],
) -> list[BeamSearchOutput]:
    """The best texts of each prompt; all prompts take their steps together."""
    searches = [Search(prompt, params, eos_token_ids) for prompt in prompts]
    while going_on := [search for search in searches if search.beams]:
        beams = [beam.tokens for search in going_on for beam in search.beams]
        answers = iter(next_tokens(beams, going_on[0].num_candidates))
        for search in going_on:
            search.advance([next(answers) for _ in search.beams])
    return [BeamSearchOutput([_finished(s, params, decode) for _, s in search.found]) for search in searches]


def _finished(
    sequence: BeamSearchSequence, params: BeamSearchParams, decode: Callable[[list[int]], str]
) -> BeamSearchSequence:
    if sequence.finish_reason == "stop" and not params.include_stop_str_in_output:
        sequence.tokens.pop()
    sequence.text = decode(sequence.tokens)
    return sequence
