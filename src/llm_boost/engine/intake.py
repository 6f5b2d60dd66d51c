"""From a prompt and its parameters to a request that can run, or a RequestError that says why it cannot."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Hashable, Iterable
from typing import Protocol

import numpy as np

from llm_boost._native import SamplingRow
from llm_boost.engine.batch import ModelRunner
from llm_boost.engine.grammar import GrammarCompiler, Vocabulary
from llm_boost.engine.outputs import RequestMetrics
from llm_boost.engine.prompts import Encoder, Prompt, cache_salt, tokenize
from llm_boost.engine.request import Completion, Request
from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.engine.scheduler_config import SchedulerConfig
from llm_boost.engine.sequence import Sequence
from llm_boost.engine.text_output import TextOutput, TextStream
from llm_boost.errors import RequestError

_CONTEXT_TOKENS = 8  # of the prompt, enough to tell the detokeniser that text came before

MAX_PRIORITY = 2**31 - 1
MAX_TIMEOUT_SECONDS = 1e6


class EngineTokenizer(Encoder, Vocabulary, Protocol):
    """What the engine needs of a tokenizer."""

    def stream(self, skip_special_tokens: bool = True, *, after: Iterable[int] = ()) -> TextStream: ...

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str: ...


class Intake:
    """Checks what is asked against the model's limits and makes the request. Safe to use from any thread."""

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: EngineTokenizer,
        eos_token_ids: Collection[int],
        config: SchedulerConfig,
        seed: int,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._grammars = GrammarCompiler(tokenizer, runner.vocab_size, self._eos_token_ids)
        self._config = config
        self._seed = seed
        self._numbers = itertools.count()

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        stream: bool = False,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Request:
        """See `Engine.prepare`."""
        arrival = time.monotonic()
        _check_priority(priority)
        _check_timeout(timeout)
        text, ids = tokenize(prompt, self._tokenizer, self._runner.vocab_size)
        room = self._room_after(len(ids))
        self._check_vocabulary(params)
        rule = params.structured_outputs
        grammar = None if rule is None else self._grammars.compile(rule)
        number = next(self._numbers)
        salt: tuple[Hashable, ...] = (cache_salt(prompt), self._runner.position_salt(len(ids)))
        if not self._config.enable_prefix_caching:
            salt = (*salt, number)  # shared by the request's own completions alone
        limits = (room, params.max_tokens, self._config.max_iter_times)
        max_tokens = min(limit for limit in limits if limit is not None)
        max_blocks = -(-(len(ids) + max_tokens) // self._runner.block_size)
        eos_token_ids = frozenset[int]() if params.ignore_eos else self._eos_token_ids
        seed = self._seed_of(number, params)
        completions = [
            Completion(
                sequence=Sequence(
                    (number, index),
                    ids,
                    max_tokens,
                    max_blocks,
                    arrival=arrival,
                    priority=priority,
                    salt=salt,
                ),
                text=TextOutput(
                    self._tokenizer.stream(params.skip_special_tokens, after=ids[-_CONTEXT_TOKENS:].tolist()),
                    params,
                ),
                row=_sampling_row(params, eos_token_ids, prompt_len=len(ids), seed=seed, stream=index),
                params=params,
                eos_token_ids=eos_token_ids,
                grammar=None
                if grammar is None
                else grammar.copy(params.stop_token_ids or (), params.ignore_eos),
                logprobs=None if params.logprobs is None else [],
            )
            for index in range(params.n)
        ]
        metrics = RequestMetrics(arrival, num_prompt_tokens=len(ids))
        return Request(
            number=number,
            request_id=str(number) if request_id is None else request_id,
            prompt=text,
            prompt_token_ids=ids.tolist(),
            stream=stream,
            metrics=metrics,
            deadline=None if timeout is None else arrival + timeout,
            completions=completions,
        )

    def _room_after(self, num_prompt_tokens: int) -> int:
        """How many tokens may follow a prompt."""
        model = self._runner.max_model_len
        cache = self._runner.num_blocks * self._runner.block_size
        if num_prompt_tokens >= model:
            raise RequestError(
                f"prompt: got {num_prompt_tokens} tokens, allowed at most {model - 1}: "
                f"seq_length / max_model_len is {model}, prompt and output together; "
                "shorten the prompt or raise the length"
            )
        if num_prompt_tokens >= cache:
            raise RequestError(
                f"prompt: got {num_prompt_tokens} tokens, allowed at most {cache - 1}: the KV cache holds "
                f"{cache} ({self._runner.num_blocks} blocks of {self._runner.block_size}); raise num_blocks"
            )
        return min(model, cache) - num_prompt_tokens

    def _check_vocabulary(self, params: SamplingParams) -> None:
        last = self._runner.vocab_size - 1
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token in ids or ():
                if token > last:
                    raise RequestError(f"{name}: got token id {token}, allowed 0..{last}")

    def _seed_of(self, number: int, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed % 2**64
        return int(np.random.SeedSequence([self._seed, number]).generate_state(1, np.uint64)[0])


def _check_priority(priority: int) -> None:
    allowed = f"an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}"
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
        raise RequestError(f"priority: got {priority!r}, allowed {allowed}; lower comes first")


def _check_timeout(timeout: float | None) -> None:
    if timeout is None:
        return
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not number or not 0 < timeout <= MAX_TIMEOUT_SECONDS:
        raise RequestError(
            f"timeout: got {timeout!r}, allowed seconds above 0 and at most {MAX_TIMEOUT_SECONDS:g}"
        )


def _sampling_row(
    params: SamplingParams, eos_token_ids: Collection[int], *, prompt_len: int, seed: int, stream: int
) -> SamplingRow:
    return SamplingRow(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=seed,
        stream=stream,
        prompt_len=prompt_len,
        min_tokens=params.min_tokens,
        num_logprobs=-1 if params.logprobs is None else params.logprobs,
        stop_ids=sorted({*(params.stop_token_ids or ()), *eos_token_ids}),
        logit_bias=sorted((params.logit_bias or {}).items()),
    )
