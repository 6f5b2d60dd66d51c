"""The loop: schedule, run, sample, append, publish."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from llm_boost._native import Sampler
from llm_boost.engine.batch import FloatArray, ModelRunner
from llm_boost.engine.block_manager import BlockManager
from llm_boost.engine.build_batch import build_batch
from llm_boost.engine.intake import EngineTokenizer, Intake
from llm_boost.engine.outputs import RequestOutput
from llm_boost.engine.prompts import Prompt
from llm_boost.engine.request import Completion, Request
from llm_boost.engine.sampler import Sampled, sample
from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.engine.scheduler import Scheduler
from llm_boost.errors import ConfigError, RequestError

DEFAULT_MAX_NUM_SEQS = 64
DEFAULT_MAX_NUM_BATCHED_TOKENS = 512
MAX_NUM_BATCHED_TOKENS = 1 << 20


class Engine:
    """Runs many requests at once on one model. Not thread-safe: one thread adds, steps and aborts.

    Every request that `add` accepts gets exactly one finished RequestOutput, from `step` or from `abort`.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: EngineTokenizer,
        eos_token_ids: Collection[int],
        *,
        max_num_seqs: int = DEFAULT_MAX_NUM_SEQS,
        max_num_batched_tokens: int = DEFAULT_MAX_NUM_BATCHED_TOKENS,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        self.check_limits(max_num_seqs, max_num_batched_tokens, seed)
        self.runner = runner
        self.blocks = BlockManager(runner.num_blocks, runner.block_size)
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        self._tokenizer = tokenizer
        self._sampler = Sampler(runner.vocab_size, threads)
        self._intake = Intake(runner, tokenizer, eos_token_ids, seed)
        self._requests: dict[str, Request] = {}
        self._by_number: dict[int, Request] = {}
        self._next_number = 0

    @staticmethod
    def check_limits(max_num_seqs: int, max_num_batched_tokens: int, seed: int) -> None:
        """ConfigError for a limit that no engine could keep."""
        limits = {
            "max_num_batched_tokens": (max_num_batched_tokens, 1, MAX_NUM_BATCHED_TOKENS),
            "max_num_seqs": (
                max_num_seqs,
                1,
                max_num_batched_tokens,
            ),  # each running sequence needs a token a step
            "seed": (seed, 0, 2**64 - 1),
        }
        for name, (value, low, high) in limits.items():
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{name}: got {value!r}, allowed an integer from {low} to {high}")

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None, stream: bool = False
    ) -> str:
        """Accepts a request and returns its id; RequestError for one that can never run.

        With `stream` every step publishes the output so far, else only the end is published.
        """
        number = self._next_number
        request_id = str(number) if request_id is None else request_id
        if request_id in self._requests:
            raise RequestError(f"request_id: got {request_id!r}, which is running; allowed one that is not")
        request = self._intake.request(number, request_id, prompt, params, stream=stream)
        self._next_number += 1
        self._requests[request_id] = self._by_number[number] = request
        for completion in request.completions:
            self.scheduler.add(completion.sequence)
        return request_id

    def step(self) -> list[RequestOutput]:
        """Computes one batch; the outputs of requests that end with it, and of streaming ones that grow."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        last = [self._completion(chunk.sequence.order) for chunk in chunks if chunk.is_last]
        try:
            logits = self.runner.run(build_batch(chunks))
            samples = self._sample(logits, last)
        except Exception as error:  # this batch's completions end with it, the loop does not
            everyone = [self._completion(chunk.sequence.order) for chunk in chunks]
            for completion in everyone:
                self._fail(completion, f"the model failed: {_one_line(error)}")
            return self._publish(everyone)
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
        for completion, sampled in zip(last, samples, strict=True):
            self._append(completion, sampled)
        return self._publish(last)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request; its finished output, or None when no such request is under way."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for completion in request.completions:
            if completion.finish_reason is None:
                completion.finish_reason = "abort"
                self.scheduler.finish(completion.sequence)
        return self._finished(request)

    def _completion(self, order: tuple[int, int]) -> Completion:
        number, index = order
        return self._by_number[number].completions[index]

    def _sample(self, logits: FloatArray, completions: list[Completion]) -> list[Sampled]:
        def decode(token: int) -> str:
            return self._tokenizer.decode([token], skip_special_tokens=False)

        return sample(self._sampler, logits, completions, decode)

    def _append(self, completion: Completion, sampled: Sampled) -> None:
        if sampled.fault is not None:
            self._fail(completion, sampled.fault)
            return
        try:
            completion.append(sampled.token, sampled.logprobs)
        except Exception as error:  # a detokeniser that cannot cope with the text fails its own request only
            self._fail(completion, f"detokenising failed: {_one_line(error)}")
            return
        if completion.finish_reason is not None:
            self.scheduler.finish(completion.sequence)

    def _fail(self, completion: Completion, error: str) -> None:
        completion.finish_reason = "error"
        self._by_number[completion.sequence.order[0]].error = error
        self.scheduler.finish(completion.sequence)

    def _publish(self, changed: Iterable[Completion]) -> list[RequestOutput]:
        now = time.monotonic()
        outputs = []
        requests = dict.fromkeys(self._by_number[completion.sequence.order[0]] for completion in changed)
        for request in requests:
            request.count_tokens(now)
            if request.finished:
                outputs.append(self._finished(request))
            elif request.stream:
                outputs.append(request.output())
        return outputs

    def _finished(self, request: Request) -> RequestOutput:
        request.metrics.finished_time = time.monotonic()
        del self._requests[request.request_id], self._by_number[request.number]
        return request.output()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
