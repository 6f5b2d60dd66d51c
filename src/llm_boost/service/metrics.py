"""Prometheus metrics: MindIE's names, and vLLM's under their own prefix, from the same observations."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llm_boost.backends import Backend
from llm_boost.engine.outputs import RequestOutput
from llm_boost.service.admission import Admission

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_END_TO_END = (1, 2.5, 5, 10, 15, 20, 30, 40, 50, 60)
_TOKENS = (10, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 16_000, 20_000, 32_000, 50_000, 64_000, 128_000)
_WINDOW_SECONDS = 10.0  # of the average throughputs
_RECENT = 1000  # requests in the averages of metrics-json, as DYNAMIC_AVERAGE_WINDOW_SIZE


@dataclass
class Record:
    """A request as the metrics see it; `output` is the latest one."""

    start: float
    prompt_tokens: int
    output: RequestOutput | None = field(default=None)


class Metrics:
    """Of one model, which is the label of each."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._received = self._counter("request_received", "Requests received")
        self._success = self._counter("request_success", "Requests that ended well", "vllm:request_success")
        self._failed = self._counter("request_failed", "Requests that ended with an error")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens", "vllm:prompt_tokens")
        self._new_tokens = self._counter("generation_tokens", "Tokens made", "vllm:generation_tokens")
        self._first = self._histogram(
            "time_to_first_token_seconds", "From arrival to first token", _FIRST_TOKEN
        )
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "Between two tokens, a request's mean", _PER_TOKEN
        )
        self._latency = self._histogram("e2e_request_latency_seconds", "From arrival to end", _END_TO_END)
        self._prompt_size = self._histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._new_size = self._histogram("request_generation_tokens", "Tokens made for a request", _TOKENS)
        self._recent_first: deque[float] = deque(maxlen=_RECENT)  # seconds to the first token
        self._recent_per_token: deque[float] = deque(maxlen=_RECENT)

    def watch(self, backend: Backend, admission: Admission) -> None:
        """Adds the gauges, read from the engine whenever somebody asks."""
        self._registry.register(_Gauges(self, backend, admission, self._model_name))

    @contextmanager
    def request(self, start: float, prompt_tokens: int) -> Iterator[Record]:
        """Counts a request from its arrival (monotonic seconds) to its end, however it ends."""
        self._received.inc()
        record = Record(start, prompt_tokens)
        try:
            yield record
        finally:
            self._end(record)

    def _end(self, record: Record) -> None:
        output = record.output
        if output is not None and output.finished and output.error is None:
            self._success.inc()
        else:
            self._failed.inc()
        if output is None:
            return
        metrics = output.metrics
        self._prompt_tokens.inc(record.prompt_tokens)
        self._new_tokens.inc(metrics.num_generated_tokens)
        self._prompt_size.observe(record.prompt_tokens)
        self._new_size.observe(metrics.num_generated_tokens)
        self._latency.observe(time.monotonic() - record.start)
        if metrics.first_token_time is not None:
            seconds = metrics.first_token_time - record.start
            self._first.observe(seconds)
            self._recent_first.append(seconds)
        if metrics.decode_tokens_per_second is not None:
            seconds = len(output.outputs) / metrics.decode_tokens_per_second
            self._per_token.observe(seconds)
            self._recent_per_token.append(seconds)

    @property
    def mean_first_token(self) -> float:
        """Seconds, of the last requests."""
        return sum(self._recent_first) / max(len(self._recent_first), 1)

    @property
    def mean_per_token(self) -> float:
        return sum(self._recent_per_token) / max(len(self._recent_per_token), 1)

    @property
    def failed_share(self) -> float:
        received = self._received.value
        return self._failed.value / received if received else 0.0

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _counter(self, name: str, help_: str, *others: str) -> _Counters:
        return _Counters(
            [Counter(n, help_, ["model_name"], registry=self._registry) for n in (name, *others)],
            self._model_name,
        )

    def _histogram(self, name: str, help_: str, buckets: Iterable[float]) -> _Histograms:
        names = (name, f"vllm:{name}")
        made = [
            Histogram(n, help_, ["model_name"], registry=self._registry, buckets=tuple(buckets))
            for n in names
        ]
        return _Histograms(made, self._model_name)


