"""The loop: schedule, run, sample, append, publish."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterable
from heapq import heappop, heappush
from typing import Any

import numpy as np

from llm_boost.engine.batch import FloatArray, ModelRunner
from llm_boost.engine.block_manager import BlockManager
from llm_boost.engine.build_batch import build_batch
from llm_boost.engine.drafts import Speculator
from llm_boost.engine.grammar import GrammarError
from llm_boost.engine.intake import EngineTokenizer, Intake
from llm_boost.engine.outputs import FinishReason, RequestOutput
from llm_boost.engine.prompts import Prompt
from llm_boost.engine.request import Completion, Request
from llm_boost.engine.sampler import Sampled, TokenSampler
from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.engine.scheduler import Chunk, Scheduler
from llm_boost.engine.scheduler_config import SchedulerConfig
from llm_boost.engine.sequence import Sequence
from llm_boost.engine.stats import EngineCounters, EngineStats
from llm_boost.errors import ConfigError, RequestError

MAX_SEED = 2**64 - 1


class Engine:
    """Runs many requests at once on one model. One thread submits, steps and aborts; any may `prepare`.

    Every request that is submitted gets exactly one finished RequestOutput, from `step` or from `abort`.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: EngineTokenizer,
        eos_token_ids: Collection[int],
        config: SchedulerConfig | None = None,
        *,
        speculator: Speculator | None = None,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        config = config or SchedulerConfig()
        check_seed(seed)
        self.runner = runner
        self.blocks = BlockManager(runner.num_blocks, runner.block_size, caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(self.blocks, config)
        self._speculator = speculator
        self._kept_waiting: Sequence | None = None  # the first that found no room in the latest step
        self._tokenizer = tokenizer
        self._sampler = TokenSampler(runner.vocab_size, threads, self._text_of)
        self._intake = Intake(runner, tokenizer, eos_token_ids, config, seed)
        self._requests: dict[str, Request] = {}
        self._by_number: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []  # a heap, with the requests' numbers
        self._counters = EngineCounters()

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, prompt: Prompt, params: SamplingParams, **options: Any) -> str:
        """Prepares a request, submits it, and returns its id."""
        request = self.prepare(prompt, params, **options)
        self.submit(request)
        return request.request_id

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        stream: bool = False,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Request:
        """The request that a prompt and its parameters make; RequestError for one that can never run.

        Args:
            stream: every step publishes the output so far; else only the end is published.
            priority: lower comes first, in waiting and in keeping its memory, as in vLLM; but one that has
                waited policies.PRIORITY_STEP_SECONDS comes before newer ones of the priority before.
            timeout: seconds from now until it ends, with the finish reason "timeout" and what there is.
        """
        return self._intake.request(
            prompt, params, request_id=request_id, stream=stream, priority=priority, timeout=timeout
        )

    def submit(self, request: Request) -> None:
        """Lets a prepared request take part in the steps that follow."""
        if request.request_id in self._requests:
            raise RequestError(
                f"request_id: got {request.request_id!r}, which is running; allowed one that is not"
            )
        self._requests[request.request_id] = self._by_number[request.number] = request
        for completion in request.completions:
            self.scheduler.add(completion.sequence)
        if request.deadline is not None:
            heappush(self._deadlines, (request.deadline, request.number))

    def step(self) -> list[RequestOutput]:
        """Computes one batch; the outputs of requests that end with it, and of streaming ones that grow."""
        start = time.monotonic()
        ended = self._end_overdue(start)
        self._speculate()
        began = time.monotonic()
        chunks = self.scheduler.schedule(start)
        self._kept_waiting = self.scheduler.waiting[0] if self.scheduler.waiting else None
        if not chunks:
            return ended
        last = [
            (self._completion(chunk.sequence.order), chunk.num_drafts) for chunk in chunks if chunk.is_last
        ]
        rows = [(completion, i) for completion, drafts in last for i in range(drafts + 1)]
        try:
            logits = self.runner.run(build_batch(chunks))
            logits = self._score_prompts(logits, chunks)
            histories = [completion.sequence.with_drafts(i) for completion, i in rows]
            samples = self._sampler.sample(logits, [completion for completion, _ in rows], histories)
        except Exception as error:  # this batch's completions end with it, the loop does not
            everyone = [self._completion(chunk.sequence.order) for chunk in chunks]
            self.blocks.forget()
            for completion in everyone:
                self._fail(completion, f"the model failed: {_one_line(error)}")
            return ended + self._publish(everyone)
        if self._speculator and all(chunk.sequence.is_decoding for chunk in chunks):
            self._speculator.times.measure(
                sum(chunk.num_tokens for chunk in chunks), time.monotonic() - began
            )
        self.scheduler.computed(chunks)
        generated = self._append_all(last, samples)
        self._counters.count(sum(chunk.num_tokens for chunk in chunks), generated, time.monotonic() - start)
        return ended + self._publish([completion for completion, _ in last])

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request; its finished output, or None when no such request is under way."""
        request = self._requests.get(request_id)
        return None if request is None else self._end(request, "abort")

    def stats(self) -> EngineStats:
        """How the engine is doing; may be asked from any thread."""
        return self._counters.stats(self.scheduler, self._speculator)

    def _end_overdue(self, now: float) -> list[RequestOutput]:
        ended = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request = self._by_number.get(heappop(self._deadlines)[1])
            if request is not None:
                ended.append(self._end(request, "timeout"))
        return ended

    def _end(self, request: Request, reason: FinishReason) -> RequestOutput:
        """Ends what still runs of a request; its finished output."""
        for completion in request.completions:
            if completion.finish_reason is None:
                completion.finish_reason = reason
                self.scheduler.finish(completion.sequence)
        return self._finished(request)

    def _completion(self, order: tuple[int, int]) -> Completion:
        number, index = order
        return self._by_number[number].completions[index]

    def _score_prompts(self, logits: FloatArray, chunks: list[Chunk]) -> FloatArray:
        """Keeps the log-probabilities of prompts that ask for them; the logits that give new tokens."""
        if all(chunk.sequence.is_scored for chunk in chunks):
            return logits
        ends = np.cumsum([chunk.num_logits for chunk in chunks])
        for chunk, end in zip(chunks, ends.tolist(), strict=True):
            if not chunk.sequence.is_scored:
                request = self._by_number[chunk.sequence.order[0]]
                self._sampler.score_prompt(request, chunk.sequence, logits[end - chunk.num_logits : end])
        last = [(chunk.num_drafts, end) for chunk, end in zip(chunks, ends, strict=True) if chunk.is_last]
        return logits[[row for drafts, end in last for row in range(end - 1 - drafts, end)]]

    def _text_of(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def _speculate(self) -> None:
        """Drafts for a step that only decodes, but for grammars, which see each token before the next."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        if self._speculator is None or not all(s.is_decoding for s in running):
            return
        if waiting and waiting[0] is not self._kept_waiting:  # it may be let in, with a prompt to compute
            return
        free = [s for s in running if s.num_generated and self._completion(s.order).grammar is None]
        try:
            self._speculator.propose(free, self.scheduler.config.max_num_batched_tokens - len(running))
        except Exception as error:  # no text needs it
            warnings.warn(f"speculation is off from now on: {_one_line(error)}", RuntimeWarning, stacklevel=1)
            self._speculator = None
            for sequence in running:
                sequence.num_drafts = 0

    def _append_all(self, last: list[tuple[Completion, int]], samples: list[Sampled]) -> int:
        """Appends what was sampled, after drafts as long as these are what was sampled; the number of tokens.

        So a text is what it would be without drafts, whatever is asked of it: each token is sampled from the
        same logits, after the same tokens, by the same random number.
        """
        start = generated = 0
        for completion, drafts in last:
            sequence = completion.sequence
            guessed = sequence.with_drafts(drafts)[sequence.num_tokens :].tolist()
            sequence.num_drafts = 0
            for i, sampled in enumerate(samples[start : start + drafts + 1]):
                self._append(completion, sampled)
                generated += 1
                if completion.finish_reason is not None or i == drafts or sampled.token != guessed[i]:
                    break
                sequence.num_computed += 1
            if self._speculator and drafts:
                self._speculator.num_drafted_tokens += drafts
                self._speculator.num_accepted_tokens += i
            start += drafts + 1
        return generated

    def _append(self, completion: Completion, sampled: Sampled) -> None:
        fault = sampled.fault or self._by_number[completion.sequence.order[0]].prompt_fault
        if fault is not None:
            self._fail(completion, fault)
            return
        try:
            completion.append(sampled.token, sampled.logprobs)
        except GrammarError as error:
            self._fail(completion, f"structured_outputs: {error}")
            return
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


def check_seed(seed: int) -> None:
    """ConfigError unless the seed is one."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed: got {seed!r}, allowed an integer from 0 to {MAX_SEED}")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
