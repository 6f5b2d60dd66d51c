"""The next token of each completion, from a step's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llm_boost._native import Sampler
from llm_boost.engine.batch import FloatArray, Int32Array
from llm_boost.engine.grammar import GrammarMasks
from llm_boost.engine.outputs import Logprob
from llm_boost.engine.request import Completion, Request
from llm_boost.engine.sequence import Sequence as TokenSequence

_FAULTS = {
    1: "the model gave NaN or infinite logits; try dtype float32, or check the checkpoint",
    2: "logit_bias, allowed_token_ids, bad_words and min_tokens leave no token to choose",
    3: "the sequence has a token outside the model's vocabulary",
}


_Extra = tuple[FloatArray, Int32Array, Int32Array, FloatArray]


class Sampled(NamedTuple):
    token: int
    fault: str | None  # then there is no token
    logprobs: dict[int, Logprob] | None  # when the request wants them: the token's first, then the likeliest


class TokenSampler:
    """Samples for all completions of a step. `decode` gives a token's text, for logprobs."""

    def __init__(self, vocab_size: int, threads: int, decode: Callable[[int], str]) -> None:
        self._native = Sampler(vocab_size, threads)
        self._masks = GrammarMasks(vocab_size)
        self._decode = decode

    def sample(
        self, logits: FloatArray, completions: Sequence[Completion], histories: list[Int32Array]
    ) -> list[Sampled]:
        """Samples logits [R, V] for R completions, each after its tokens so far."""
        masks, masked = self._fill_masks(completions)
        tokens, status, extra = self._native.sample(
            logits, [c.row for c in completions], histories, masks, masked
        )
        ids: list[int] = tokens.tolist()
        faults = {int(i): _FAULTS[int(status[i])] for i in np.flatnonzero(status)}
        for i in masked:
            grammar = completions[i].grammar
            if grammar is not None and grammar.error:
                faults[i] = f"structured_outputs: {grammar.error}"
        if extra is None and not faults:
            return [Sampled(token, None, None) for token in ids]

        sampled = []
        for i, (completion, token) in enumerate(zip(completions, ids, strict=True)):
            logprobs = None
            if i not in faults and extra is not None and completion.num_logprobs is not None:
                logprobs = self._entry(extra, i, token, completion.num_logprobs)
            sampled.append(Sampled(token, faults.get(i), logprobs))
        return sampled

    def score_prompt(self, request: Request, sequence: TokenSequence, logits: FloatArray) -> None:
        """Takes what logits [N, V] of the positions from `sequence.logits_from` on say of the prompt."""
        wanted = request.completions[0].params.prompt_logprobs
        first = sequence.logits_from
        targets = sequence.tokens[first + 1 : sequence.num_prompt_tokens][: len(logits)]
        sequence.logits_from += len(logits)
        if request.prompt_logprobs is None or wanted is None or not len(targets):
            return
        status, extra = self._native.score(logits[: len(targets)], targets, wanted)
        if status.any():
            request.prompt_fault = _FAULTS[int(status.max())]
        for i, token in enumerate(targets.tolist()):
            request.prompt_logprobs.append(None if status[i] else self._entry(extra, i, token, wanted))

    def _entry(self, extra: _Extra, i: int, token: int, count: int) -> dict[int, Logprob]:
        """Row i of what the native sampler reports: the token's first, then the `count` likeliest."""
        logprob, rank, top_ids, top_logprobs = extra
        entry = {token: Logprob(float(logprob[i]), int(rank[i]), self._decode(token))}
        best = zip(top_ids[i, :count].tolist(), top_logprobs[i, :count].tolist(), strict=True)
        for place, (top, value) in enumerate(best, start=1):
            if top >= 0 and top != token:
                entry[top] = Logprob(value, place, self._decode(top))
        return entry

    def _fill_masks(self, completions: Sequence[Completion]) -> tuple[Int32Array | None, list[int]]:
        """The masks of the rows that have a grammar, and these rows."""
        masked = [i for i, completion in enumerate(completions) if completion.grammar is not None]
        if not masked:
            return None, masked
        grammars = [grammar for completion in completions if (grammar := completion.grammar) is not None]
        return self._masks.fill(grammars), masked
