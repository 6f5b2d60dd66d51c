"""What can go wrong with a request, and how each API family says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from llm_boost.errors import LLMBoostError

Kind = Literal[
    "invalid",  # the request is at fault
    "too_long",  # the prompt does not fit the model
    "not_found",
    "too_large",  # the body
    "slow",  # the body did not arrive in time
    "unauthorized",
    "forbidden",  # a web page of another site asks
    "overloaded",  # try again later
    "unavailable",  # the service is loading, draining or stopped
    "failed",  # the engine failed, or a time limit was reached
]


class Fault(LLMBoostError):
    """Ends a request with an error that its client is told of.

    `param` names the field at fault, `retry_after` the seconds after which another try makes sense.
    """

    def __init__(
        self, kind: Kind, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.param = param
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return {**headers, "www-authenticate": "Bearer"} if self.kind == "unauthorized" else headers


def invalid(message: str, param: str | None = None) -> Fault:
    return Fault("invalid", message, param=param)


class ErrorBody(NamedTuple):
    status: int
    body: dict[str, Any]


Shape = Callable[[Fault], ErrorBody]

_MINDIE: Mapping[Kind, tuple[int, str]] = {
    "invalid": (422, "Input Validation Error"),
    "too_long": (424, "Generation Error"),
    "not_found": (404, "NotFoundError"),
    "slow": (408, "Request Timeout"),
    "unauthorized": (401, "Unauthorized"),
    "forbidden": (403, "Forbidden"),
    "overloaded": (429, "Service Overloaded"),
    "unavailable": (503, "Service Unavailable"),
    "failed": (500, "Incomplete Generation"),
}
_TGI: Mapping[Kind, tuple[int, str]] = {
    "invalid": (422, "validation"),
    "too_long": (422, "validation"),
    "not_found": (404, "not_found"),
    "too_large": (413, "validation"),
    "slow": (408, "validation"),
    "unauthorized": (401, "unauthorized"),
    "forbidden": (403, "forbidden"),
    "overloaded": (429, "overloaded"),
    "unavailable": (503, "healthcheck"),
    "failed": (500, "incomplete_generation"),
}
_OPENAI: Mapping[Kind, tuple[int, str, str | None]] = {
    "invalid": (400, "invalid_request_error", None),
    "too_long": (400, "invalid_request_error", "context_length_exceeded"),
    "not_found": (404, "invalid_request_error", "model_not_found"),
    "too_large": (413, "invalid_request_error", None),
    "slow": (408, "invalid_request_error", None),
    "unauthorized": (401, "invalid_request_error", "invalid_api_key"),
    "forbidden": (403, "invalid_request_error", None),
    "overloaded": (429, "rate_limit_error", "rate_limit_exceeded"),
    "unavailable": (503, "server_error", None),
    "failed": (500, "server_error", None),
}


def mindie_shape(fault: Fault) -> ErrorBody:
    """`{"error", "error_type"}`; KServe's clients read the first of them too."""
    if fault.kind == "too_large":
        return ErrorBody(413, {"message": str(fault)})
    status, kind = _MINDIE[fault.kind]
    return ErrorBody(status, {"error": str(fault), "error_type": kind})


def tgi_shape(fault: Fault) -> ErrorBody:
    """As text-generation-inference; its clients look for the prefix and the types."""
    status, kind = _TGI[fault.kind]
    prefix = "Input validation error: " if kind == "validation" else ""
    message = "Model is overloaded" if fault.kind == "overloaded" else str(fault)
    return ErrorBody(
        status, {"error": prefix + message.removeprefix("Input validation error: "), "error_type": kind}
    )


def openai_shape(fault: Fault) -> ErrorBody:
    status, kind, code = _OPENAI[fault.kind]
    return ErrorBody(
        status, {"error": {"message": str(fault), "type": kind, "param": fault.param, "code": code}}
    )
