"""MindFormers' parameter names beside Hugging Face's: one table, read in both directions.

Matrices are the same in both, [out, in], and rotate half against half: names differ, and with `qkv_concat` q,
k and v are one matrix, gate and up another, whose rows come in one of several orders (`LAYOUTS`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# mindformers/models/llama/convert_weight.py and research/qwen2_5/convert_weight.py
LLAMA = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.layers.N.input_layernorm": "model.layers.N.attention_norm",
    "model.layers.N.self_attn.q_proj": "model.layers.N.attention.wq",
    "model.layers.N.self_attn.k_proj": "model.layers.N.attention.wk",
    "model.layers.N.self_attn.v_proj": "model.layers.N.attention.wv",
    "model.layers.N.self_attn.o_proj": "model.layers.N.attention.wo",
    "model.layers.N.post_attention_layernorm": "model.layers.N.ffn_norm",
    "model.layers.N.mlp.gate_proj": "model.layers.N.feed_forward.w1",
    "model.layers.N.mlp.down_proj": "model.layers.N.feed_forward.w2",
    "model.layers.N.mlp.up_proj": "model.layers.N.feed_forward.w3",
    "model.norm": "model.norm_out",
    "lm_head": "lm_head",
}
# mindformers/models/qwen3/utils.py: the names of its newer core
QWEN3 = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.layers.N.input_layernorm": "decoder.layers.N.input_layernorm",
    "model.layers.N.self_attn.q_proj": "decoder.layers.N.self_attention.linear_q",
    "model.layers.N.self_attn.k_proj": "decoder.layers.N.self_attention.linear_k",
    "model.layers.N.self_attn.v_proj": "decoder.layers.N.self_attention.linear_v",
    "model.layers.N.self_attn.q_norm": "decoder.layers.N.self_attention.q_layernorm",
    "model.layers.N.self_attn.k_norm": "decoder.layers.N.self_attention.k_layernorm",
    "model.layers.N.self_attn.o_proj": "decoder.layers.N.self_attention.linear_proj",
    "model.layers.N.post_attention_layernorm": "decoder.layers.N.pre_mlp_layernorm",
    "model.layers.N.mlp.gate_proj": "decoder.layers.N.mlp.gating",
    "model.layers.N.mlp.down_proj": "decoder.layers.N.mlp.linear_fc2",
    "model.layers.N.mlp.up_proj": "decoder.layers.N.mlp.hidden",
    "model.norm": "decoder.final_layernorm",
    "lm_head": "output_layer",
}
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": QWEN3}  # by Hugging Face's model_type

# Concatenated: MindFormers' name -> the parts, by Hugging Face's
CONCATENATED = {
    "model.layers.N.attention.w_qkv": tuple(f"model.layers.N.self_attn.{x}_proj" for x in "qkv"),
    "model.layers.N.feed_forward.w_gate_hidden": (
        "model.layers.N.mlp.gate_proj",
        "model.layers.N.mlp.up_proj",
    ),
}
# How rows of the parts are joined: `plain`, one part after the other (MindFormers 1.3, and what MindSpore's
# llm_boost makes in memory); `grouped`, each key head's q, k and v together and gate and up row by row, so
# that ranks can cut it by rows (`qkv_concat` of MindFormers 1.5 and later, from Megatron);
# `grouped_plain_bias`, which is that with biases plain, as its Llama converter writes them.
LAYOUTS = ("grouped", "grouped_plain_bias", "plain")

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a MindFormers parameter that stands alone; None for any other."""
    return _renamed(name, _TO_HF)


def mindformers_name(name: str, model_type: str) -> str | None:
    """The MindFormers name of a Hugging Face tensor; None for one that MindFormers has no name for."""
    return _renamed(name, FAMILIES.get(model_type, LLAMA))


def concatenated_parts(name: str) -> tuple[str, ...]:
    """The Hugging Face names of what a concatenated MindFormers parameter holds; () for any other."""
    stem, number, suffix = _split(name)
    if suffix not in ("weight", "bias"):
        return ()
    return tuple(f"{_numbered(part, number)}.{suffix}" for part in CONCATENATED.get(stem, ()))


def concatenated_name(name: str) -> str | None:
    """The concatenated MindFormers parameter that a Hugging Face tensor is a part of; None for any other."""
    stem, number, suffix = _split(name)
    for joined, parts in CONCATENATED.items():
        if stem in parts:
            return f"{_numbered(joined, number)}.{suffix}"
    return None


def is_mindformers(names: Iterable[str]) -> bool:
    """Whether a checkpoint's names are MindFormers' (a head has the same name in both)."""
    return any(
        name.startswith(("model.tok_embeddings.", "embedding.word_embeddings.", "decoder.layers."))
        or ".attention.w" in name
        or ".feed_forward.w" in name
        for name in names
    )


@dataclass(frozen=True)
class RowOrder:
    """Row r of the whole is row `row[r]` of part `part[r]`; rows of one part keep their order."""

    part: NDArray[np.intp]
    row: NDArray[np.intp]

    def rows_of(self, part: int) -> NDArray[np.intp]:
        """Where in the whole the rows of a part stand, in order."""
        return np.flatnonzero(self.part == part)


def row_order(name: str, layout: str, sizes: tuple[int, ...], head_dim: int) -> RowOrder:
    """How the parts of the concatenated parameter `name`, `sizes` rows each, make its rows in `layout`.

    In a rank's share of a model the sizes are the rank's. Recipe of the grouped layouts:
    mindformers/utils/convert_utils.py.
    """
    plain = layout == "plain" or (layout == "grouped_plain_bias" and name.endswith(".bias"))
    if plain:
        runs = [(part, 0, size) for part, size in enumerate(sizes)]
    elif len(sizes) == 2:
        part = np.tile(np.arange(2, dtype=np.intp), sizes[0])
        return RowOrder(part, np.repeat(np.arange(sizes[0], dtype=np.intp), 2))
    else:
        groups = sizes[1] // head_dim
        steps = (sizes[0] // groups, head_dim, head_dim)
        runs = [
            (part, group * step, (group + 1) * step)
            for group in range(groups)
            for part, step in enumerate(steps)
        ]
    return RowOrder(
        np.concatenate([np.full(stop - start, part, dtype=np.intp) for part, start, stop in runs]),
        np.concatenate([np.arange(start, stop, dtype=np.intp) for _, start, stop in runs]),
    )


def _renamed(name: str, table: dict[str, str]) -> str | None:
    if name in table:
        return table[name]
    stem, number, suffix = _split(name)
    if stem not in table or suffix not in ("weight", "bias"):
        return None
    return f"{_numbered(table[stem], number)}.{suffix}"


def _split(name: str) -> tuple[str, str, str]:
    """`model.layers.3.mlp.up_proj.weight` -> (`model.layers.N.mlp.up_proj`, `3`, `weight`)."""
    stem, _, suffix = name.rpartition(".")
    match = _LAYER.search(stem)
    if match is None:
        return stem, "", suffix
    return f"{stem[: match.start()]}.layers.N.{stem[match.end() :]}", match[1], suffix


def _numbered(stem: str, number: str) -> str:
    return stem.replace(".N.", f".{number}.", 1)


_TO_HF = {ours: theirs for table in (LLAMA, QWEN3) for theirs, ours in table.items()}
