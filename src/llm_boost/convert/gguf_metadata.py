"""The metadata of a GGUF file: what llama.cpp needs to know of a model, its tokenizer and its sampling."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.convert.settings import llama3_factors
from llm_boost.convert.source import Source
from llm_boost.errors import CheckpointError
from llm_boost.models.config import ModelConfig
from llm_boost.models.rope import RopeConfig

if TYPE_CHECKING:
    from llm_boost.tokenization import Tokenizer

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
QUANTIZATION_VERSION = 2
SAMPLING = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
# what describes one file rather than the model in it
_OWN = ("general.file_type", "general.quantization_version", "general.alignment", "split.")


def gguf_metadata(source: Source, kind: str) -> dict[str, Any]:
    """All of it; a GGUF file's own is carried over, but for what the types of its tensors imply."""
    types = {"general.file_type": FILE_TYPES[kind]}
    if kind in ("Q8_0", "Q4_0"):
        types["general.quantization_version"] = QUANTIZATION_VERSION
    if source.format == "gguf":
        own = source.checkpoint.metadata
        return {key: value for key, value in own.items() if not key.startswith(_OWN)} | types
    from llm_boost.tokenization.export import gguf_metadata as tokenizer_metadata

    tokenizer = _tokenizer(source)
    arch = ARCHITECTURES[source.model_type]
    return {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": _name(source),
        **types,
        **{f"{arch}.{key}": value for key, value in _shape(source).items()},
        **_sampling(source.checkpoint.generation_config),
        **tokenizer_metadata(tokenizer, source.model.vocab_size),
    }


def rope_factors(model: ModelConfig) -> NDArray[np.float32] | None:
    """The tensor rope_freqs.weight, [head_dim / 2], where the model has Llama 3's scaling."""
    if model.rope.rope_type == "freq_factors":
        return np.array(model.rope.freq_factors, np.float32)
    return llama3_factors(model.rope, model.head_dim) if model.rope.rope_type == "llama3" else None


def _shape(source: Source) -> dict[str, Any]:
    model = source.model
    positions = source.config.get("max_position_embeddings", model.max_position_embeddings)
    shape: dict[str, Any] = {
        "block_count": model.num_layers,
        "context_length": positions,
        "embedding_length": model.hidden_size,
        "feed_forward_length": model.intermediate_size,
        "attention.head_count": model.num_heads,
        "attention.head_count_kv": model.num_kv_heads,
        "attention.layer_norm_rms_epsilon": model.rms_norm_eps,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "rope.dimension_count": model.head_dim,
        "rope.freq_base": model.rope.theta,
        "vocab_size": model.vocab_size,
        **_scaling(model, source.path),
    }
    if model.sliding_window is not None:
        shape["attention.sliding_window"] = model.sliding_window
    return shape


def _scaling(model: ModelConfig, path: Path) -> dict[str, Any]:
    rope = model.rope
    if rope.rope_type in ("default", "llama3", "freq_factors"):  # the latter two: a tensor
        return {}
    if rope.rope_type == "dynamic":
        warnings.warn(
            f"{path}: dynamic rope scaling has no GGUF form; the file is for "
            f"{model.max_position_embeddings} tokens",
            stacklevel=2,
        )
        return {}
    scaling: dict[str, Any] = {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": rope.factor}
    if rope.rope_type == "yarn":
        usual = RopeConfig("yarn", attention_factor=0.1 * math.log(rope.factor) + 1)
        same = (rope.beta_fast, rope.beta_slow, rope.truncate) == (
            usual.beta_fast,
            usual.beta_slow,
            usual.truncate,
        )
        if not same or not math.isclose(rope.attention_factor, usual.attention_factor, rel_tol=1e-6):
            raise CheckpointError(
                f"{path}: config.json: rope_parameters: GGUF has no words for a yarn with its own "
                "attention_factor, beta_fast, beta_slow or truncate"
            )
        scaling["rope.scaling.original_context_length"] = rope.original_max_position_embeddings
    return scaling


def _sampling(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Values that the model recommends, of which a reader may take notice."""
    if generation_config.get("do_sample") is False:
        return {}
    found: dict[str, Any] = {}
    for key, name in SAMPLING.items():
        value = generation_config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[f"general.sampling.{name}"] = np.int32(value) if key == "top_k" else float(value)
    return found


def _name(source: Source) -> str:
    path = source.path.resolve()
    return path.name if path.is_dir() else path.stem


def _tokenizer(source: Source) -> Tokenizer:
    from llm_boost.tokenization import load_tokenizer

    return load_tokenizer(source.checkpoint.folder)
