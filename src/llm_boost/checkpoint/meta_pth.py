"""Meta's own release of a Llama, params.json and a consolidated.NN.pth a rank, in Hugging Face's terms."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.fields import Fields, read_json_object, shown
from llm_boost.checkpoint.gguf_checkpoint import MAX_INT, to_half_rotation
from llm_boost.checkpoint.huggingface import read_generation_config, settings_bytes
from llm_boost.checkpoint.weight_files import Shard, open_shard
from llm_boost.errors import CheckpointError

RANK_FILE = re.compile(r"consolidated\.(\d+)\.pth")
TOP_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
# Meta's name of a layer's part -> Hugging Face's, and the axis that ranks cut (None: each has all of it)
LAYER_NAMES: dict[str, tuple[str, int | None]] = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
LAYER_TENSOR = re.compile(r"layers\.(\d+)\.(.+)\.weight")


class MetaCheckpoint:
    """`open_file` opens one rank's file; by default it needs torch, and says so."""

    format = "meta"

    def __init__(
        self, path: Path, hf_config: Mapping[str, Any] | None = None, open_file: Any = open_shard
    ) -> None:
        self.path = self.folder = path
        self.metadata: dict[str, Any] = {}
        self.generation_config = read_generation_config(path)
        self._ranks: Sequence[Shard] = [open_file(file) for file in _rank_files(path)]
        params = Fields(read_json_object(path / "params.json"), str(path / "params.json"))
        self._hidden_size = params.integer("dim", 1, MAX_INT)
        self._axes: dict[str, int | None] = {}
        self._source: dict[str, str] = {}
        tensors = {}
        for name in self._ranks[0].infos():
            if name == "rope.freqs":
                continue
            theirs, axis = self._located(name)
            tensors[theirs] = TensorInfo(
                theirs, self._whole_shape(name, axis), self._ranks[0].infos()[name].dtype
            )
            self._axes[theirs], self._source[theirs] = axis, name
        self.tensors: Mapping[str, TensorInfo] = tensors
        self.config = self._config(params, hf_config)

    def read(self, name: str) -> NDArray[Any]:
        """See Checkpoint.read."""
        return self.read_rows(name, 0, self._info(name).shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """See Checkpoint.read_rows."""
        rows = self._info(name).shape[0]
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start} to {stop} of {name}, which has {rows}")
        heads = self._interleaved_heads(name)
        if not heads:
            return self._stored_rows(name, start, stop)
        head_rows = rows // heads
        first, last = start // head_rows, -(-stop // head_rows)
        stored = self._stored_rows(name, first * head_rows, last * head_rows)
        return to_half_rotation(stored, head_rows)[start - first * head_rows : stop - first * head_rows]

    def fingerprint(self) -> str:
        """See Checkpoint.fingerprint."""
        digest = hashlib.sha256(settings_bytes(self.folder, self.config))
        for rank in self._ranks:
            stat = rank.path.stat()
            digest.update(f"{rank.path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def forget(self) -> None:
        """See Checkpoint.forget."""
        for rank in self._ranks:
            rank.forget()

    def close(self) -> None:
        """Lets go of the files; arrays already read stay valid."""
        for rank in self._ranks:
            rank.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {shown(name)}")
        return self.tensors[name]

    def _located(self, name: str) -> tuple[str, int | None]:
        """The Hugging Face name of a tensor, and the axis that its ranks cut."""
        match = LAYER_TENSOR.fullmatch(name)
        if match and match[2] in LAYER_NAMES:
            stem, axis = LAYER_NAMES[match[2]]
            return f"model.layers.{match[1]}.{stem}.weight", axis
        stem = name.removesuffix(".weight")
        if stem not in TOP_NAMES:
            raise CheckpointError(f"{self._ranks[0].path}: tensor {shown(name)} is none of a Llama's")
        if stem == "tok_embeddings":  # Llama 1 and 2 cut its columns, Llama 3 its rows
            columns = self._ranks[0].infos()[name].shape[-1]
            return f"{TOP_NAMES[stem]}.weight", 0 if columns == self._hidden_size else 1
        return f"{TOP_NAMES[stem]}.weight", 0 if stem == "output" else None

    def _whole_shape(self, name: str, axis: int | None) -> tuple[int, ...]:
        infos = []
        for rank in self._ranks:
            if name not in rank.infos():
                raise CheckpointError(
                    f"{rank.path}: tensor {shown(name)} is missing, {self._ranks[0].path.name} has it"
                )
            infos.append(rank.infos()[name])
            if infos[-1] != infos[0]:
                raise CheckpointError(
                    f"{rank.path}: tensor {shown(name)} is {infos[-1].dtype} {list(infos[-1].shape)}, in "
                    f"{self._ranks[0].path.name} {infos[0].dtype} {list(infos[0].shape)}"
                )
        shape = list(infos[0].shape)
        if axis is not None:
            shape[axis] *= len(infos)
        return tuple(shape)

    def _stored_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        source, axis = self._source[name], self._axes[name]
        if axis is None or len(self._ranks) == 1:
            return self._ranks[0].read_rows(source, start, stop)
        if axis == 1:
            return np.concatenate([rank.read_rows(source, start, stop) for rank in self._ranks], axis=1)
        share = self.tensors[name].shape[0] // len(self._ranks)
        parts = [
            rank.read_rows(source, max(start - at, 0), min(stop - at, share))
            for at, rank in zip(range(0, share * len(self._ranks), share), self._ranks, strict=True)
            if start < at + share and at < stop
        ]
        return np.concatenate(parts) if parts else self._ranks[0].read_rows(source, 0, 0)

    def _interleaved_heads(self, name: str) -> int:
        if ".self_attn.q_proj." in name:
            return int(self.config["num_attention_heads"])
        return int(self.config["num_key_value_heads"]) if ".self_attn.k_proj." in name else 0

    def _config(self, params: Fields, hf_config: Mapping[str, Any] | None) -> dict[str, Any]:
        """config.json beside the files, or what stands in for it, or what params.json and the tensors say."""
        if (self.folder / "config.json").is_file():
            config = read_json_object(self.folder / "config.json")
        else:
            config = dict(hf_config) if hf_config is not None else self._config_from(params)
        fields = Fields(config, str(self.folder / "config.json"))
        heads = fields.integer("num_attention_heads", 1, MAX_INT)
        config["num_key_value_heads"] = kv_heads = fields.integer("num_key_value_heads", 1, heads, heads)
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            rows = self._info(f"model.layers.0.self_attn.{part}.weight").shape[0]
            if rows % (2 * count):
                raise CheckpointError(
                    f"{self.path}: {part} has {rows} rows, which {count} heads do not divide"
                )
        return config

    def _config_from(self, params: Fields) -> dict[str, Any]:
        heads = params.integer("n_heads", 1, MAX_INT)
        vocab_size, hidden_size = self._info("model.embed_tokens.weight").shape
        theta = params.number("rope_theta", 1, 1e15, 10000.0)
        scaled = params.flag("use_scaled_rope", False)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": self._info("model.layers.0.mlp.gate_proj.weight").shape[0],
            "num_hidden_layers": params.integer("n_layers", 1, MAX_INT),
            "num_attention_heads": heads,
            "num_key_value_heads": params.integer("n_kv_heads", 1, heads, heads),
            "max_position_embeddings": _positions(params, theta, scaled),
            "rms_norm_eps": params.number("norm_eps", 0, 1, 1e-5),
            "rope_theta": theta,
            "rope_scaling": _scaling(hidden_size) if scaled else None,
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "bos_token_id": 128000 if vocab_size == 128256 else 1,
            "eos_token_id": 128001 if vocab_size == 128256 else 2,
        }


def _positions(params: Fields, theta: float, scaled: bool) -> int:
    """params.json does not tell; the generations of the model differ in what it tells instead."""
    if scaled:
        return 131072  # Llama 3.1, 3.2
    if theta == 500000:
        return 8192  # Llama 3
    if theta > 10000:
        return 16384  # Code Llama
    return 4096 if params.number("norm_eps", 0, 1, 1e-5) > 5e-6 else 2048  # Llama 2, Llama 1


def _scaling(hidden_size: int) -> dict[str, Any]:
    """Of Llama 3.1 and 3.2, as published: the small models of 3.2 stretch 32 times, all others 8."""
    return {
        "rope_type": "llama3",
        "factor": 32.0 if hidden_size <= 3072 else 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _rank_files(path: Path) -> list[Path]:
    found = {int(match[1]): file for file in path.iterdir() if (match := RANK_FILE.fullmatch(file.name))}
    for number in range(len(found)):
        if number not in found:
            raise CheckpointError(
                f"{path}: consolidated.{number:02}.pth is missing; there are {len(found)} files"
            )
    if not (path / "params.json").is_file():
        raise CheckpointError(f"{path}: params.json is missing; Meta's weights have one beside them")
    return [found[number] for number in sorted(found)]