class _Counters:
    """One count under several names."""

    def __init__(self, counters: list[Counter], model_name: str) -> None:
        self._counters = [counter.labels(model_name) for counter in counters]
        self.value = 0

    def inc(self, amount: int = 1) -> None:
        self.value += amount
        for counter in self._counters:
            counter.inc(amount)


class _Histograms:
    """One distribution under several names."""

    def __init__(self, histograms: list[Histogram], model_name: str) -> None:
        self._histograms = [histogram.labels(model_name) for histogram in histograms]

    def observe(self, value: float) -> None:
        for histogram in self._histograms:
            histogram.observe(value)


class _Gauges(Collector):
    """The engine's figures of the moment."""

    def __init__(self, metrics: Metrics, backend: Backend, admission: Admission, model_name: str) -> None:
        self._metrics, self._backend, self._admission = metrics, backend, admission
        self._model_name = model_name
        self._samples: deque[tuple[float, int, int]] = deque()  # (time, computed, generated)

    def collect(self) -> Iterable[Metric]:
        stats = self._backend.stats()
        waiting = stats.num_waiting + self._admission.queued
        used = stats.num_used_blocks / max(stats.num_blocks, 1)
        computed, generated = self._rates(stats.num_computed_tokens, stats.num_generated_tokens)
        hit_rate = stats.num_hit_tokens / max(stats.num_queried_tokens, 1)
        gauges = {
            "num_requests_running": ("Sequences that run", stats.num_running),
            "num_requests_waiting": ("Requests that wait", waiting),
            "num_requests_swapped": ("Always 0: preempted sequences are computed again", 0),
            "avg_prompt_throughput_toks_per_s": ("Prompt tokens a second, lately", computed),
            "avg_generation_throughput_toks_per_s": ("Tokens made a second, lately", generated),
            "failed_request_perc": ("Share of requests that failed, 1 = 100%", self._metrics.failed_share),
            "npu_cache_usage_perc": ("Share of the KV cache in use, 1 = 100%", used),
            "cpu_cache_usage_perc": ("Always 0: nothing is swapped out", 0),
            "npu_prefix_cache_hit_rate": ("Share of prompt tokens found in the cache, 1 = 100%", hit_rate),
            "all_radix_match_num": ("Prompt tokens looked for in the cache", stats.num_queried_tokens),
            "npu_radix_match_hit_num": ("Prompt tokens found in the cache", stats.num_hit_tokens),
            "vllm:num_requests_running": ("Sequences that run", stats.num_running),
            "vllm:num_requests_waiting": ("Requests that wait", waiting),
            "vllm:kv_cache_usage_perc": ("Share of the KV cache in use, 1 = 100%", used),
        }
        for name, (help_, value) in gauges.items():
            family = GaugeMetricFamily(name, help_, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
        for name in ("num_preemptions", "vllm:num_preemptions"):
            counter = CounterMetricFamily(
                name, "Sequences that gave their memory back", labels=["model_name"]
            )
            counter.add_metric([self._model_name], stats.num_preemptions)
            yield counter

    def _rates(self, computed: int, generated: int) -> tuple[float, float]:
        """Prompt and output tokens a second since the oldest sample of the last seconds."""
        now = time.monotonic()
        self._samples.append((now, computed, generated))
        while len(self._samples) > 2 and self._samples[1][0] < now - _WINDOW_SECONDS:
            self._samples.popleft()
        then, computed_then, generated_then = self._samples[0]
        seconds = max(now - then, 1e-3)
        made = generated - generated_then
        return max(computed - computed_then - made, 0) / seconds, made / seconds
