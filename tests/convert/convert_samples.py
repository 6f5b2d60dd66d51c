"""Small random models of any shape, as Hugging Face folders, and their tensors beside those of any output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from golden import model_dir
from llm_boost.checkpoint import open_checkpoint
from llm_boost.models.config import ModelConfig, expected_tensors

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def config_of(
    kind: str = "llama", heads: int = 4, kv_heads: int = 2, head_dim: int = 8, layers: int = 1, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": heads * head_dim,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": 272,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **more,
    }


def random_model(folder: Path, config: dict[str, Any], dtype: str = "BF16", seed: int = 0) -> Path:
    """A Hugging Face folder of random weights, with the tiny golden tokenizer."""
    rng = np.random.default_rng(seed)
    shapes = expected_tensors(ModelConfig.from_hf(config, "config.json"))
    tensors = {
        name: (rng.standard_normal(shape) * 0.1).astype(np.float32).astype(DTYPES[dtype])
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in model_dir("llama").iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, folder)
    return folder


def differences(one: Path, other: Path, **options: Any) -> list[str]:
    """Tensors that are not in both with the same type and the same bits."""
    a, b = open_checkpoint(one), open_checkpoint(other, **options)
    names = {*a.tensors, *b.tensors}
    return sorted(
        name
        for name in names
        if name not in a.tensors
        or name not in b.tensors
        or a.tensors[name] != b.tensors[name]
        or a.read(name).tobytes() != b.read(name).tobytes()
    )
