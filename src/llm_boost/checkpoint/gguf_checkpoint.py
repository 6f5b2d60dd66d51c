"""A GGUF file as a Checkpoint: llama.cpp's names, row order and metadata become Hugging Face's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.fields import Fields, shown
from llm_boost.checkpoint.gguf_reader import GGUFFile
from llm_boost.errors import CheckpointError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_GGUF_TOP_NAMES = {theirs: ours for ours, theirs in TOP_NAMES.items()}
_GGUF_LAYER_NAMES = {theirs: ours for ours, theirs in LAYER_NAMES.items()}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's scaling, one divisor a frequency

DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MAX_INT = (1 << 31) - 1


class GGUFCheckpoint:
    """One GGUF file of a llama, qwen2 or qwen3 model."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent
        self._file = GGUFFile(path)
        self.metadata = self._file.metadata
        fields = Fields(self.metadata, str(path))
        if fields.integer("split.count", 0, 65535, 1) > 1 or re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
            raise CheckpointError(
                f"{path}: one part of a split GGUF; merge the parts with llama.cpp's gguf-split first"
            )
        self._source = {_hf_name(name): name for name in self._file.tensors if name != ROPE_FACTORS}
        if len(self._source) + (ROPE_FACTORS in self._file.tensors) != len(self._file.tensors):
            raise CheckpointError(f"{path}: two tensors mean the same part of the model; the file is damaged")
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tensor.shape, DTYPE_NAMES.get(tensor.type, tensor.type))
            for name, tensor in ((name, self._file.tensors[source]) for name, source in self._source.items())
        }
        self.config = self._config(fields)
        self.generation_config = _generation_config(fields)

    def read(self, name: str) -> NDArray[Any]:
        """See Checkpoint.read."""
        return self.read_rows(name, 0, self._info(name).shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """See Checkpoint.read_rows."""
        info = self._info(name)
        if not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(f"rows {start} to {stop} of {name}, which has {info.shape[0]}")
        heads = self._interleaved_heads(name)
        if not heads:
            return self._file.read_rows(self._source[name], start, stop)
        head_rows = info.shape[0] // heads
        first, last = start // head_rows, -(-stop // head_rows)
        rows = self._file.read_rows(self._source[name], first * head_rows, last * head_rows)
        return to_half_rotation(rows, head_rows)[start - first * head_rows : stop - first * head_rows]

    def fingerprint(self) -> str:
        """See Checkpoint.fingerprint."""
        stat = self.path.stat()
        digest = hashlib.sha256(f"{self.path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        digest.update(self._file.header().tobytes())
        return digest.hexdigest()

    def forget(self) -> None:
        """See Checkpoint.forget."""
        self._file.forget()

    def close(self) -> None:
        """Lets go of the file; arrays already read stay valid."""
        self._file.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {shown(name)}")
        return self.tensors[name]

    def _interleaved_heads(self, name: str) -> int:
        """Heads of a tensor whose rows alternate between the two halves of a rotation; 0 for all others."""
        if self.config["model_type"] != "llama":
            return 0
        if ".self_attn.q_proj." in name:
            return int(self.config["num_attention_heads"])
        return int(self.config["num_key_value_heads"]) if ".self_attn.k_proj." in name else 0

    def _config(self, fields: Fields) -> dict[str, Any]:
        """config.json, from the metadata and the tensors."""
        kind = fields.text("general.architecture", "")
        if kind not in ARCHITECTURES:
            raise fields.error("general.architecture", f"one of {', '.join(ARCHITECTURES)}")
        if fields.integer(f"{kind}.expert_count", 0, MAX_INT, 0):
            raise fields.error(f"{kind}.expert_count", "0: mixtures of experts are not supported")
        heads = fields.integer(f"{kind}.attention.head_count", 1, MAX_INT)
        kv_heads = fields.integer(f"{kind}.attention.head_count_kv", 1, heads, heads)
        hidden_size = fields.integer(f"{kind}.embedding_length", 1, MAX_INT)
        head_dim = fields.integer(f"{kind}.attention.key_length", 1, MAX_INT, max(1, hidden_size // heads))
        for key in (f"{kind}.attention.value_length", f"{kind}.rope.dimension_count"):
            if fields.integer(key, 1, MAX_INT, head_dim) != head_dim:
                raise fields.error(key, f"{head_dim}, the size of a head")
        context = fields.integer(f"{kind}.context_length", 1, MAX_INT)
        window = fields.integer(f"{kind}.attention.sliding_window", 0, MAX_INT, 0)
        config = {
            "architectures": [ARCHITECTURES[kind]],
            "model_type": kind,
            "hidden_act": "silu",
            "vocab_size": self._vocab_size(),
            "hidden_size": hidden_size,
            "intermediate_size": fields.integer(f"{kind}.feed_forward_length", 1, MAX_INT),
            "num_hidden_layers": fields.integer(f"{kind}.block_count", 1, MAX_INT),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": min(context, window or context),  # within the window attention is full
            "rms_norm_eps": fields.number(f"{kind}.attention.layer_norm_rms_epsilon", 0, 1),
            "rope_parameters": self._rope_parameters(fields, kind, head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "dtype": "float32",
            **_token_ids(fields),
        }
        self._check_heads(config)
        return config

    def _vocab_size(self) -> int:
        """Rows of the embedding: the metadata may count fewer, or leave it out."""
        if "model.embed_tokens.weight" not in self.tensors:
            raise CheckpointError(f"{self.path}: tensor token_embd.weight is missing")
        return self.tensors["model.embed_tokens.weight"].shape[0]

    def _check_heads(self, config: dict[str, Any]) -> None:
        """q and k are un-permuted by heads, so their rows must divide by them before anything is read."""
        for name, info in self.tensors.items():
            heads = config["num_attention_heads"] if ".q_proj." in name else config["num_key_value_heads"]
            if re.search(r"\.[qk]_proj\.", name) and info.shape[0] != heads * config["head_dim"]:
                raise CheckpointError(
                    f"{self.path}: tensor {shown(self._source[name])} has {info.shape[0]} rows, "
                    f"{heads} heads of {config['head_dim']} make {heads * config['head_dim']}"
                )

    def _rope_parameters(self, fields: Fields, kind: str, head_dim: int) -> dict[str, Any]:
        """As transformers 5 spells them; "freq_factors" is our own name for Llama 3's tensor."""
        theta = fields.number(f"{kind}.rope.freq_base", 1, 1e15, 10000.0)
        prefix = f"{kind}.rope.scaling."
        scaling = fields.text(prefix + "type", "none")
        if ROPE_FACTORS in self._file.tensors:
            factors = self._file.tensors[ROPE_FACTORS]
            if scaling != "none":
                raise fields.error(prefix + "type", f'"none" beside the tensor {ROPE_FACTORS}')
            if factors.type != "F32" or factors.shape != (head_dim // 2,):
                raise CheckpointError(
                    f"{self.path}: tensor {ROPE_FACTORS} is {factors.type} {list(factors.shape)}; "
                    f"it must be F32 [{head_dim // 2}]"
                )
            values = self._file.read_rows(ROPE_FACTORS, 0, head_dim // 2).tolist()
            return {"rope_type": "freq_factors", "rope_theta": theta, "factors": values}
        if scaling == "none":
            factor = fields.number(f"{kind}.rope.scale_linear", 1, 1e6, 1.0)  # how files of 2023 spell it
            return {"rope_type": "linear" if factor > 1 else "default", "rope_theta": theta, "factor": factor}
        if scaling not in ("linear", "yarn"):
            raise fields.error(prefix + "type", "one of none, linear, yarn")
        parameters: dict[str, Any] = {
            "rope_type": scaling,
            "rope_theta": theta,
            "factor": fields.number(prefix + "factor", 1, 1e6),
        }
        if fields.has(prefix + "original_context_length"):
            original = fields.integer(prefix + "original_context_length", 1, MAX_INT)
            parameters["original_max_position_embeddings"] = original
        return parameters


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; a name not known stays as it is."""
    match = LAYER_TENSOR.fullmatch(name)
    if match and match[2] in LAYER_NAMES:
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}"
    stem, _, suffix = name.rpartition(".")
    return f"{TOP_NAMES[stem]}.{suffix}" if stem in TOP_NAMES else name


def gguf_name(name: str) -> str | None:
    """The reverse of it; None for a tensor that llama.cpp has no name for."""
    stem, _, suffix = name.rpartition(".")
    match = HF_LAYER.fullmatch(stem)
    if match and match[2] in _GGUF_LAYER_NAMES:
        return f"blk.{match[1]}.{_GGUF_LAYER_NAMES[match[2]]}.{suffix}"
    return f"{_GGUF_TOP_NAMES[stem]}.{suffix}" if stem in _GGUF_TOP_NAMES else None


def to_half_rotation(rows: NDArray[Any], head_rows: int) -> NDArray[Any]:
    """GGUF's and Meta's q and k of Llama rotate neighbouring rows; Hugging Face's i and i + head_dim / 2."""
    pairs = rows.reshape(len(rows) // head_rows, head_rows // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def to_neighbour_rotation(rows: NDArray[Any], head_rows: int) -> NDArray[Any]:
    """The reverse of `to_half_rotation`."""
    halves = rows.reshape(len(rows) // head_rows, 2, head_rows // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _token_ids(fields: Fields) -> dict[str, Any]:
    ids = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        field = f"tokenizer.ggml.{key}_token_id"
        if fields.has(field) and fields.get(field) != 0xFFFFFFFF:  # how some files spell "none"
            ids[f"{name}_token_id"] = fields.integer(field, 0, MAX_INT)
    return ids


def _generation_config(fields: Fields) -> dict[str, Any]:
    """All tokens that end a text, and the sampling values that newer files recommend."""
    generation = _token_ids(fields)
    ends = [generation["eos_token_id"]] if "eos_token_id" in generation else []
    for key in ("eot", "eom"):  # end of turn, end of message
        if fields.has(f"tokenizer.ggml.{key}_token_id"):
            token = fields.integer(f"tokenizer.ggml.{key}_token_id", 0, MAX_INT)
            ends += [token] if token not in ends else []
    if ends:
        generation["eos_token_id"] = ends
    for key, name, high in (("temp", "temperature", 100.0), ("top_p", "top_p", 1.0), ("min_p", "min_p", 1.0)):
        if fields.has(f"general.sampling.{key}"):
            generation[name] = fields.number(f"general.sampling.{key}", 0, high)
    if fields.has("general.sampling.top_k"):
        generation["top_k"] = fields.integer("general.sampling.top_k", 0, MAX_INT)
    if fields.has("general.sampling.penalty_repeat"):
        generation["repetition_penalty"] = fields.number("general.sampling.penalty_repeat", 0, 100)
    return generation
