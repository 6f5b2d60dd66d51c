"""A request under way: its completions, and what it shows of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from llm_boost._native import SamplingRow
from llm_boost.engine.grammar import Grammar
from llm_boost.engine.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.engine.sequence import Sequence
from llm_boost.engine.text_output import TextOutput


@dataclass(slots=True, eq=False)
class Completion:
    """One of a request's n completions."""

    sequence: Sequence
    text: TextOutput
    row: SamplingRow
    params: SamplingParams
    eos_token_ids: Collection[int]
    grammar: Grammar | None = None
    num_logprobs: int | None = None  # what the sampler is asked to report of each token
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def append(self, token: int, logprobs: dict[int, Logprob] | None) -> None:
        """Adds a token, and finishes if it is the last one; GrammarError if its grammar cannot take it."""
        self.sequence.append(token)
        if logprobs is not None:
            self.cumulative_logprob += logprobs[token].logprob
            if self.logprobs is not None:
                self.logprobs.append(logprobs)
        stop: int | str | None = None
        if token in self.eos_token_ids:
            self.finish_reason = "stop"
        elif token in (self.params.stop_token_ids or ()):
            self.finish_reason, stop = "stop", token
        if self.finish_reason is None or self.params.include_stop_str_in_output:
            stop_string = self.text.push(token)
            if self.finish_reason is None and stop_string is not None:
                self.finish_reason, stop = "stop", stop_string
        if self.grammar is not None and self.finish_reason is None:
            self._follow_grammar(self.grammar, token)
        if self.finish_reason is None and self.sequence.is_full:
            self.finish_reason = "length"
        if self.finish_reason and not isinstance(stop, str):
            self.text.finish()
        self.stop_reason = stop

    def _follow_grammar(self, grammar: Grammar, token: int) -> None:
        """Ends the text with the grammar, without waiting for the model to say so."""
        grammar.accept(token)
        if grammar.is_finished:
            self.finish_reason = "stop"

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.sequence.order[1],
            text=self.text.text,
            token_ids=self.sequence.tokens[self.sequence.num_prompt_tokens :].tolist(),
            cumulative_logprob=None if self.num_logprobs is None else self.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            delta=self.text.take_delta(),
        )


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, its parameters and its completions; finished when all of these are."""

    number: int
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    stream: bool  # publish each step, not the end alone
    metrics: RequestMetrics
    deadline: float | None = None  # on the monotonic clock
    completions: list[Completion] = field(default_factory=list)
    num_best: int | None = None  # of the completions, how many come back; None: all
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    prompt_fault: str | None = None  # why there are none
    error: str | None = None

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason for completion in self.completions)

    def count_tokens(self, now: float) -> None:
        """Brings the metrics up to date after a step that ended at `now`."""
        generated = sum(completion.sequence.num_generated for completion in self.completions)
        if generated > self.metrics.num_generated_tokens:
            self.metrics.first_token_time = self.metrics.first_token_time or now
            self.metrics.last_token_time = now
            self.metrics.num_generated_tokens = generated

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=self._outputs(),
            finished=self.finished,
            metrics=self.metrics,
            num_cached_tokens=self.completions[0].sequence.num_cached or 0,
            prompt_logprobs=self.prompt_logprobs,
            error=self.error,
        )

    def _outputs(self) -> list[CompletionOutput]:
        outputs = [completion.output() for completion in self.completions]
        if self.num_best is None:
            return outputs
        best = sorted(outputs, key=lambda output: output.cumulative_logprob or 0.0, reverse=True)
        for index, output in enumerate(best):
            output.index = index
        return best[: self.num_best]
