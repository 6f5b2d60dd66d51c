"""The next token of each completion, from a step's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from llm_boost.engine.batch import FloatArray
from llm_boost.engine.outputs import Logprob
from llm_boost.engine.request import Completion

if TYPE_CHECKING:
    from llm_boost import _native

_FAULTS = {
    1: "the model gave NaN or infinite logits; try dtype float32, or check the checkpoint",
    2: "logit_bias and min_tokens leave no token to choose",
    3: "the sequence has a token outside the model's vocabulary",
}


class Sampled(NamedTuple):
    token: int
    fault: str | None  # then there is no token
    logprobs: dict[int, Logprob] | None  # when the request wants them: the token's first, then the likeliest


def sample(
    native: _native.Sampler,
    logits: FloatArray,
    completions: Sequence[Completion],
    decode: Callable[[int], str],
) -> list[Sampled]:
    """Samples logits [R, V] for R completions. `decode` gives a token's text, for logprobs."""
    tokens, status, extra = native.sample(
        logits, [c.row for c in completions], [c.sequence.tokens for c in completions]
    )
    ids: list[int] = tokens.tolist()
    if extra is None and not status.any():
        return [Sampled(token, None, None) for token in ids]

    sampled = []
    for i, (completion, token) in enumerate(zip(completions, ids, strict=True)):
        fault = _FAULTS.get(int(status[i]))
        logprobs = None
        if fault is None and extra is not None and completion.params.logprobs is not None:
            logprob, rank, top_ids, top_logprobs = extra
            logprobs = {token: Logprob(float(logprob[i]), int(rank[i]), decode(token))}
            best = zip(top_ids[i].tolist(), top_logprobs[i].tolist(), strict=True)
            for place, (top, value) in enumerate(list(best)[: completion.params.logprobs], start=1):
                if top >= 0 and top != token:
                    logprobs[top] = Logprob(value, place, decode(top))
        sampled.append(Sampled(token, fault, logprobs))
    return sampled
