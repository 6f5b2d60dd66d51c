"""What a request may ask of the sampler: vLLM's names and defaults, every value checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

from llm_boost.engine.structured_outputs import StructuredOutputsParams
from llm_boost.errors import RequestError

MAX_N = 128
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1_000
MAX_STOP_TOKEN_IDS = 1_024
MAX_LOGIT_BIAS_ENTRIES = 1_024
MAX_BAD_WORDS = 1_024
MAX_ALLOWED_TOKEN_IDS = 1 << 20
GREEDY_BELOW = 1e-5  # a temperature this small is greedy, as in vLLM

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Raises RequestError for a value out of range.

    The rules apply in vLLM's order: the grammar and the tokens allowed, bad words, logit bias, stop tokens
    masked below `min_tokens`, penalties, temperature, min-p, top-k, top-p; typical-p comes last. The same
    seed gives the same text in any batch and on any machine.
    """

    max_logprobs: ClassVar[int] = MAX_TOP_LOGPROBS

    n: int = 1  # completions of the prompt, 1..128
    best_of: int | None = None  # n..128: so many are made, and the n of the highest probability come back
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # the likeliest tokens that hold this much probability
    top_k: int = 0  # the k likeliest; 0 or -1 keeps all
    min_p: float = 0.0  # tokens at least this likely, relative to the likeliest
    typical_p: float = 1.0  # the tokens nearest to the expected surprise that hold this much probability
    repetition_penalty: float = (
        1.0  # over prompt and output; divides positive logits, multiplies negative ones
    )
    presence_penalty: float = 0.0  # subtracted once from tokens of the output
    frequency_penalty: float = 0.0  # subtracted for each occurrence in the output
    seed: int | None = None  # None: drawn from the engine's seed and the request's number
    stop: str | Sequence[str] | None = None  # strings that end the text
    stop_token_ids: Sequence[int] | None = None  # tokens that end the text, beside the model's own
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16  # None: as many as fit
    min_tokens: int = 0  # no stop before this many
    logprobs: int | None = None  # 0: of each chosen token; N: of the N likeliest too
    prompt_logprobs: int | None = None  # the same of the prompt's tokens, given those before each
    logit_bias: Mapping[int, float] | None = None  # token id -> -100..100, added to its logit
    allowed_token_ids: Sequence[int] | None = None  # no others are sampled; None: all may be
    bad_words: Sequence[str] | None = None  # texts that are not written, as they are or after a space
    truncate_prompt_tokens: int | None = None  # keep the prompt's last ones; -1: as many as leave room
    detokenize: bool = True  # False: token ids alone, the text stays empty
    skip_special_tokens: bool = True  # in the text; token_ids has them always
    structured_outputs: StructuredOutputsParams | None = None  # what the text must look like

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "n": check_integer("n", self.n, 1, MAX_N),
            "best_of": None if self.best_of is None else check_integer("best_of", self.best_of, 1, MAX_N),
            "temperature": check_real("temperature", self.temperature, 0, 100),
            "top_p": check_real("top_p", self.top_p, 0, 1, above=True),
            "top_k": max(check_integer("top_k", self.top_k, -1, _INT32_MAX), 0),
            "min_p": check_real("min_p", self.min_p, 0, 1),
            "typical_p": check_real("typical_p", self.typical_p, 0, 1, above=True),
            "repetition_penalty": check_real("repetition_penalty", self.repetition_penalty, 0.01, 100),
            "presence_penalty": check_real("presence_penalty", self.presence_penalty, -2, 2),
            "frequency_penalty": check_real("frequency_penalty", self.frequency_penalty, -2, 2),
            "seed": None if self.seed is None else check_integer("seed", self.seed, -(2**63), 2**64 - 1),
            "stop": _strings("stop", self.stop, MAX_STOP_STRINGS),
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS),
            "ignore_eos": check_boolean("ignore_eos", self.ignore_eos),
            "include_stop_str_in_output": check_boolean(
                "include_stop_str_in_output", self.include_stop_str_in_output
            ),
            "max_tokens": None
            if self.max_tokens is None
            else check_integer("max_tokens", self.max_tokens, 1, _INT32_MAX),
            "min_tokens": check_integer("min_tokens", self.min_tokens, 0, _INT32_MAX),
            "logprobs": None
            if self.logprobs is None
            else check_integer("logprobs", self.logprobs, 0, self.max_logprobs),
            "prompt_logprobs": None
            if self.prompt_logprobs is None
            else check_integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS),
            "logit_bias": _logit_bias(self.logit_bias),
            "allowed_token_ids": _allowed_token_ids(self.allowed_token_ids),
            "bad_words": _strings("bad_words", self.bad_words, MAX_BAD_WORDS),
            "truncate_prompt_tokens": _truncate_prompt_tokens(self.truncate_prompt_tokens),
            "detokenize": check_boolean("detokenize", self.detokenize),
            "skip_special_tokens": check_boolean("skip_special_tokens", self.skip_special_tokens),
        }
        if self.structured_outputs is not None and not isinstance(
            self.structured_outputs, StructuredOutputsParams
        ):
            raise _fault("structured_outputs", self.structured_outputs, "StructuredOutputsParams")
        if checked["temperature"] < GREEDY_BELOW:
            checked["temperature"] = 0.0
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens: got {self.min_tokens}, allowed 0..max_tokens ({self.max_tokens})"
            )

        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of: got {self.best_of}, allowed n ({self.n})..{MAX_N}")
        if self.stop and not self.detokenize:
            raise RequestError(
                "stop: allowed with detokenize=True alone, for a stop string is found in the text"
            )

    @property
    def num_completions(self) -> int:
        """How many are made; `n` of them come back."""
        return self.n if self.best_of is None else self.best_of

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert not isinstance(self.stop, str)  # __post_init__ has made it a tuple
        return tuple(self.stop or ())


