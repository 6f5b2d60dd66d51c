"""From a prompt and its parameters to a request that can run, or a RequestError that says why it cannot."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Hashable, Iterable
from typing import Protocol

import numpy as np

from llm_boost._native import SamplingRow
from llm_boost.engine.batch import Int32Array, ModelRunner
from llm_boost.engine.grammar import GrammarCompiler, Vocabulary
from llm_boost.engine.outputs import RequestMetrics
from llm_boost.engine.prompts import Encoder, Prompt, cache_salt, tokenize
from llm_boost.engine.request import Completion, Request
from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.engine.scheduler_config import SchedulerConfig
from llm_boost.engine.sequence import Sequence
from llm_boost.engine.text_output import NoText, TextOutput, TextStream
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
        ids = self._truncate(ids, params)
        room = self._room_after(len(ids))
        self._check_vocabulary(params)
        bad_words = self._bad_words(params)
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
                text=TextOutput(self._text_stream(ids, params), params),
                row=self._sampling_row(
                    params, eos_token_ids, bad_words, prompt_len=len(ids), seed=seed, stream=index
                ),
                params=params,
                eos_token_ids=eos_token_ids,
                grammar=None
                if grammar is None
                else grammar.copy(params.stop_token_ids or (), params.ignore_eos),
                num_logprobs=_num_logprobs(params),
                logprobs=None if params.logprobs is None else [],
            )
            for index in range(params.num_completions)
        ]
        if params.prompt_logprobs is not None:
            completions[0].sequence.logits_from = 0
        is_ranked = params.num_completions > params.n
        metrics = RequestMetrics(arrival, num_prompt_tokens=len(ids))
        return Request(
            number=number,
            request_id=str(number) if request_id is None else request_id,
            prompt=text,
            prompt_token_ids=ids.tolist(),
            stream=stream and not is_ranked,  # which are the best is known at the end
            metrics=metrics,
            deadline=None if timeout is None else arrival + timeout,
            completions=completions,
            num_best=params.n if is_ranked else None,
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )

    def _text_stream(self, prompt: Int32Array, params: SamplingParams) -> TextStream:
        if not params.detokenize:
            return NoText()
        return self._tokenizer.stream(params.skip_special_tokens, after=prompt[-_CONTEXT_TOKENS:].tolist())

    def _truncate(self, ids: Int32Array, params: SamplingParams) -> Int32Array:
        """The last tokens of a prompt, as many as were asked for."""
        keep = params.truncate_prompt_tokens
        if keep is None:
            return ids
        if keep == -1:
            limit = min(self._runner.max_model_len, self._runner.num_blocks * self._runner.block_size)
            keep = max(limit - (params.max_tokens or 1), 1)
        return ids[-keep:]

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
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token in getattr(params, name) or ():
                if token > last:
                    raise RequestError(f"{name}: got token id {token}, allowed 0..{last}")

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """The tokens of each bad word, as it is and, where that makes it another word, after a space."""
        found = []
        for word in params.bad_words or ():
            plain = self._tokenizer.encode(word.lstrip() or word, add_special_tokens=False)
            spaced = self._tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
            if not plain:
                raise RequestError(f"bad_words: got {word!r}, which has no tokens")
            found.append(plain)
            if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
                found.append(spaced)
        return found

    def _seed_of(self, number: int, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed % 2**64
        return int(np.random.SeedSequence([self._seed, number]).generate_state(1, np.uint64)[0])

    def _sampling_row(
        self,
        params: SamplingParams,
        eos_token_ids: Collection[int],
        bad_words: list[list[int]],
        *,
        prompt_len: int,
        seed: int,
        stream: int,
    ) -> SamplingRow:
        num_logprobs = _num_logprobs(params)
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
            num_logprobs=-1 if num_logprobs is None else num_logprobs,
            stop_ids=sorted({*(params.stop_token_ids or ()), *eos_token_ids}),
            logit_bias=sorted((params.logit_bias or {}).items()),
            typical_p=params.typical_p,
            allowed=_as_mask(params.allowed_token_ids, self._runner.vocab_size),
            bad_words=bad_words,
        )


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


def _num_logprobs(params: SamplingParams) -> int | None:
    """How many the sampler reports: the best of several completions are known by theirs."""
    if params.logprobs is None and params.num_completions > params.n:
        return 0
    return params.logprobs


def _as_mask(token_ids: Collection[int] | None, vocab_size: int) -> list[int]:
    """A bit for each token, in words of 32; empty for None."""
    if token_ids is None:
        return []
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(token_ids)] = 1
    words: list[int] = np.packbits(bits, bitorder="little").view(np.uint32).tolist()
    return words
