"""The strategy of a decoder on N ranks: which matrix is cut along which axis, and into heads that stay whole.

Column-parallel (rows cut): q, k, v, gate, up and the head. Row-parallel (columns cut): o and down; their sums
meet on all ranks. Key and value heads are dealt out; where there are more ranks than heads, neighbouring
ranks repeat one. Everything else lies whole on every rank. As in MindFormers' llm_boost an embedding table
of 128,256 tokens or more is cut by columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llm_boost.checkpoint.mindformers_names import concatenated_parts, hf_name
from llm_boost.checkpoint.parallel.layout import Layout
from llm_boost.checkpoint.parallel.strategy import Strategy
from llm_boost.errors import CheckpointError

LARGE_VOCABULARY = 128_256

_COLUMN = ("q_proj", "gate_proj", "up_proj", "lm_head")
_KEY_VALUE = ("k_proj", "v_proj")
_ROW = ("o_proj", "down_proj")
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Heads:
    query: int
    key_value: int


@dataclass(frozen=True)
class Mesh:
    """`model` ranks share each matrix, `data` copies of them stand side by side, `stages` in line."""

    model: int
    data: int = 1
    stages: int = 1

    @property
    def ranks(self) -> int:
        return self.model * self.data * self.stages


def decoder_strategy(
    parameters: Mapping[str, tuple[int, ...]], heads: Heads, mesh: Mesh, vocab_emb_dp: bool = False
) -> Strategy:
    """How `parameters` (by MindFormers' or Hugging Face's names, whole shapes) lie on `mesh`.

    `vocab_emb_dp` keeps the head whole on every rank. A concatenated `w_qkv` is cut by rows, which is
    right for the grouped order of rows alone (`mindformers_names.LAYOUTS`).

    Raises:
        CheckpointError: heads or sizes that do not divide; it names the numbers of ranks that would do.
    """
    problem = _obstacle(parameters, heads, mesh.model, vocab_emb_dp)
    if problem:
        possible = [
            ranks
            for ranks in range(1, heads.query + 1)
            if _obstacle(parameters, heads, ranks, vocab_emb_dp) is None
        ]
        raise CheckpointError(
            f"{mesh.model} ranks: {problem}; this model divides among {', '.join(map(str, possible))}"
        )
    layers = 1 + max((int(match[1]) for name in parameters if (match := _LAYER.search(name))), default=-1)
    if mesh.stages > 1 and (layers < mesh.stages or layers % mesh.stages):
        fitting = [n for n in range(1, layers + 1) if layers % n == 0]
        raise CheckpointError(
            f"pipeline_stage {mesh.stages}: {layers} layers do not divide; "
            f"they do into {', '.join(map(str, fitting))} stages"
        )
    stages: list[dict[str, Layout]] = [{} for _ in range(mesh.stages)]
    for name, shape in parameters.items():
        layout = _layout(name, shape, heads, mesh, vocab_emb_dp)
        stages[_stage(name, layers, mesh.stages)][name] = layout
    return Strategy(tuple(stages), f"the strategy of {mesh.ranks} ranks")


def _layout(name: str, shape: tuple[int, ...], heads: Heads, mesh: Mesh, vocab_emb_dp: bool) -> Layout:
    cut = [(axis, parts) for axis, parts in _cuts(name, shape, heads, mesh.model, vocab_emb_dp) if parts > 1]
    parts_of_dimension = [dict(cut).get(axis, 1) for axis in range(len(shape))]
    cut_into = max(parts_of_dimension, default=1)
    repeats = mesh.model // cut_into
    # The outer axis repeats for data parallelism, the inner one lets neighbours hold the same key head.
    dev_matrix = [
        *([mesh.data] if mesh.data > 1 else []),
        *parts_of_dimension,
        *([repeats] if repeats > 1 else []),
    ]
    first = 1 if mesh.data > 1 else 0
    if not cut:
        return Layout((mesh.model * mesh.data,), ((),) * len(shape), shape)
    axes = tuple((first + axis,) for axis in range(len(shape)))
    return Layout(
        tuple(dev_matrix), axes, tuple(n // p for n, p in zip(shape, parts_of_dimension, strict=True))
    )


def _cuts(
    name: str, shape: tuple[int, ...], heads: Heads, ranks: int, vocab_emb_dp: bool
) -> Iterator[tuple[int, int]]:
    """The axis of a parameter that is cut, and into how many parts."""
    if concatenated_parts(name):
        yield 0, ranks
        return
    known = hf_name(name) or name
    *_, module, kind = ("", *known.split("."))
    if module in _KEY_VALUE:
        yield 0, min(ranks, heads.key_value)
    elif module in _COLUMN and not (module == "lm_head" and vocab_emb_dp):
        yield 0, ranks
    elif (module in _ROW and kind == "weight") or (module == "embed_tokens" and shape[0] >= LARGE_VOCABULARY):
        yield 1, ranks


def _obstacle(
    parameters: Mapping[str, tuple[int, ...]], heads: Heads, ranks: int, vocab_emb_dp: bool
) -> str | None:
    """Why so many ranks cannot share the model; None where they can."""
    if heads.query % ranks:
        return f"num_attention_heads {heads.query} do not divide among them"
    if heads.key_value % ranks and ranks % heads.key_value:
        return f"num_key_value_heads {heads.key_value} neither divide among them nor can be repeated evenly"
    for name, shape in parameters.items():
        if ranks > heads.key_value and "w_qkv" in name:
            return (
                f"parameter {name} joins {heads.key_value} key heads with their queries, and cannot repeat "
                "them (llm-boost convert separates it)"
            )
        for axis, parts in _cuts(name, shape, heads, ranks, vocab_emb_dp):
            if axis >= len(shape) or shape[axis] % parts:
                return f"parameter {name} {list(shape)} does not divide into {parts} along axis {axis}"
    return None


def _stage(name: str, layers: int, stages: int) -> int:
    """Layers are dealt out evenly; the embedding stands before the first, norm and head behind the last."""
    match = _LAYER.search(name)
    if match:
        return int(match[1]) * stages // layers
    return 0 if "embed" in name else stages - 1
