"""A tensor to be written: announced before its data exists, then streamed, a few megabytes at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.casting import cast
from llm_boost.checkpoint.checkpoint import Checkpoint, TensorInfo
from llm_boost.checkpoint.gguf_writer import GGUFSpec
from llm_boost.checkpoint.mindformers_names import RowOrder
from llm_boost.checkpoint.safetensors_reader import DTYPES
from llm_boost.checkpoint.safetensors_writer import TensorSpec
from llm_boost.errors import CheckpointError

CHUNK_ELEMENTS = 1 << 21  # temporaries of this size stay within the processor's caches
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # numpy's name -> safetensors'


class Readable(Protocol):
    """As much of a Checkpoint as streaming needs."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> NDArray[Any]: ...

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]: ...

    def forget(self) -> None: ...


Rows = Iterator[NDArray[Any]]
Spec = TypeVar("Spec", TensorSpec, GGUFSpec)


@dataclass(frozen=True)
class OutTensor(Generic[Spec]):
    """`rows()` yields the tensor's rows in order; every array in the announced type."""

    spec: Spec
    rows: Callable[[], Rows]


def streamed(checkpoint: Checkpoint, name: str, dtype: str, target: str) -> OutTensor[TensorSpec]:
    """The checkpoint's tensor `name` as `target`, in `dtype` (F32, F16 or BF16)."""
    spec = TensorSpec(target, dtype, checkpoint.tensors[name].shape)
    return OutTensor(spec, lambda: cast_rows(checkpoint, name, dtype, row_chunks(checkpoint, name)))


def joined(
    checkpoint: Checkpoint, names: tuple[str, ...], order: RowOrder, dtype: str, target: str
) -> OutTensor[TensorSpec]:
    """Several tensors as one, its rows taken from them in `order`."""
    shapes = [checkpoint.tensors[name].shape for name in names]
    if len({shape[1:] for shape in shapes}) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: {' + '.join(names)}: their rows differ in length: {shapes}"
        )
    total = len(order.row)

    def rows() -> Rows:
        step = chunk_rows(shapes[0])
        for start in range(0, total, step):
            part, row = order.part[start : start + step], order.row[start : start + step]
            out = np.empty((len(row), *shapes[0][1:]), DTYPES[dtype])
            for index, name in enumerate(names):
                wanted = np.flatnonzero(part == index)  # rows of one part keep their order
                if len(wanted):
                    first = int(row[wanted[0]])
                    source = checkpoint.read_rows(name, first, int(row[wanted[-1]]) + 1)
                    out[wanted] = cast(source, DTYPES[dtype], f"{checkpoint.path}: tensor {name}")
            yield out
            checkpoint.forget()

    return OutTensor(TensorSpec(target, dtype, (total, *shapes[0][1:])), rows)


def cast_rows(checkpoint: Checkpoint, name: str, dtype: str, chunks: Rows) -> Rows:
    for chunk in chunks:
        yield cast(chunk, DTYPES[dtype], f"{checkpoint.path}: tensor {name}")


def row_chunks(checkpoint: Readable, name: str, multiple: int = 1) -> Rows:
    """The tensor's rows in order, multiples of `multiple` at a time; what was read is forgotten again."""
    shape = checkpoint.tensors[name].shape
    if not shape:
        yield checkpoint.read(name)
        return
    step = max(1, chunk_rows(shape) // multiple) * multiple
    for start in range(0, shape[0], step):
        yield checkpoint.read_rows(name, start, min(start + step, shape[0]))
        checkpoint.forget()


def chunk_rows(shape: tuple[int, ...]) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))


def stored_dtype(checkpoint: Checkpoint, name: str) -> str:
    """The tensor's type as stored; F32 for a quantised one, which is read as that."""
    return FLOATS.get(checkpoint.tensors[name].dtype, "F32")
