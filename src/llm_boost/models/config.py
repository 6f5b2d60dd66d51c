"""config.json becomes a ModelConfig: every value checked, and every tensor that the model must have."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_boost.checkpoint.checkpoint import Checkpoint
from llm_boost.checkpoint.fields import Fields, shown
from llm_boost.errors import CheckpointError
from llm_boost.models.rope import MAX_POSITIONS, RopeConfig, check_rope

# architectures -> model_type; a config.json without `architectures` is known by its model_type
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPES = ("float32", "float16", "bfloat16")

# No published model comes near these; a larger number is a damaged file.
MAX_VOCAB, MAX_WIDTH, MAX_LAYERS, MAX_HEADS = 1 << 24, 1 << 20, 4096, 8192


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder of the Llama family is made of. Sizes count elements; flags say what exists."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int  # never more than the sliding window, beyond which attention would differ
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    hidden_act: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    torch_dtype: str  # what the weights were saved as
    sliding_window: int | None

    @property
    def max_model_len(self) -> int:
        """The longest sequence it may read: its positions, stretched by rope scaling, within the window."""
        length = self.max_position_embeddings
        if self.rope.rope_type == "yarn":
            length = max(length, int(self.rope.original_max_position_embeddings * self.rope.factor))
        else:
            length = int(length * self.rope.length_factor)
        return min(length, self.sliding_window or length)

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], source: str, tensors: Mapping[str, Any] | None = None
    ) -> ModelConfig:
        """Checks a config.json.

        Args:
            config: its keys, in the spelling of transformers 4 or 5.
            source: the file's name, for messages.
            tensors: the checkpoint's, by name; they settle what config leaves out (biases, tied head).

        Raises:
            CheckpointError: an architecture that is not supported, or a value that cannot be.
        """
        architecture = _architecture(config, source)
        fields = Fields(config, source)
        _refuse_variants(fields)
        hidden_size = fields.integer("hidden_size", 1, MAX_WIDTH)
        num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
        num_kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, num_heads)
        if num_heads % num_kv_heads:
            raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
        num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
        positions = fields.integer("max_position_embeddings", 1, MAX_POSITIONS)
        window = _sliding_window(fields, architecture, num_layers)
        head_dim = _head_dim(fields, architecture, hidden_size, num_heads)
        rope = RopeConfig.from_hf(config, source, positions)
        check_rope(rope, head_dim, source)
        vocab_size = fields.integer("vocab_size", 1, MAX_VOCAB)
        attention = "model.layers.0.self_attn."
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size", 1, MAX_WIDTH),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 0, 1, 1e-6),
            max_position_embeddings=min(positions, window or positions),
            rope=rope,
            tie_word_embeddings=fields.flag("tie_word_embeddings", _lacks(tensors, "lm_head.weight")),
            qkv_bias=architecture == "Qwen2ForCausalLM"
            or fields.flag("attention_bias", _has(tensors, attention + "q_proj.bias")),
            o_bias=architecture != "Qwen2ForCausalLM"
            and fields.flag("attention_bias", _has(tensors, attention + "o_proj.bias")),
            mlp_bias=fields.flag("mlp_bias", _has(tensors, "model.layers.0.mlp.gate_proj.bias")),
            qk_norm=architecture == "Qwen3ForCausalLM",
            hidden_act="silu",
            bos_token_id=_token_id(fields, "bos_token_id"),
            eos_token_ids=_token_ids(fields, "eos_token_id"),
            pad_token_id=_token_id(fields, "pad_token_id"),
            torch_dtype=_dtype(fields),
            sliding_window=window,
        )


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model needs: Hugging Face name -> shape (a matrix is [out, in])."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = [
        ("self_attn.q_proj", q_size, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv_size, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv_size, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q_size, config.o_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    ]
    norms = [("input_layernorm", hidden), ("post_attention_layernorm", hidden)]
    if config.qk_norm:
        norms += [("self_attn.q_norm", config.head_dim), ("self_attn.k_norm", config.head_dim)]

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in (f"model.layers.{i}." for i in range(config.num_layers)):
        for name, rows, cols, bias in linears:
            shapes[f"{layer}{name}.weight"] = (rows, cols)
            if bias:
                shapes[f"{layer}{name}.bias"] = (rows,)
        for name, size in norms:
            shapes[f"{layer}{name}.weight"] = (size,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_tensors(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Compares a checkpoint's tensors with those the model needs; warns once of those it does not know.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or a head said to be tied is not.
    """
    expected = expected_tensors(config)
    for name, shape in expected.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} {list(shape)} is missing")
        if info.shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {list(info.shape)}, "
                f"config.json makes it {list(shape)}"
            )
    if config.tie_word_embeddings and "lm_head.weight" in checkpoint.tensors:
        _check_tied(checkpoint)
    unknown = [name for name in checkpoint.tensors if name not in expected and not _is_derived(name)]
    if unknown:
        warnings.warn(
            f"{checkpoint.path}: {len(unknown)} tensors are not part of the model and are not used: "
            f"{shown(unknown, 200)}",
            stacklevel=2,
        )


