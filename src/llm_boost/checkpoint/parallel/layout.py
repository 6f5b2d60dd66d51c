"""How one parameter lies on the ranks of a pipeline stage, in MindSpore's terms.

The ranks form a mesh of `dev_matrix` sizes, counted row-major. `tensor_map` names for each dimension of the
tensor the mesh axes that cut it, counted from the last one (0), or none; the part that a rank holds is its
coordinate on them. Axes that cut nothing repeat. An optimizer shard cuts the first dimension once more, over
`optimizer_shards` of the ranks that would repeat each other: the innermost ones
(mindspore/parallel/_tensor.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[tuple[int, int], ...]  # begin and end in each dimension


@dataclass(frozen=True)
class Layout:
    """`axes[d]` are the mesh axes that cut dimension d, outermost first, counted as indices of `dev_matrix`.

    `split_shape` is the shape of a rank's part as the strategy file states it, () where it does not.
    """

    dev_matrix: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    split_shape: tuple[int, ...] = ()
    optimizer_shards: int = 0  # 0: none

    def __post_init__(self) -> None:
        used = [axis for dimension in self.axes for axis in dimension]
        if not self.dev_matrix or min(self.dev_matrix) < 1:
            raise ValueError(f"dev_matrix is {list(self.dev_matrix)}; its sizes must be 1 or more")
        if not all(0 <= axis < len(self.dev_matrix) for axis in used):
            raise ValueError(f"tensor_map {self.tensor_map} names an axis that {self._mesh()} lacks")
        if any(used.count(axis) > 1 and self.dev_matrix[axis] > 1 for axis in used):
            raise ValueError(
                f"tensor_map {self.tensor_map} cuts two dimensions along one axis of {self._mesh()}"
            )
        if self.optimizer_shards and (not self.axes or self.repeats % self.optimizer_shards):
            raise ValueError(
                f"opt_weight_shard_size {self.optimizer_shards} does not divide the {self.repeats} ranks of "
                f"{self._mesh()} that repeat each other"
            )

    @classmethod
    def replicated(cls, ranks: int, dimensions: int) -> Layout:
        """Every rank holds all of it."""
        return cls((ranks,), ((),) * dimensions)

    @property
    def ranks(self) -> int:
        return math.prod(self.dev_matrix)

    @property
    def repeats(self) -> int:
        """Ranks that hold the same part, before an optimizer shard."""
        return self.ranks // math.prod(self._mesh_parts())

    @property
    def tensor_map(self) -> list[int | list[int]]:
        """In MindSpore's form."""
        last = len(self.dev_matrix) - 1
        named = [[last - axis for axis in dimension] for dimension in self.axes]
        return [each if len(each) > 1 else each[0] if each else -1 for each in named]

    @property
    def parts(self) -> tuple[int, ...]:
        """Into how many parts each dimension is cut."""
        parts = self._mesh_parts()
        if self.optimizer_shards and parts:
            parts[0] *= self.optimizer_shards
        return tuple(parts)

    def whole_shape(self, local: Sequence[int]) -> tuple[int, ...]:
        """Of the tensor whose parts have the shape `local`."""
        return tuple(size * parts for size, parts in zip(local, self.parts, strict=True))

    def local_shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Of a rank's part; a ValueError where the parts would differ."""
        if len(whole) != len(self.axes):
            raise ValueError(
                f"tensor_map {self.tensor_map} has {len(self.axes)} dimensions, the tensor is {list(whole)}"
            )
        for dimension, (size, parts) in enumerate(zip(whole, self.parts, strict=True)):
            if size % parts:
                raise ValueError(
                    f"dimension {dimension} of {list(whole)} does not divide into {parts} parts, "
                    f"as {self._mesh()} wants"
                )
        return tuple(size // parts for size, parts in zip(whole, self.parts, strict=True))

    def box(self, rank: int, whole: Sequence[int]) -> Box:
        """The part of a tensor of the shape `whole` that `rank` of the stage holds."""
        at = self._coordinate(rank)
        indices = [self._index(at, dimension) for dimension in self.axes]
        if self.optimizer_shards:
            cutting = {axis for dimension in self.axes for axis in dimension}
            repeating = tuple(axis for axis in range(len(self.dev_matrix)) if axis not in cutting)
            shard = self._index(at, repeating) % self.optimizer_shards
            indices[0] = indices[0] * self.optimizer_shards + shard
        sizes = self.local_shape(whole)
        return tuple((i * size, (i + 1) * size) for i, size in zip(indices, sizes, strict=True))

    def _coordinate(self, rank: int) -> list[int]:
        at = []
        for size in reversed(self.dev_matrix):
            rank, here = divmod(rank, size)
            at.append(here)
        return at[::-1]

    def _index(self, at: Sequence[int], axes: Sequence[int]) -> int:
        index = 0
        for axis in axes:
            index = index * self.dev_matrix[axis] + at[axis]
        return index

    def _mesh_parts(self) -> list[int]:
        return [math.prod(self.dev_matrix[axis] for axis in dimension) for dimension in self.axes]

    def _mesh(self) -> str:
        return f"dev_matrix {list(self.dev_matrix)}"
