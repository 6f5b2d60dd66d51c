"""A request's body, under limits: its size, the time it takes, its nesting; then JSON, then its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

import anyio
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from llm_boost.config.service_config import Limits
from llm_boost.service.faults import Fault, invalid

M = TypeVar("M", bound=BaseModel)


async def read_json(request: Request, limits: Limits) -> Any:
    """The body's JSON value; a Fault for one that is too large, too slow, too deep, or no JSON."""
    raw = await _read(request, limits)
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"The request body must be valid JSON: {error}") from None
    if _deeper_than(value, limits.max_json_depth):
        raise invalid(f"The request body is nested deeper than {limits.max_json_depth} levels.")
    return value


async def _read(request: Request, limits: Limits) -> bytes:
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limits.max_body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        with anyio.fail_after(limits.read_timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_body_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        raise Fault("slow", f"The request body did not arrive within {limits.read_timeout:g} s.") from None
    return bytes(body)


def _too_large(limits: Limits) -> Fault:
    return Fault(
        "too_large",
        f"Request body too large. Maximum allowed size is {limits.max_body_bytes / (1 << 20):g}MB.",
    )


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        level = [
            child
            for item in level
            if isinstance(item, (list, dict))
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (list, dict))
        ]
        if not level:
            return False
    return True


class Body(BaseModel):
    """A request: types are strict, except that an integer will do for a number; null is absent."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class Says:
    """The message of a field's own for a value out of range; `{}` stands for the value."""

    def __init__(self, message: str) -> None:
        self.message = message


_TYPES = {
    "bool_type": "boolean",
    "float_type": "float",
    "int_type": "integer",
    "int_from_float": "integer",
    "string_type": "string",
    "dict_type": "object",
    "model_type": "object",
    "model_attributes_type": "object",
    "list_type": "array",
}


def as_model(model: type[M], value: Any) -> M:
    """The request as its model; a Fault that names the field, in MindIE's words where it has some."""
    if not isinstance(value, dict):
        raise invalid("The request body must be a JSON object.")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
    name, says, is_field = _field(model, problem["loc"])
    if problem["type"] in _TYPES and (is_field or says is None):
        raise invalid(f"{name} must be {_TYPES[problem['type']]} type.", name)
    if problem["type"] == "missing":
        raise invalid(f"{name} is missing.", name)
    if says is not None:
        raise invalid(says.replace("{}", _shown(problem["input"])), name)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        raise invalid(message, name or None)
    raise invalid(f"{name}: got {_shown(problem['input'])}. {message}.", name)


def _field(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, str | None, bool]:
    """(its name, what it says of itself, whether the location ends there) of the field at a location.

    A location goes on, in pydantic's own words, into the members of a union: these are not named.
    """
    fields: Mapping[str, Any] = model.model_fields
    name, says, is_field = "", None, True
    for part in location:
        if isinstance(part, int):
            name, is_field = f"{name}[{part}]", False
            continue
        if part not in fields:
            return name, says, False
        name, is_field = f"{name}.{part}".lstrip("."), True
        marks = [*fields[part].metadata, *_marks(fields[part].annotation)]
        says = next((mark.message for mark in marks if isinstance(mark, Says)), None)
        inner = [mark for mark in marks if isinstance(mark, type) and issubclass(mark, BaseModel)]
        fields = inner[0].model_fields if inner else {}
    return name, says, is_field


def _marks(annotation: Any) -> Iterator[Any]:
    """The types and the metadata in an annotation, however deep: `Annotated[...] | None`, lists."""
    yield annotation
    yield from getattr(annotation, "__metadata__", ())
    for argument in get_args(annotation):
        if not isinstance(argument, Says):
            yield from _marks(argument)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