def _is_derived(name: str) -> bool:
    """Tensors that some checkpoints carry though the others imply them."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def _check_tied(checkpoint: Checkpoint) -> None:
    """A saved copy of a tied head must be a copy; its first rows tell."""
    embedding, head = checkpoint.tensors["model.embed_tokens.weight"], checkpoint.tensors["lm_head.weight"]
    rows = min(embedding.shape[0], 64)
    if embedding.shape == head.shape and np.array_equal(
        checkpoint.read_rows(embedding.name, 0, rows), checkpoint.read_rows(head.name, 0, rows)
    ):
        return
    raise CheckpointError(
        f"{checkpoint.path}: config.json: tie_word_embeddings is true, but lm_head.weight differs from "
        "model.embed_tokens.weight; set it to false, or remove lm_head.weight"
    )


def _architecture(config: Mapping[str, Any], source: str) -> str:
    names = config.get("architectures")
    if names is None:
        names = [name for name, model_type in ARCHITECTURES.items() if model_type == config.get("model_type")]
    if isinstance(names, list):
        for name in names:
            if isinstance(name, str) and name in ARCHITECTURES:
                return name
    found = config["architectures"] if config.get("architectures") else config.get("model_type")
    raise CheckpointError(f"{source}: architectures is {shown(found)}; supported: {', '.join(ARCHITECTURES)}")


def _refuse_variants(fields: Fields) -> None:
    """Settings that change the arithmetic into one that is not written here."""
    if fields.get("hidden_act") not in (None, "silu", "swish"):
        raise fields.error("hidden_act", '"silu"')
    if fields.has("quantization_config"):
        raise fields.error(
            "quantization_config", "absent: give the unquantised model, or a quantised one as GGUF"
        )
    layer_types = fields.get("layer_types") or []
    if not isinstance(layer_types, list) or any(
        kind not in ("full_attention", "sliding_attention") for kind in layer_types
    ):
        raise fields.error("layer_types", 'a list of "full_attention" and "sliding_attention"')


def _sliding_window(fields: Fields, architecture: str, num_layers: int) -> int | None:
    """The window of any layer that has one; within it attention is the full one."""
    if architecture == "LlamaForCausalLM" or not fields.has("sliding_window"):
        return None
    if architecture != "MistralForCausalLM":
        all_full = fields.integer("max_window_layers", 0, MAX_LAYERS, num_layers) >= num_layers
        if not fields.flag("use_sliding_window", False) or all_full:
            return None
    return fields.integer("sliding_window", 1, MAX_POSITIONS)


def _head_dim(fields: Fields, architecture: str, hidden_size: int, num_heads: int) -> int:
    if fields.has("head_dim"):
        return fields.integer("head_dim", 1, 4096)
    if architecture == "Qwen3ForCausalLM":
        return 128  # the class's default, which does not follow hidden_size
    if hidden_size % num_heads:
        raise fields.error("hidden_size", f"a multiple of num_attention_heads, {num_heads}, without head_dim")
    return hidden_size // num_heads


def _token_ids(fields: Fields, key: str) -> tuple[int, ...]:
    value = fields.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or token >= MAX_VOCAB for token in ids):
        raise fields.error(key, "a token id, a list of them or null")
    return tuple(token for token in ids if token >= 0)  # -1 is how some files spell "none"


def _token_id(fields: Fields, key: str) -> int | None:
    ids = _token_ids(fields, key)
    return ids[0] if ids else None


def _dtype(fields: Fields) -> str:
    key = "dtype" if fields.has("dtype") else "torch_dtype"
    name = fields.text(key, "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise fields.error(key, f"one of {', '.join(DTYPES)}")
    return name


def _has(tensors: Mapping[str, Any] | None, name: str) -> bool:
    return tensors is not None and name in tensors


def _lacks(tensors: Mapping[str, Any] | None, name: str) -> bool:
    return tensors is not None and name not in tensors
