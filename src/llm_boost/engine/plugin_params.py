"""MindIE's `plugin_params`: a JSON string of a ModelConfig that names the plugins to run with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_boost.engine.speculative_config import SpeculativeConfig
from llm_boost.errors import ConfigError

# plugin -> its parameters: (lowest, highest, default), or a default that is true or false
_PLUGINS: dict[str, dict[str, tuple[int, int, int] | bool]] = {
    "prefix_cache": {},
    "splitfuse": {},
    "la": {"level": (3, 16, 4), "window": (1, 16, 5), "guess_set_size": (1, 16, 5)},
    "memory_decoding": {"decoding_length": (1, 16, 16), "dynamic_algo": False},
}
_NAME = "plugin_params"


@dataclass(frozen=True)
class PluginParams:
    """What the plugins ask for."""

    prefix_cache: bool = False
    splitfuse: bool = False  # wants the template "Mix"
    speculative: SpeculativeConfig | None = None

    def check_template(self, template_type: str) -> None:
        """ConfigError where splitfuse is asked for beside another template than Mix."""
        if self.splitfuse and template_type != "Mix":
            raise ConfigError(
                f"template_type: got {template_type!r}, allowed 'Mix' with splitfuse in {_NAME}"
            )


def parse_plugin_params(text: str, speculation_gamma: int | None = None) -> PluginParams:
    """What `plugin_params` stands for here.

    "la" guesses up to level - 1 tokens by prompt lookup, "memory_decoding" up to decoding_length; how many of
    them pay is measured, whatever `dynamic_algo`, `window` and `guess_set_size` say of their own algorithms.

    Args:
        speculation_gamma: speculationGamma of the same ModelConfig, if it has one.

    Raises:
        ConfigError: not such a string, a plugin that is not here, or a value out of its range.
    """
    options = _object(text)
    kinds = [kind.strip() for kind in str(options.get("plugin_type", "")).split(",") if kind.strip()]
    for kind in kinds:
        if kind not in _PLUGINS:
            raise ConfigError(f"{_NAME}: plugin_type: got {kind!r}, allowed: {', '.join(_PLUGINS)}")
    if not kinds and options:
        raise ConfigError(f"{_NAME}: plugin_type: missing, allowed: {', '.join(_PLUGINS)}")
    if "la" in kinds and "memory_decoding" in kinds:
        raise ConfigError(f"{_NAME}: plugin_type: got la and memory_decoding, allowed one of them")
    known = {name: rule for kind in kinds for name, rule in _PLUGINS[kind].items()}
    unknown = [name for name in options if name not in {"plugin_type", *known}]
    if unknown:
        raise ConfigError(
            f"{_NAME}: {unknown[0]}: no such parameter of {', '.join(kinds)}, allowed: "
            f"{', '.join(known) or 'none'}"
        )
    values = {name: _value(name, rule, options) for name, rule in known.items()}
    return PluginParams(
        "prefix_cache" in kinds, "splitfuse" in kinds, _speculative(values, speculation_gamma)
    )


def _object(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{_NAME}: got {text[:80]!r}, allowed a JSON object as text: {error}") from None
    if not isinstance(options, dict):
        raise ConfigError(f"{_NAME}: got {text[:80]!r}, allowed a JSON object as text")
    return options


def _value(name: str, rule: tuple[int, int, int] | bool, options: Mapping[str, Any]) -> int:
    if isinstance(rule, bool):
        value = options.get(name, rule)
        if not isinstance(value, bool):
            raise ConfigError(f"{_NAME}: {name}: got {value!r}, allowed true or false")
        return value
    low, high, default = rule
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{_NAME}: {name}: got {value!r}, allowed an integer from {low} to {high}")
    return value


def _speculative(values: Mapping[str, int], gamma: int | None) -> SpeculativeConfig | None:
    if "level" in values:
        needed = (values["level"] - 1) * (values["window"] + values["guess_set_size"])
        rule, tokens = "(level - 1) * (window + guess_set_size)", values["level"] - 1
    elif "decoding_length" in values:
        needed = tokens = values["decoding_length"]
        rule = "decoding_length"
    else:
        return None
    if gamma is not None and gamma < needed:
        raise ConfigError(f"speculationGamma: got {gamma}, allowed at least {needed}, {rule} of {_NAME}")
    return SpeculativeConfig(method="ngram", num_speculative_tokens=tokens)
