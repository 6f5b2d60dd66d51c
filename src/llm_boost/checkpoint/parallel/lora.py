"""A checkpoint with its LoRA adapters merged: W + scaling * B @ A, as MindFormers' transform_ckpt_lora.

The adapters of `x.weight` [out, in] are `x.mindpet_delta_lora_a` or `x.lora_a` (with or without `.weight`)
[rank, in], and the like with `_b` [out, rank]. The sum is made in float32 and rounded to the weight's type.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.fields import shown
from llm_boost.checkpoint.parallel.pieces import Piece, PiecedTensor, whole_box
from llm_boost.checkpoint.parallel.source import Source
from llm_boost.checkpoint.parallel.strategy import Strategy
from llm_boost.checkpoint.weight_files import Shard
from llm_boost.errors import CheckpointError

_ADAPTER = re.compile(r"(.*)\.(?:mindpet_delta_|tk_delta_)?lora_(a|b)(?:\.weight)?", re.IGNORECASE)


class LoraSource:
    """Another source, its adapters merged into the weights that they belong to, and gone."""

    def __init__(self, source: Source, scaling: float) -> None:
        self._source, self._scaling = source, scaling
        self._adapters = _adapters(source)
        adapters = {name for pair in self._adapters.values() for name in pair}
        self.parameters: Mapping[str, TensorInfo] = {
            name: info for name, info in source.parameters.items() if name not in adapters
        }

    @property
    def path(self) -> Path:
        return self._source.path

    @property
    def shards(self) -> list[Shard]:
        return self._source.shards

    @property
    def strategy(self) -> Strategy | None:
        return self._source.strategy

    def pieced(self, name: str) -> PiecedTensor:
        base = self._source.pieced(name)
        if name not in self._adapters:
            return base
        a, b = (self._source.pieced(adapter) for adapter in self._adapters[name])
        a_matrix, b_matrix = (_float32(each.read(whole_box(each.info.shape))) for each in (a, b))
        merged = _Merged(base, a_matrix, b_matrix, self._scaling, self.shards[0].path)
        return PiecedTensor(base.info, (Piece(whole_box(base.info.shape), merged, name),))

    def digest(self) -> str:
        return hashlib.sha256(f"{self._source.digest()} lora {self._scaling!r}".encode()).hexdigest()

    def forget(self) -> None:
        self._source.forget()


class _Merged:
    """A weight and its adapters, as a file of one tensor."""

    def __init__(
        self,
        base: PiecedTensor,
        a: NDArray[np.float32],
        b: NDArray[np.float32],
        scaling: float,
        path: Path,
    ) -> None:
        self.path = path
        self._base, self._a, self._b, self._scaling = base, a, b, np.float32(scaling)

    def infos(self) -> dict[str, TensorInfo]:
        return {self._base.info.name: self._base.info}

    def read(self, name: str) -> NDArray[Any]:
        return self.read_rows(name, 0, self._base.info.shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        rows = self._base.read(((start, stop), *whole_box(self._base.info.shape[1:])))
        return (_float32(rows) + self._scaling * (self._b[start:stop] @ self._a)).astype(rows.dtype)

    def forget(self) -> None:
        """There is nothing mapped."""

    def close(self) -> None:
        """There is nothing open."""


def _adapters(source: Source) -> dict[str, tuple[str, str]]:
    """The weight -> its adapters A and B; both must be there, and fit."""
    found: dict[str, dict[str, str]] = {}
    for name in source.parameters:
        match = _ADAPTER.fullmatch(name)
        if match:
            found.setdefault(f"{match[1]}.weight", {})[match[2].lower()] = name
    if not found:
        raise CheckpointError(
            f"{source.path}: has no LoRA adapters (parameters that end in lora_a and lora_b)"
        )
    for weight, pair in found.items():
        shapes = {key: source.parameters[name].shape for key, name in pair.items()}
        base = source.parameters.get(weight)
        if base is None or len(pair) != 2:
            lacks = weight if base is None else f"lora_{'b' if 'a' in pair else 'a'} of {weight}"
            raise CheckpointError(
                f"{source.path}: parameter {next(iter(pair.values()))} is there, {shown(lacks)} is not"
            )
        ranks = {shapes["a"][0], shapes["b"][-1]} if shapes["a"] and shapes["b"] else set()
        if len(ranks) != 1 or (shapes["b"][0], shapes["a"][-1]) != base.shape:
            raise CheckpointError(
                f"{source.path}: adapters {list(shapes['b'])} @ {list(shapes['a'])} "
                f"do not fit parameter {shown(weight)} {list(base.shape)}"
            )
    return {weight: (pair["a"], pair["b"]) for weight, pair in found.items()}


def _float32(tensor: NDArray[Any]) -> NDArray[np.float32]:
    return tensor.astype(np.float32)
