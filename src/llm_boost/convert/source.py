"""What is converted: a checkpoint opened, found to be what the caller says it is, and checked whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_boost.checkpoint.casting import survives
from llm_boost.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llm_boost.checkpoint.fields import shown
from llm_boost.checkpoint.safetensors_reader import DTYPES
from llm_boost.convert.tensors import stored_dtype
from llm_boost.errors import CheckpointError, ConfigError
from llm_boost.models.config import ModelConfig, check_tensors, expected_tensors
from llm_boost.suggest import did_you_mean

FORMATS = ("hf", "mindspore-ckpt", "mindspore-safetensors", "gguf", "packed")
NO_WEIGHTS = ("int", "uint", "bool", "float8", "complex")
# MindFormers' names of models -> the model_types of config.json that they stand for
MODELS = {
    "llama": ("llama", "mistral"),
    "mistral": ("mistral", "llama"),  # a GGUF file calls a Mistral llama
    "qwen2": ("qwen2",),
    "qwen2_5": ("qwen2",),
    "qwen3": ("qwen3",),
    "yi": ("llama",),
    "deepseek": ("llama",),
    "deepseek1_5": ("llama",),
    "knowlm": ("llama",),
}


@dataclass(frozen=True)
class Source:
    """`format` is one of FORMATS, or meta; `config` is config.json's keys, with `model_type`."""

    checkpoint: Checkpoint
    format: str
    config: Mapping[str, Any]
    model: ModelConfig

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def model_type(self) -> str:
        return MODEL_TYPES[self.model.architecture]

    def names(self) -> list[str]:
        """The model's tensors in its own order, then what else the checkpoint holds."""
        expected = expected_tensors(self.model)
        return [*expected, *(name for name in self.checkpoint.tensors if name not in expected)]


MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def open_source(
    path: Path,
    *,
    from_: str | None = None,
    model: str | None = None,
    hf_config: Mapping[str, Any] | None = None,
    qkv_layout: str | None = None,
) -> Source:
    """Opens and checks a whole checkpoint.

    Raises:
        CheckpointError: it is damaged, incomplete, quantised in a way that cannot be read, or not a `from_`.
        ConfigError: `model` is not a known name, or not that of the checkpoint.
    """
    if model is not None and model not in MODELS:
        raise ConfigError(
            f"--model: got {model!r}, allowed: {', '.join(MODELS)}{did_you_mean(model, MODELS)}"
        )
    checkpoint = open_checkpoint(path, hf_config, qkv_layout)
    found = format_of(checkpoint)
    if from_ is not None and from_ != found:
        raise CheckpointError(f"{path}: --from says {from_}, but the content is {found}; leave --from out")
    if found == "packed":
        raise CheckpointError(
            f"{path}: packed weights are for the engine alone; convert the checkpoint they were made from"
        )
    where = checkpoint.path if found == "gguf" else checkpoint.folder / "config.json"
    source = Source(
        checkpoint,
        found,
        checkpoint.config,
        ModelConfig.from_hf(checkpoint.config, str(where), checkpoint.tensors),
    )
    if model is not None and source.model_type not in MODELS[model]:
        raise ConfigError(f"--model: got {model}, but {where} is of a {source.model_type}")
    check_tensors(source.model, checkpoint)
    for name, info in checkpoint.tensors.items():
        if info.dtype.startswith(NO_WEIGHTS):
            raise CheckpointError(
                f"{path}: tensor {shown(name)} is {info.dtype}; weights are floating point, or quantised as "
                "GGUF, GPTQ or AWQ"
            )
    return source


def format_of(checkpoint: Checkpoint) -> str:
    """One of FORMATS, or meta."""
    if checkpoint.format == "mindspore":
        files = [checkpoint.path] if checkpoint.path.is_file() else checkpoint.path.rglob("*.ckpt")
        return "mindspore-ckpt" if any(file.suffix == ".ckpt" for file in files) else "mindspore-safetensors"
    return {"huggingface": "hf"}.get(checkpoint.format, checkpoint.format)


def target_dtypes(source: Source, dtype: str | None) -> dict[str, str]:
    """The type of every tensor that is written: `dtype` (F32, F16, BF16), or what loses nothing.

    That is the stored one, float32 for a quantised tensor; and the matrices' for vectors of a GGUF file,
    which knows them as float32 alone, where they hold no value that it lacks.
    """
    checkpoint = source.checkpoint
    if dtype is not None:
        return dict.fromkeys(checkpoint.tensors, dtype)
    dtypes = {name: stored_dtype(checkpoint, name) for name in checkpoint.tensors}
    if source.format != "gguf":
        return dtypes
    matrix = main_dtype(source)
    vectors = [name for name, info in checkpoint.tensors.items() if len(info.shape) == 1]
    if all(survives(checkpoint.read(name), DTYPES[matrix]) for name in vectors):
        dtypes.update(dict.fromkeys(vectors, matrix))
    return dtypes


def main_dtype(source: Source) -> str:
    """That of the linears; of a quantised checkpoint F32."""
    return stored_dtype(source.checkpoint, "model.layers.0.self_attn.q_proj.weight")
