"""LLM Boost: fast LLM inference on CPUs.

>>> from llm_boost import LLM, SamplingParams
>>> llm = LLM(model="path/to/model", dtype="int8")
>>> outputs = llm.generate(["Hello"], SamplingParams(max_tokens=16))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_boost.engine.async_llm import AsyncLLM
    from llm_boost.engine.beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from llm_boost.engine.llm import LLM
    from llm_boost.engine.outputs import CompletionOutput, RequestOutput
    from llm_boost.engine.sampling_params import SamplingParams
    from llm_boost.engine.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

__version__: str

_LAZY = {
    "LLM": "llm_boost.engine.llm",
    "AsyncLLM": "llm_boost.engine.async_llm",
    "BeamSearchOutput": "llm_boost.engine.beam_search",
    "BeamSearchParams": "llm_boost.engine.beam_search",
    "BeamSearchSequence": "llm_boost.engine.beam_search",
    "SamplingParams": "llm_boost.engine.sampling_params",
    "StructuredOutputsParams": "llm_boost.engine.structured_outputs",
    "RequestOutput": "llm_boost.engine.outputs",
    "CompletionOutput": "llm_boost.engine.outputs",
}


def __getattr__(name: str) -> Any:
    # Imported when used, so that `llm-boost --help` costs neither numpy nor the native module.
    if name == "__version__":
        return _installed_version()
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'llm_boost' has no attribute {name!r}")


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llm-boost")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"
