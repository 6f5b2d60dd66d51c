"""The small files beside the weights: config.json, the tokenizer's, generation_config.json.

They are carried over from a checkpoint that has them, and made from a GGUF file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_boost.convert.source import Source
from llm_boost.errors import CheckpointError
from llm_boost.models.config import ModelConfig
from llm_boost.models.rope import RopeConfig, inverse_frequencies

CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "LICENSE*",
)  # fmt: skip
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def settings_files(source: Source, dtype: str) -> dict[str, bytes]:
    """Name -> content of the files beside weights in `dtype` (F32, F16, BF16; of the linears)."""
    files = {"config.json": _config_json(source, dtype)}
    if source.format == "gguf":
        return files | _made(source)
    return files | carried(source.checkpoint.folder)


def carried(folder: Path) -> dict[str, bytes]:
    """The files of a model's folder that belong to its tokenizer and its use."""
    try:
        return {
            str(file.relative_to(folder)): file.read_bytes()
            for pattern in CARRIED
            for file in sorted(folder.glob(pattern))
            if file.is_file()
        }
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _config_json(source: Source, dtype: str) -> bytes:
    """The source's own, to the byte where nothing changes."""
    config = dict(source.config)
    config.setdefault("architectures", [source.model.architecture])
    config.setdefault("model_type", source.model_type)
    if source.format == "gguf":
        config = _published(config, source)
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if config.get(key) != DTYPE_NAMES[dtype]:
        config[key] = DTYPE_NAMES[dtype]
    own = source.checkpoint.folder / "config.json"
    if source.format != "gguf" and own.is_file() and json.loads(own.read_bytes()) == config:
        return own.read_bytes()
    return _json(config)


def _published(config: dict[str, Any], source: Source) -> dict[str, Any]:
    """A config made from GGUF metadata, its rotary parameters as every version of transformers reads them."""
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] == "freq_factors":
        rope = _llama3_scaling(source.model, str(source.path))
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return config


def _llama3_scaling(model: ModelConfig, where: str) -> dict[str, Any]:
    """The scaling of Llama 3 that gives the factors of the file, to float32's last digits.

    All published models blend between wavelengths of a fourth of the original context and all of it.
    """
    factors = np.array(model.rope.freq_factors, dtype=np.float32)
    for exponent in range(6, 24):
        original = 1 << exponent
        rope = RopeConfig(
            "llama3",
            model.rope.theta,
            round(float(factors.max()), 3),
            original,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        )
        if np.allclose(llama3_factors(rope, model.head_dim), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": rope.factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise CheckpointError(
        f"{where}: rope_freqs.weight: not the factors of Llama 3's scaling, which config.json could name; "
        "give the model's own config.json with --config_path"
    )


def llama3_factors(rope: RopeConfig, head_dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What each frequency is divided by, [head_dim / 2]: the tensor rope_freqs.weight of a GGUF file."""
    plain = inverse_frequencies(RopeConfig(theta=rope.theta), head_dim)
    return (plain / inverse_frequencies(rope, head_dim)).astype(np.float32)


def _made(source: Source) -> dict[str, bytes]:
    from llm_boost.tokenization.export import huggingface_files

    files = huggingface_files(source.checkpoint.metadata, str(source.path), source.model.max_model_len)
    generation = dict(source.checkpoint.generation_config)
    if generation.keys() & {"temperature", "top_p", "top_k", "min_p"}:
        generation = {"do_sample": True, **generation}
    if generation:
        files["generation_config.json"] = _json(generation).decode()
    return {name: text.encode() for name, text in files.items()}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
