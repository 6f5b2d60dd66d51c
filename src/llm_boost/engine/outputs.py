"""What a request gives back, in vLLM's shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


@dataclass(slots=True)
class Logprob:
    """Log-probability of a token under the model's own distribution (before any sampling rule)."""

    logprob: float
    rank: int  # 1 is the likeliest
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt: all of it so far, or all of it."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None  # None unless logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None = None  # None while it runs
    stop_reason: int | str | None = (
        None  # the stop token id or string that ended it; None for end-of-sequence
    )
    delta: str = ""  # what `text` has gained since the last output of this request

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request in seconds, on the monotonic clock."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0  # of all completions

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first, over the time since the first; None for fewer than two tokens."""
        if self.first_token_time is None or self.last_token_time is None:
            return None
        seconds = self.last_token_time - self.first_token_time
        return (self.num_generated_tokens - 1) / seconds if seconds > 0 else None


@dataclass(slots=True)
class RequestOutput:
    """A request's completions; the last output of a request is `finished`, and no other."""

    request_id: str
    prompt: str | None  # None when the request came as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0  # of the prompt, those that were not computed: the prefix cache had them
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # of the first token None, as in vLLM
    error: str | None = field(default=None)  # why a completion has the finish reason "error"
