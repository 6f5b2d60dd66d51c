"""OpenTelemetry traces (`pip install "llm-boost[otel]"`): a span a request, under the caller's own trace."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from llm_boost.engine.outputs import RequestOutput
from llm_boost.errors import ConfigError


class Tracing:
    """Spans in OpenTelemetry's words for generative AI; nothing at all unless it was given a provider.

    Prompts and answers are not in them.
    """

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider
        if provider is not None:
            self._tracer = provider.get_tracer("llm_boost")

    @contextlib.contextmanager
    def request(self, name: str, headers: Mapping[str, str], request_id: str) -> Iterator[None]:
        """Around the handling of one HTTP request; `traceparent` in its headers is the parent."""
        if self._provider is None:
            yield
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(headers)
        with self._tracer.start_as_current_span(name, context=parent, kind=SpanKind.SERVER) as span:
            span.set_attribute("gen_ai.request.id", request_id)
            yield

    def generation(self, model: str, start: float, prompt_tokens: int, output: RequestOutput | None) -> None:
        """A span of a generation that has just ended; `start` in monotonic seconds."""
        if self._provider is None:
            return
        from opentelemetry.trace import Status, StatusCode

        now = time.monotonic()
        ended = time.time_ns()
        span = self._tracer.start_span("generate", start_time=ended - int(1e9 * (now - start)))
        span.set_attribute("gen_ai.request.model", model)
        span.set_attribute("gen_ai.usage.prompt_tokens", prompt_tokens)
        if output is None or not output.finished or output.error is not None:
            span.set_status(Status(StatusCode.ERROR, (output and output.error) or "ended early"))
        if output is not None:
            span.set_attribute("gen_ai.usage.completion_tokens", output.metrics.num_generated_tokens)
            reasons = [str(completion.finish_reason) for completion in output.outputs]
            span.set_attribute("gen_ai.response.finish_reasons", reasons)
            if output.metrics.first_token_time is not None:
                first = output.metrics.first_token_time - start
                span.set_attribute("gen_ai.latency.time_to_first_token", first)
        span.end(end_time=ended)

    def close(self) -> None:
        """Sends what has not been sent."""
        if self._provider is not None:
            self._provider.shutdown()


def tracing_to(endpoint: str | None) -> Tracing:
    """Traces sent to a collector (OTLP over HTTP), such as http://127.0.0.1:4318; None: no traces.

    Raises:
        ConfigError: the extra is not installed.
    """
    if endpoint is None:
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError('--otlp_endpoint: needs OpenTelemetry: pip install "llm-boost[otel]"') from None
    provider = TracerProvider(resource=Resource.create({"service.name": "llm-boost"}))
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)
