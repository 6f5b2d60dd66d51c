"""What a model asks to be packed: its matrices (some fused), its vectors and its embedding table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """A linear's weight: the rows of `parts` (Hugging Face names) stacked, [rows, cols].

    With `interleave`, blocks of 16 rows are taken from the parts in turn: gate, up, gate, up, ...
    `int4_as` is its format in an int4 model: some are worth more bits (benchmarks/DIARY.md).
    """

    name: str
    parts: tuple[str, ...]
    interleave: bool = False
    int4_as: str = "int4"


@dataclass(frozen=True)
class Vector:
    """A norm's weight or a bias, float32, in the same order of rows as the matrix of its parts."""

    name: str
    parts: tuple[str, ...]
    interleave: bool = False


@dataclass(frozen=True)
class Table:
    """An embedding, its rows left as they are: [vocab, hidden]."""

    name: str
    part: str


WeightSpec = Matrix | Vector | Table
