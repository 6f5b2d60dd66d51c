"""Random meshes, layouts and checkpoints for the tests of splitting, and the slow obvious way to cut."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from llm_boost.checkpoint.mindspore_ckpt import write_ckpt
from llm_boost.checkpoint.parallel.layout import Layout
from llm_boost.checkpoint.parallel.strategy import Strategy
from llm_boost.checkpoint.safetensors_reader import DTYPES
from llm_boost.checkpoint.safetensors_writer import TensorSpec, write_safetensors
from llm_boost.checkpoint.weight_files import open_shard

CODES = {dtype: code for code, dtype in DTYPES.items()}
TYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.int8)]


def cut(tensor: np.ndarray, layout: Layout, rank: int) -> np.ndarray:
    """A rank's part: np.split along each axis in turn, by the rank's coordinates on the mesh."""
    coordinate = np.unravel_index(rank, layout.dev_matrix)
    part = tensor
    for dimension, axes in enumerate(layout.axes):
        for axis in axes:
            part = np.split(part, layout.dev_matrix[axis], axis=dimension)[coordinate[axis]]
    if layout.optimizer_shards:
        cutting = {axis for axes in layout.axes for axis in axes}
        twins = [
            other
            for other in range(layout.ranks)
            if all(np.unravel_index(other, layout.dev_matrix)[a] == coordinate[a] for a in cutting)
        ]
        shard = twins.index(rank) % layout.optimizer_shards
        part = np.split(part, layout.optimizer_shards, axis=0)[shard]
    return part


def split(tensors: dict[str, np.ndarray], strategy: Strategy) -> list[dict[str, np.ndarray]]:
    """What each rank holds; what the strategy does not name lies whole on every rank."""
    ranks = []
    for rank in range(strategy.ranks):
        stage, local = divmod(rank, strategy.stage_ranks)
        layouts, held = strategy.stages[stage], {}
        for name, tensor in tensors.items():
            if name in layouts:
                held[name] = cut(tensor, layouts[name], local)
            elif name not in strategy.names:
                held[name] = tensor
        ranks.append(held)
    return ranks


@st.composite
def layouts(draw: st.DrawFn, ranks: int, dimensions: int, joined_axes: bool = True) -> Layout:
    """A mesh of so many ranks, some of its axes cutting, and perhaps an optimizer shard of the rest."""
    primes = [p for p in (2, 3, 5, 7) for _ in range(20) if ranks % p == 0]
    dev_matrix: list[int] = []
    left = ranks
    while left > 1:
        factor = draw(st.sampled_from([n for n in range(2, left + 1) if left % n == 0]))
        dev_matrix.append(factor)
        left //= factor
    del primes
    if draw(st.booleans()):
        dev_matrix.insert(draw(st.integers(0, len(dev_matrix))), 1)
    dev_matrix = dev_matrix or [1]
    free = draw(st.permutations(range(len(dev_matrix))))
    axes: list[tuple[int, ...]] = []
    for _ in range(dimensions):
        take = draw(st.integers(0, min(len(free), 2 if joined_axes else 1)))
        axes.append(tuple(free[:take]))
        free = free[take:]
    layout = Layout(tuple(dev_matrix), tuple(axes))
    divisors = [n for n in range(2, layout.repeats + 1) if layout.repeats % n == 0]
    if dimensions and divisors and draw(st.booleans()):
        layout = Layout(tuple(dev_matrix), tuple(axes), (), draw(st.sampled_from(divisors)))
    return layout


@st.composite
def cases(
    draw: st.DrawFn, sides: int = 2, joined_axes: bool = True, stages: bool = True
) -> tuple[dict[str, np.ndarray], list[Strategy]]:
    """Some tensors, and so many strategies that can cut each of them."""
    counts = [draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12])) for _ in range(sides)]
    pipelines = [draw(st.integers(1, 2)) if stages else 1 for _ in range(sides)]
    named: list[list[dict[str, Layout]]] = [[{} for _ in range(n)] for n in pipelines]
    tensors: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    for index in range(draw(st.integers(1, 4)) + max(pipelines) - 1):
        dimensions = draw(st.integers(0, 3))
        name = f"tensor.{index}"
        parts = [1] * dimensions
        for side, count in enumerate(counts):
            layout = draw(layouts(count, dimensions, joined_axes))
            named[side][index % pipelines[side]][name] = layout
            parts = [math.lcm(a, b) for a, b in zip(parts, layout.parts, strict=True)]
        shape = [n * draw(st.integers(1, 3)) for n in parts]
        dtype = draw(st.sampled_from(TYPES))
        tensors[name] = rng.integers(-100, 100, shape).astype(dtype)
    tensors["beside"] = rng.integers(0, 9, (3,)).astype(np.float32)
    made = [Strategy(tuple(each), f"strategy {side}") for side, each in enumerate(named)]
    return tensors, made


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(name, CODES[array.dtype], array.shape) for name, array in tensors.items()]
    if path.suffix == ".ckpt":
        write_ckpt(path, specs, iter(tensors.items()))
    else:
        write_safetensors(path, specs, iter(tensors.items()), alignment=1)
    return path


def write_ranks(folder: Path, ranks: list[dict[str, np.ndarray]], suffix: str = ".ckpt") -> Path:
    for rank, tensors in enumerate(ranks):
        write(folder / f"rank_{rank}" / f"checkpoint_{rank}{suffix}", tensors)
    return folder


def read(path: Path) -> dict[str, np.ndarray]:
    shard = open_shard(path)
    return {name: np.array(shard.read(name)) for name in shard.infos()}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    """Names, types, shapes and bytes."""
    return found.keys() == expected.keys() and all(
        (found[n].dtype, found[n].shape, found[n].tobytes())
        == (expected[n].dtype, expected[n].shape, expected[n].tobytes())
        for n in expected
    )


def all_boxes(shape: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    """Every box of a small tensor."""
    spans = [[(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in shape]
    return list(itertools.product(*spans))
