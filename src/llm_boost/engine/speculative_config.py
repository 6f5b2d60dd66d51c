"""What may be guessed ahead, in the shape of vLLM's `speculative_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from llm_boost.errors import ConfigError

Method = Literal["ngram", "draft_model"]
MAX_SPECULATIVE_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Tokens are guessed, and the model verifies all of a sequence's guesses in one pass.

    Args:
        method: "ngram" continues the text as it went on where its last tokens stood before, which pays where
            a text repeats its prompt; "draft_model" asks a smaller model. By default what `model` implies.
        model: the smaller model, of the same vocabulary.
        dtype: of the smaller model's weights; by default the model's own.
        num_speculative_tokens: guesses for a sequence in a step, at most: how many pay is measured.
        prompt_lookup_min, prompt_lookup_max: how many of the last tokens must have stood before, and at most
            are compared, to guess by "ngram".

    Raises:
        ConfigError: a value out of its range, or at odds with another.
    """

    method: Method = "ngram"
    model: str | None = None
    dtype: str | None = None
    num_speculative_tokens: int = 10
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(f"{_NAME}.method: got {self.method!r}, allowed 'ngram' or 'draft_model'")
        self._check("num_speculative_tokens", 1, MAX_SPECULATIVE_TOKENS)
        self._check("prompt_lookup_max", 1, 32)
        self._check("prompt_lookup_min", 1, self.prompt_lookup_max)
        if (self.method == "draft_model") != (self.model is not None):
            raise ConfigError(
                f"{_NAME}.model: got {self.model!r} with the method {self.method!r}, allowed a model for "
                "'draft_model', and none for 'ngram'"
            )
        if self.dtype is not None and self.model is None:
            raise ConfigError(f"{_NAME}.dtype: got {self.dtype!r}, allowed with a model only")

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | SpeculativeConfig) -> SpeculativeConfig:
        """From a mapping such as `{"method": "ngram", "num_speculative_tokens": 5}`."""
        if isinstance(options, SpeculativeConfig):
            return options
        if not isinstance(options, Mapping):
            raise ConfigError(f"{_NAME}: got {options!r}, allowed an object such as {{'method': 'ngram'}}")
        known = [field.name for field in fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ConfigError(f"{_NAME}: got the key {unknown[0]!r}, allowed: {', '.join(known)}")
        implied = "draft_model" if options.get("model") is not None else "ngram"
        given = {name: value for name, value in options.items() if value is not None}
        # As in vLLM, one of the lookup's two bounds moves the other.
        low, high = given.get("prompt_lookup_min"), given.get("prompt_lookup_max")
        if isinstance(low, int) and high is None:
            given["prompt_lookup_max"] = max(low, cls.prompt_lookup_max)
        elif isinstance(high, int) and low is None:
            given["prompt_lookup_min"] = min(high, cls.prompt_lookup_min)
        return cls(**{"method": implied, **given})

    def _check(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{_NAME}.{name}: got {value!r}, allowed an integer from {low} to {high}")


_NAME = "speculative_config"
