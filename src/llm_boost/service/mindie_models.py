"""The parameters that MindIE's TGI, Triton and native endpoints share, with its words for what is wrong."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from pydantic import Field

from llm_boost.service.body import Body, Says
from llm_boost.service.faults import invalid

DEFAULT_NEW_TOKENS = 20
FLT_MAX = 3.4028234663852886e38
Temperature = Annotated[
    float, Field(gt=0, le=FLT_MAX), Says(f"Parameter temperature must be in (0.0,{FLT_MAX:g}], got {{}}.")
]
TopK = Annotated[int, Field(ge=1, le=2**31 - 1), Says("Parameter top_k must be in (0,2147483647], got {}.")]
TopP = Annotated[float, Field(gt=0, lt=1), Says("Parameter top_p must be in (0.0,1.0), got {}.")]
TypicalP = Annotated[float, Field(gt=0, le=1), Says("Parameter typical_p must be in (0.0,1.0], got {}.")]
Repetition = Annotated[
    float,
    Field(gt=0, le=FLT_MAX),
    Says(f"Parameter 'repetition_penalty' must be in (0.0, {FLT_MAX:g}], got {{}}."),
]
Seed = Annotated[
    int, Field(ge=0, le=2**63 - 1), Says("Parameter seed must be in [0, 9223372036854775807], got {}.")
]
NewTokens = Annotated[
    int,
    Field(ge=1, le=2**31 - 1),
    Says("Parameter max_new_tokens must be in (0,2147483647], got {}."),
]
Inputs = Annotated[str, Field(min_length=1), Says("Inputs length must be in (0, 41943040], but got 0")]


class GenerationParameters(Body):
    """What all of them know of sampling."""

    details: bool | None = None
    do_sample: bool | None = None
    max_new_tokens: NewTokens | None = None
    repetition_penalty: Repetition | None = None
    seed: Seed | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    typical_p: TypicalP | None = None
    watermark: bool | None = None

    def sampling(self, default_new_tokens: int = DEFAULT_NEW_TOKENS) -> dict[str, Any]:
        """In SamplingParams' names; a value of sampling turns it on unless do_sample says otherwise."""
        if self.typical_p not in (None, 1.0):
            raise invalid(
                "typical_p is not supported by this engine: leave it out, or send 1.0.", "typical_p"
            )
        if self.watermark:
            raise invalid("watermark is not supported by this engine: leave it out.", "watermark")
        asked = any(value is not None for value in (self.temperature, self.top_k, self.top_p))
        temperature: float | None = self.temperature
        if self.do_sample is False:
            temperature = 0.0
        elif self.do_sample or asked:
            temperature = 1.0 if self.temperature is None else self.temperature
        return {
            "temperature": None if temperature is None else min(temperature, 100.0),
            "top_k": self.top_k,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
            "max_tokens": self.max_new_tokens or default_new_tokens,
            "seed": self.seed if self.seed is not None else secrets.randbits(63),
        }
