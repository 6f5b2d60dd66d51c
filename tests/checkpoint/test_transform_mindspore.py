"""MindSpore's own transform_checkpoints beside ours, on the same strategy files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from parallel_samples import cases, read, same, split, write_ranks

from llm_boost.checkpoint.parallel.source import open_source
from llm_boost.checkpoint.parallel.strategy import Strategy
from llm_boost.checkpoint.parallel.strategy_files import read_strategy, write_rank_strategies
from llm_boost.checkpoint.parallel.transform import plan, transform

pytestmark = pytest.mark.mindspore
SLOW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def merged_by_mindspore(strategy: Strategy, folder: Path) -> str:
    from mindspore.parallel import merge_pipeline_strategys

    write_rank_strategies(folder, strategy)
    merged = folder.with_suffix(".ckpt")
    merge_pipeline_strategys(str(folder), str(merged))
    return str(merged)


def possible_for_mindspore(strategies: list[Strategy], tensors: dict[str, np.ndarray]) -> bool:
    """It wants ranks of stages that divide each other, and a sole repeating axis to be the outermost where
    an optimizer shard cuts a tensor whose axes are not in order."""
    sizes = sorted(strategy.stage_ranks for strategy in strategies)
    if sizes[-1] % sizes[0]:
        return False
    for strategy in strategies:
        for layouts in strategy.stages:
            for name, layout in layouts.items():
                if not tensors[name].ndim:
                    return False
                if tensors[name].ndim == 1 and len(layout.axes[0]) > 1:
                    return False  # it takes the axes of one dimension for those of several
                flat = [axis for axes in layout.axes for axis in axes]
                if layout.optimizer_shards and flat != sorted(flat):
                    return False
    return True


@SLOW
@given(cases(stages=False))
def test_it_makes_the_same_of_the_same_strategies(case):
    from mindspore.parallel import transform_checkpoints

    tensors, strategies = case
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.ndim}
    strategies = [
        Strategy(
            tuple({n: layout for n, layout in s.items() if n in tensors} for s in each.stages), each.source
        )
        for each in strategies
        if all(any(n in tensors for n in s) for s in each.stages)
    ]
    assume(len(strategies) == 2 and possible_for_mindspore(strategies, tensors))
    one, other = strategies
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_ranks(folder / "source", split(tensors, one))
        files = [merged_by_mindspore(each, folder / f"s{i}") for i, each in enumerate((one, other))]
        transform_checkpoints(str(source), str(folder / "theirs"), "checkpoint_", *files)
        opened, joined = open_source(source, read_strategy(files[0]))
        transform(opened, plan(opened, read_strategy(files[1]), folder / "ours", joined=joined))
        for rank, expected in enumerate(split(tensors, other)):
            ours, theirs = (
                read(folder / x / f"rank_{rank}/checkpoint_{rank}.ckpt") for x in ("ours", "theirs")
            )
            assert same(ours, expected)
            assert same(theirs, ours), (one, other)
