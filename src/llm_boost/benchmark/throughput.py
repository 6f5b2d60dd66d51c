"""Many requests through the whole engine at once: scheduler, steps, sampler, detokeniser."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from llm_boost.benchmark.workload import Job
from llm_boost.engine.engine import Engine
from llm_boost.engine.outputs import RequestMetrics
from llm_boost.errors import EngineError

Progress = Callable[[int, int], None]
WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Spread:
    """Of one time over all requests, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        """None where no request has this time."""
        if not seconds:
            return None
        p50, p90, p99 = (float(p) for p in np.percentile(seconds, [50, 90, 99]))
        return cls(float(np.mean(seconds)), p50, p90, p99)


@dataclass(frozen=True)
class Throughput:
    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    time_to_first_token: Spread | None  # from the start of the run: waiting is part of it
    time_per_output_token: Spread | None  # after the first; None where every output is one token
    latency: Spread | None  # from the start of the run to a request's end
    preemptions: int
    steps: int

    @property
    def rates(self) -> dict[str, float]:
        """Of the whole run, a second."""
        return {
            "requests_per_second": self.requests / self.seconds,
            "prompt_tokens_per_second": self.prompt_tokens / self.seconds,
            "output_tokens_per_second": self.output_tokens / self.seconds,
            "total_tokens_per_second": (self.prompt_tokens + self.output_tokens) / self.seconds,
        }

    def report(self) -> dict[str, object]:
        return asdict(self) | self.rates


def measure_throughput(engine: Engine, jobs: Sequence[Job], progress: Progress | None = None) -> Throughput:
    """All jobs at once, on an engine with nothing else to do, after a short one to warm up.

    Raises:
        RequestError: a job that the engine cannot run. EngineError: the model failed.
    """
    warm_up = jobs[0].prompt_token_ids[: -WARM_UP_TOKENS - 1 : -1]  # backwards: no beginning to find again
    _run(engine, [Job(warm_up, jobs[0].params)], None)
    before = engine.stats()
    start = time.monotonic()
    metrics = _run(engine, jobs, progress)
    seconds = time.monotonic() - start
    after = engine.stats()
    first = [m.first_token_time for m in metrics if m.first_token_time is not None]
    return Throughput(
        requests=len(jobs),
        prompt_tokens=sum(m.num_prompt_tokens for m in metrics),
        output_tokens=sum(m.num_generated_tokens for m in metrics),
        seconds=seconds,
        time_to_first_token=Spread.of([moment - start for moment in first]),
        time_per_output_token=Spread.of([1 / rate for m in metrics if (rate := m.decode_tokens_per_second)]),
        latency=Spread.of([m.finished_time - start for m in metrics if m.finished_time is not None]),
        preemptions=after.num_preemptions - before.num_preemptions,
        steps=after.num_steps - before.num_steps,
    )


def _run(engine: Engine, jobs: Sequence[Job], progress: Progress | None) -> list[RequestMetrics]:
    for job in jobs:
        engine.add({"prompt_token_ids": job.prompt_token_ids}, job.params)
    total = sum(job.params.max_tokens or 1 for job in jobs)
    generated = engine.stats().num_generated_tokens
    metrics: list[RequestMetrics] = []
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise EngineError(output.error)
            metrics.append(output.metrics)
        if progress is not None:
            progress(engine.stats().num_generated_tokens - generated, total)
    return metrics
