"""A tensor whose parts lie in several files: any box of it, some rows at a time, bytes as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.parallel.layout import Box
from llm_boost.checkpoint.safetensors_reader import DTYPES
from llm_boost.checkpoint.safetensors_writer import TensorSpec
from llm_boost.checkpoint.weight_files import Shard

CHUNK_BYTES = 16 << 20  # of rows held at a time

CODES = {dtype.name: code for code, dtype in DTYPES.items()}  # numpy's name -> safetensors'


@dataclass(frozen=True)
class Piece:
    """`box` of the whole stands in `shard` as rows from `row` on of the tensor `name`."""

    box: Box
    shard: Shard
    name: str
    row: int = 0

    def read(self, box: Box) -> NDArray[Any]:
        """What it has of `box`, which must meet its own."""
        if not box:
            return self.shard.read(self.name)
        (first, _), *_ = self.box
        (start, stop), *rest = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, self.box, strict=True)]
        rows = self.shard.read_rows(self.name, self.row + start - first, self.row + stop - first)
        inner = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(rest, self.box[1:], strict=True))
        return rows[(slice(None), *inner)]


@dataclass(frozen=True)
class PiecedTensor:
    """`pieces` cover the whole, each element once."""

    info: TensorInfo
    pieces: tuple[Piece, ...]

    def spec(self, name: str, shape: Sequence[int]) -> TensorSpec:
        """A part of the tensor, of that shape, as it is written."""
        return TensorSpec(name, CODES[self.info.dtype], tuple(shape))

    def read(self, box: Box) -> NDArray[Any]:
        """The elements of `box`: a view of the file where one piece has them all."""
        met = [piece for piece in self.pieces if meets(piece.box, box)]
        if len(met) == 1:
            return met[0].read(box)
        dtype = DTYPES[CODES[self.info.dtype]]
        out = np.empty([stop - start for start, stop in box], dtype)
        for piece in met:
            place = tuple(
                slice(max(a, c) - a, min(b, d) - a) for (a, b), (c, d) in zip(box, piece.box, strict=True)
            )
            out[place] = piece.read(box)
        return out

    def rows(self, boxes: Sequence[Box]) -> Iterator[NDArray[Any]]:
        """The boxes' elements one after the other, as chunks of whole rows of about CHUNK_BYTES."""
        for box in boxes:
            if not box:
                yield self.read(box)
                continue
            (start, stop), *rest = box
            row_bytes = math.prod(b - a for a, b in rest) * DTYPES[CODES[self.info.dtype]].itemsize
            step = max(1, CHUNK_BYTES // max(row_bytes, 1))
            for at in range(start, stop, step):
                yield self.read(((at, min(at + step, stop)), *rest))


def whole_box(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return tuple((0, size) for size in shape)


def meets(box: Box, other: Box) -> bool:
    """Whether they have an element in common; boxes of no dimensions do."""
    return all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(box, other, strict=True))
