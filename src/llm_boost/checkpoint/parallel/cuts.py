"""Where a rank's part of a parameter lies in the whole, and whether a strategy fits a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from llm_boost.checkpoint.fields import shown
from llm_boost.checkpoint.mindformers_names import LAYOUTS, concatenated_parts, hf_name
from llm_boost.checkpoint.parallel.layout import Box, Layout
from llm_boost.checkpoint.parallel.strategy import Strategy
from llm_boost.checkpoint.parallel.tensor_parallel import Heads
from llm_boost.errors import CheckpointError
from llm_boost.suggest import did_you_mean

# MindFormers' llm_boost wrote hidden_size for the sizes of these; their dev_matrix and tensor_map are right.
_SHAPES_OFTEN_WRONG = re.compile(r"\.(attention\.w[kv]|feed_forward\.w[123])\.(weight|bias)$")
_LINEAR = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")


@dataclass(frozen=True)
class Joined:
    """How rows of concatenated parameters are ordered (`mindformers_names.LAYOUTS`), and their heads."""

    row_layout: str | None = None
    heads: Heads | None = None

    def runs(self, name: str, rows: int, layout: Layout) -> tuple[int, ...]:
        """The runs of rows that are cut each for itself: all of them, or those of each part.

        Raises:
            CheckpointError: the order is not known, or ranks cannot share such rows.
        """
        parts = concatenated_parts(name)
        cut_into = layout.parts[0] if layout.parts else 1
        if not parts or cut_into == 1:
            return (rows,)
        if self.row_layout is None:
            raise CheckpointError(
                f"parameter {name} is concatenated, in an order that no file tells, and cut by rows: "
                f"give --qkv_layout ({', '.join(LAYOUTS)})"
            )
        plain = self.row_layout == "plain" or (
            self.row_layout == "grouped_plain_bias" and name.endswith(".bias")
        )
        if len(parts) == 2:
            sizes: tuple[int, ...] = (rows // 2, rows // 2)
            units = rows // 2
        elif self.heads is None:
            raise CheckpointError(
                f"parameter {name} is concatenated: its heads are those of a config.json, and none is there"
            )
        else:
            heads = self.heads.query, self.heads.key_value, self.heads.key_value
            sizes = tuple(rows * each // sum(heads) for each in heads)
            units = self.heads.key_value
        if sum(sizes) != rows or units % cut_into:
            raise CheckpointError(
                f"parameter {name} joins {len(parts)} matrices in {rows} rows, which {cut_into} ranks cannot "
                f"share by {'key heads' if len(parts) == 3 else 'rows'} ({units} of them); "
                "llm-boost convert separates it"
            )
        return sizes if plain else (rows,)


def local_boxes(layout: Layout, rank: int, whole: Sequence[int], runs: Sequence[int]) -> list[Box]:
    """What `rank` of a stage holds of a tensor, in the order of its own rows; each run is cut for itself."""
    if len(runs) <= 1:
        return [layout.box(rank, whole)]
    boxes = []
    for start, size in zip(accumulate(runs, initial=0), runs, strict=False):
        (first, last), *rest = layout.box(rank, (size, *whole[1:]))
        boxes.append(((start + first, start + last), *rest))
    return boxes


def check_names(strategy: Strategy, names: Collection[str], where: str) -> None:
    """A strategy must name the linear layers of a checkpoint, and no weight that this lacks.

    Norms, embeddings and unknown parameters may be unnamed: they lie whole on every rank. A strategy may
    name biases, a head and an optimizer's state that are not there.
    """
    named = set(strategy.names)
    for name in names:
        if name not in named and _is_linear(name):
            raise CheckpointError(
                f"{where}: has parameter {shown(name)}, which {strategy.source} does not name"
                f"{did_you_mean(name, named)}"
            )
    for name in strategy.names:
        known = hf_name(name) or (concatenated_parts(name) or ("",))[0]
        if name not in names and known.endswith(".weight") and known != "lm_head.weight":
            raise CheckpointError(
                f"{where}: has no parameter {shown(name)}, which {strategy.source} names"
                f"{did_you_mean(name, names)}"
            )
    if not named & set(names):
        raise CheckpointError(f"{where}: has none of the parameters that {strategy.source} names")


def check_shape(name: str, layout: Layout, local: Sequence[int], source: str, where: str) -> None:
    """The shape of a rank's part must be the one that the strategy states, if it does."""
    stated = layout.split_shape
    if not stated or tuple(stated) == tuple(local) or _SHAPES_OFTEN_WRONG.search(name):
        return
    raise CheckpointError(
        f"{where}: parameter {shown(name)} is {list(local)} on a rank, but {source} says {list(stated)}; "
        "it is the strategy of another model"
    )


def _is_linear(name: str) -> bool:
    return any(_LINEAR.search(each) for each in _hf_names(name))


def _hf_names(name: str) -> Iterable[str]:
    return concatenated_parts(name) or (hf_name(name) or name,)
