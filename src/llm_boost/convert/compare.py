"""Whether two checkpoints of any format hold the same, tensor by tensor, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.casting import cast
from llm_boost.checkpoint.whole_file import Progress
from llm_boost.convert.contents import Contents
from llm_boost.convert.tensors import FLOATS, chunk_rows

FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Difference:
    """How a tensor differs; `kind` is missing (in one), shape, type (the same values in another) or values.

    `maximum` and `mean` are of the absolute differences, computed in float32 and float64; 0 where NaN or the
    sign of a zero alone differ.
    """

    name: str
    kind: str
    detail: str
    maximum: float = 0.0
    mean: float = 0.0
    count: int = 0

    @property
    def matters(self) -> bool:
        return self.kind != "type"


def compare(a: Contents, b: Contents, progress: Progress | None = None) -> Iterator[Difference]:
    """The differences, in the order of `a`; nothing for tensors that are equal to the bit."""
    names = list(dict.fromkeys([*a.tensors, *b.tensors]))
    for done, name in enumerate(names):
        one, other = a.tensors.get(name), b.tensors.get(name)
        if one is None or other is None:
            yield Difference(name, "missing", f"is not in {(a if one is None else b).path}")
        elif one.shape != other.shape:
            yield Difference(name, "shape", f"{list(one.shape)} and {list(other.shape)}")
        else:
            yield from _values(a, b, name)
        if progress:
            progress(done + 1, len(names))


def _values(a: Contents, b: Contents, name: str) -> Iterator[Difference]:
    one, other = a.tensors[name], b.tensors[name]
    maximum = total = 0.0
    count = 0
    for x, y in _chunks(a, b, name):
        differ = _bits(x) != _bits(y)
        found = int(np.count_nonzero(differ))
        if found:
            count += found
            with np.errstate(invalid="ignore", over="ignore"):
                gaps = np.abs(x[differ].astype(np.float64) - y[differ].astype(np.float64))
            gaps = np.nan_to_num(gaps, nan=0.0, posinf=np.inf)
            maximum, total = max(maximum, float(gaps.max())), total + float(gaps.sum())
    size = max(1, int(np.prod(one.shape)))
    if count:
        detail = (
            f"{count} of {size} values differ, by at most {maximum:.3g} and {total / size:.3g} in the mean"
        )
        if one.dtype != other.dtype:
            detail += f" ({one.dtype} and {other.dtype})"
        yield Difference(name, "values", detail, maximum, total / size, count)
    elif one.dtype != other.dtype:
        yield Difference(name, "type", f"the same values as {one.dtype} and {other.dtype}")


def _chunks(a: Contents, b: Contents, name: str) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Both tensors' rows, a few megabytes at a time, in one type."""
    shape = a.tensors[name].shape
    if not shape:
        yield _comparable(a.read(name).reshape(1), b.read(name).reshape(1))
        return
    step = chunk_rows(shape)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        yield _comparable(a.read_rows(name, start, stop), b.read_rows(name, start, stop))
        a.forget()
        b.forget()


def _comparable(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """float32 holds every value of float16 and bfloat16, so that widening decides nothing."""
    if x.dtype == y.dtype:
        return x, y
    if {x.dtype.name, y.dtype.name} <= set(FLOATS):
        return cast(x, FLOAT32, ""), cast(y, FLOAT32, "")
    return x.astype(np.float64), y.astype(np.float64)


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
