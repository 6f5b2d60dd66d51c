"""Values read out of a file, checked before they are believed: JSON objects and their typed fields."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_boost.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20  # the largest index files of published models are a few MB


def shown(value: object, limit: int = 80) -> str:
    """`value` as it may stand in a one-line message, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`; a key given twice, at any depth, is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{where}: the key {shown(twice)} stands there twice")
        return table

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, endless digits or nesting
        raise CheckpointError(f"{where}: not valid JSON ({shown(str(error))})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: must be a JSON object, is {shown(value)}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MB, that is no configuration file")
    return parse_json_object(data, str(path))


class Fields:
    """Typed access to a mapping; an error names the file, the field, its value and what is allowed."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source = source

    def has(self, key: str) -> bool:
        """Whether `key` is there with a value other than null."""
        return self._values.get(key) is not None

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def error(self, key: str, allowed: str) -> CheckpointError:
        if key not in self._values:
            return CheckpointError(f"{self.source}: {key} is missing; it must be {allowed}")
        return CheckpointError(f"{self.source}: {key} is {shown(self._values[key])}; it must be {allowed}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]; an absent or null one is `default`, or an error without."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]; an absent or null one is `default`, or an error without."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        number = (
            float(value)
            if type(value) is float or (type(value) is int and abs(value) < 1 << 53)
            else math.nan
        )
        if not low <= number <= high:
            raise self.error(key, f"a number from {low:g} to {high:g}")
        return number

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._values.get(key)
        if value is None:
            return default
        if type(value) is not str:
            raise self.error(key, "a string")
        return value