def _fault(name: str, value: object, allowed: str) -> RequestError:
    shown = repr(value)
    return RequestError(f"{name}: got {shown if len(shown) <= 80 else shown[:77] + '...'}, allowed {allowed}")


def check_real(name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    """The value, a number within its bounds; RequestError."""
    allowed = f"a number {'above' if above else 'from'} {low} {'and at most' if above else 'to'} {high}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _fault(name, value, allowed)
    number = float(value)
    if not math.isfinite(number) or not low <= number <= high or (above and number == low):
        raise _fault(name, value, allowed)
    return number


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """The value, an integer within its bounds; RequestError."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise _fault(name, value, f"an integer from {low} to {high}")
    return int(value)


def check_boolean(name: str, value: Any) -> bool:
    """The value, True or False; RequestError."""
    if not isinstance(value, bool):
        raise _fault(name, value, "True or False")
    return value


def _strings(name: str, value: Any, most: int) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(strings, (list, tuple)) or not all(isinstance(s, str) for s in strings):
        raise _fault(name, value, "a string or a list of strings")
    if len(strings) > most:
        raise _fault(name, f"{len(strings)} strings", f"at most {most}")
    for string in strings:
        if not 1 <= len(string) <= MAX_STOP_STRING_CHARS:
            raise _fault(
                name, f"a string of {len(string)} characters", f"1..{MAX_STOP_STRING_CHARS} characters"
            )
    return tuple(strings)


def _token_ids(name: str, value: Any, most: int) -> tuple[int, ...]:
    ids = () if value is None else value
    if not isinstance(ids, (list, tuple)):
        raise _fault(name, value, "a list of token ids")
    if len(ids) > most:
        raise _fault(name, f"{len(ids)} ids", f"at most {most}")
    return tuple(check_integer(name, token, 0, _INT32_MAX) for token in ids)


def _allowed_token_ids(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = _token_ids("allowed_token_ids", value, MAX_ALLOWED_TOKEN_IDS)
    if not ids:
        raise _fault("allowed_token_ids", value, "None, or at least one token id")
    return ids


def _truncate_prompt_tokens(value: Any) -> int | None:
    if value is None or (value == -1 and not isinstance(value, bool)):
        return -1 if value == -1 else None
    return check_integer("truncate_prompt_tokens", value, 1, _INT32_MAX)


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _fault("logit_bias", value, "a mapping of token id to bias")
    if len(value) > MAX_LOGIT_BIAS_ENTRIES:
        raise _fault("logit_bias", f"{len(value)} entries", f"at most {MAX_LOGIT_BIAS_ENTRIES}")
    return {
        check_integer("logit_bias key", token, 0, _INT32_MAX): check_real(
            f"logit_bias[{token}]", bias, -100, 100
        )
        for token, bias in value.items()
    }
