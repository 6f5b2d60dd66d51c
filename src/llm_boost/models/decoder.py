"""The decoder that Llama, Mistral, Qwen2 and Qwen3 share: pre-norm, grouped-query attention, SwiGLU.

They differ in what ModelConfig's flags say: biases (Qwen2), norms of q and k (Qwen3), a tied head.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from llm_boost.models.config import ModelConfig
from llm_boost.models.plan_builder import PlanWords
from llm_boost.models.rope import RopeTable
from llm_boost.models.weights import Matrix, Table, Vector, WeightSpec

_CENTRED_POSITIONS = 1024


def weights(config: ModelConfig) -> Iterator[WeightSpec]:
    """What to pack, in the order in which a step reads it."""
    yield Table("embed", "model.embed_tokens.weight")
    for i in range(config.num_layers):
        hf, ours = f"model.layers.{i}.", f"layers.{i}."
        q, k, v = (f"{hf}self_attn.{x}_proj" for x in "qkv")
        gate_up = (f"{hf}mlp.gate_proj", f"{hf}mlp.up_proj")
        yield Vector(ours + "attention_norm", (f"{hf}input_layernorm.weight",))
        yield Matrix(ours + "qk", (f"{q}.weight", f"{k}.weight"))
        yield Matrix(ours + "v", (f"{v}.weight",), int4_as="int8")
        if config.qkv_bias:
            yield Vector(ours + "qk.bias", (f"{q}.bias", f"{k}.bias"))
            yield Vector(ours + "v.bias", (f"{v}.bias",))
        if config.qk_norm:
            yield Vector(ours + "q_norm", (f"{hf}self_attn.q_norm.weight",))
            yield Vector(ours + "k_norm", (f"{hf}self_attn.k_norm.weight",))
        yield Matrix(ours + "o", (f"{hf}self_attn.o_proj.weight",))
        if config.o_bias:
            yield Vector(ours + "o.bias", (f"{hf}self_attn.o_proj.bias",))
        yield Vector(ours + "mlp_norm", (f"{hf}post_attention_layernorm.weight",))
        yield Matrix(ours + "gate_up", tuple(f"{x}.weight" for x in gate_up), interleave=True)
        if config.mlp_bias:
            yield Vector(ours + "gate_up.bias", tuple(f"{x}.bias" for x in gate_up), interleave=True)
        yield Matrix(ours + "down", (f"{hf}mlp.down_proj.weight",))
        if config.mlp_bias:
            yield Vector(ours + "down.bias", (f"{hf}mlp.down_proj.bias",))
    yield Vector("norm", ("model.norm.weight",))
    if config.tie_word_embeddings:
        yield Matrix("head", ("model.embed_tokens.weight",), int4_as="int6")
    else:
        yield Matrix("head", ("lm_head.weight",))


def build(b: PlanWords, config: ModelConfig) -> None:
    """A step: tokens [T] -> logits [R, vocab]."""
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    eps = config.rms_norm_eps
    x = b.buffer(config.hidden_size)  # the residual stream, float32
    qkv = b.buffer(q_size + 2 * kv_size)
    attended = b.buffer(q_size)
    inner = b.buffer(config.intermediate_size)

    rope = RopeTable(config, config.max_model_len)

    b.embed("embed", out=x)
    for i in range(config.num_layers):
        layer = f"layers.{i}."
        b.linear(b.rms_norm(x, layer + "attention_norm", eps), layer + "qk", layer + "v", out=qkv)
        b.attention(
            qkv,
            i,
            out=attended,
            head_dim=config.head_dim,
            eps=eps,
            q_norm=layer + "q_norm",
            k_norm=layer + "k_norm",
            k_centre=_key_centre(b, config, rope, layer),
        )
        b.linear(attended, layer + "o", out=x, epilogue="add")
        b.linear(b.rms_norm(x, layer + "mlp_norm", eps), layer + "gate_up", out=inner, epilogue="silu_mul")
        b.linear(inner, layer + "down", out=x, epilogue="add")
    b.logits(b.rms_norm(x, "norm", eps), "head")


def _key_centre(b: PlanWords, config: ModelConfig, rope: RopeTable, layer: str) -> NDArray[np.float32] | None:
    """Where the bias puts keys on average: Qwen2's is far larger than what tells keys apart."""
    bias = b.vector(layer + "qk.bias")
    if bias is None or config.qk_norm:
        return None
    keys = bias[config.num_heads * config.head_dim :].reshape(config.num_kv_heads, config.head_dim)
    return rope.mean_rotation(keys, min(_CENTRED_POSITIONS, config.max_model_len))
