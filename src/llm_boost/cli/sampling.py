"""How the verbs that answer choose tokens, unless told otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_boost import LLM
    from llm_boost.config.run_config import RunConfig


def sampling(llm: LLM, config: RunConfig) -> dict[str, Any]:
    """What flags and files say of sampling, over the model's generation_config.json; else greedy."""
    from llm_boost import SamplingParams

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    model = llm.default_sampling_params()
    if model == SamplingParams():
        model = SamplingParams(temperature=0.0)
    asked = {**{name: getattr(model, name) for name in names}, **config.sampling()}
    if config.do_sample and config.temperature is None and asked["temperature"] == 0:
        asked["temperature"] = 1.0
    return asked
