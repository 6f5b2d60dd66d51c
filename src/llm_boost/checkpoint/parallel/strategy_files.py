"""Strategy files, read and written: MindSpore's protobuf and its JSON form.

    ParallelStrategyMap  { uint32 current_stage = 1; repeated ParallelStrategyItem parallel_strategy_item = 2;
                           repeated ParallelLayoutItem parallel_layout_item = 3 }
    ParallelStrategyItem { string node_name = 1; ParallelStrategys parallel_strategys = 2 }
    ParallelStrategys    { uint32 stage = 1; repeated ParallelStrategy { repeated uint32 dim = 1 } = 2 }
    ParallelLayoutItem   { string param_name = 1; ParallelLayouts parallel_layouts = 2 }
    ParallelLayouts      { repeated DevMatrix dev_matrix = 1; TensorMap tensor_map = 2; ParamSplitShape
                           param_split_shape = 3; IndicesOffset indices_offset = 4; int32 field = 5;
                           int32 opt_weight_shard_step = 6; int32 opt_weight_shard_size = 7 }

(mindspore/ccsrc/utils/node_strategy.proto; each of the first four holds `repeated dim = 1`.) The stage of a
file is that of its first strategy item. In a file of merged stages a parameter is named `STAGE-NAME`. Where
a dimension is cut along several axes, there is a TensorMap for each dimension.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_boost.checkpoint.fields import read_json_object, shown
from llm_boost.checkpoint.parallel.layout import Layout
from llm_boost.checkpoint.parallel.strategy import Strategy, merged
from llm_boost.checkpoint.safetensors_reader import MAX_DIMS
from llm_boost.checkpoint.whole_file import whole_file
from llm_boost.errors import CheckpointError
from llm_boost.protobuf import (
    as_bytes,
    as_int32,
    as_integer,
    as_integers,
    as_text,
    bytes_field,
    integer_field,
    read_fields,
)

MAX_STRATEGY_BYTES = 256 << 20
MAX_RANKS = 1 << 20
SUFFIXES = (".ckpt", ".json")

_RANK_FILE = re.compile(r"ckpt_strategy_rank_\d+\.(ckpt|json)")
_Item = tuple[str, Layout]
_OPTIMIZER_SHARD_OF_ALL = -1


def read_strategy(path: str | Path) -> Strategy:
    """A strategy file, or a directory of them, the stages of a pipeline merged.

    Raises:
        CheckpointError: nothing there, a file that is damaged, or files that contradict each other.
    """
    path = Path(path).expanduser()
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise CheckpointError(f"{path}: no strategy file there (*.ckpt or *.json)")
        if len({file.suffix for file in files}) > 1:
            raise CheckpointError(f"{path}: holds strategies as .ckpt and as .json; keep one kind")
    stages: dict[int, Mapping[str, Layout]] = {}
    read_from: dict[int, Path] = {}
    for file in files:
        for stage, layouts in _read_file(file).items():
            if stages.setdefault(stage, layouts) != layouts:
                raise CheckpointError(
                    f"{file}: contradicts {read_from[stage].name} about pipeline stage {stage}; "
                    "keep the files of one run"
                )
            read_from.setdefault(stage, file)
    return merged(stages, path)


def write_strategy(path: Path, layouts: Mapping[str, Layout], stage: int = 0) -> None:
    """One stage's strategy, in the form that the suffix of `path` tells."""
    encode = _json if path.suffix == ".json" else _protobuf
    data = encode(layouts, stage)
    with whole_file(path, len(data)) as file:
        file.write(data)


def write_rank_strategies(folder: Path, strategy: Strategy, suffix: str = ".ckpt") -> list[Path]:
    """`ckpt_strategy_rank_N.ckpt` for every rank, as training on these ranks would leave them.

    Such files of an earlier strategy are removed: a folder holds one strategy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"ckpt_strategy_rank_{rank}{suffix}" for rank in range(strategy.ranks)]
    for rank, file in enumerate(files):
        write_strategy(file, strategy.of_rank(rank), rank // strategy.stage_ranks)
    for old in folder.iterdir():
        if _RANK_FILE.fullmatch(old.name) and old not in files:
            old.unlink()
    return files


def write_merged_strategy(path: Path, strategy: Strategy) -> None:
    """All stages in one file, as merge_pipeline_strategys writes them."""
    data = b"".join(
        _protobuf({f"{stage}-{name}": layout for name, layout in layouts.items()}, stage)
        for stage, layouts in enumerate(strategy.stages)
    )
    with whole_file(path, len(data)) as file:
        file.write(data)


def _read_file(path: Path) -> dict[int, dict[str, Layout]]:
    """Stage -> layouts by parameter."""
    try:
        if path.stat().st_size > MAX_STRATEGY_BYTES:
            raise CheckpointError(
                f"{path}: larger than {MAX_STRATEGY_BYTES >> 20} MB, that is no strategy file"
            )
        if path.suffix == ".json":
            stage, items = _read_json(read_json_object(path))
        else:
            stage, items = _read_protobuf(memoryview(path.read_bytes()))
        stages: dict[int, dict[str, Layout]] = {}
        for name, layout in items:
            prefix, dash, rest = name.partition("-")
            of_stage, name = (int(prefix), rest) if dash and prefix.isdecimal() else (stage, name)
            if name in stages.setdefault(of_stage, {}):
                raise ValueError(f"parameter {shown(name)} stands there twice")
            stages[of_stage][name] = layout
    except OSError as error:
        raise CheckpointError(f"{path}: no strategy can be read there ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not a strategy file: {error}") from None
    return stages


def _layout(
    name: str,
    dev_matrix: Sequence[int],
    tensor_map: Sequence[Sequence[int]],
    split_shape: Sequence[int],
    optimizer_shards: int,
) -> Layout:
    """`tensor_map` has the axes of each dimension, in MindSpore's count; -1 is none."""
    if len(dev_matrix) > 32 or len(tensor_map) > MAX_DIMS or len(split_shape) > MAX_DIMS:
        raise ValueError(f"parameter {shown(name)} has more dimensions than there are")
    if not dev_matrix or math.prod(dev_matrix) > MAX_RANKS:
        raise ValueError(
            f"parameter {shown(name)}: dev_matrix {list(dev_matrix)}; up to {MAX_RANKS} ranks are allowed"
        )
    last = len(dev_matrix) - 1
    axes = tuple(tuple(last - axis for axis in each if axis != -1) for each in tensor_map)
    if optimizer_shards == _OPTIMIZER_SHARD_OF_ALL:
        optimizer_shards = Layout(tuple(dev_matrix), axes).repeats
    try:
        return Layout(tuple(dev_matrix), axes, tuple(split_shape), max(optimizer_shards, 0))
    except ValueError as error:
        raise ValueError(f"parameter {shown(name)}: {error}") from None


# ---- protobuf


def _read_protobuf(data: memoryview) -> tuple[int, Iterator[_Item]]:
    stages: list[int] = []
    items: list[_Item] = []
    for number, value in read_fields(data):
        if number == 2 and not stages:
            stages += _stages_of(as_bytes(value))
        elif number == 3:
            items.append(_read_layout_item(as_bytes(value)))
        elif number not in (1, 2):
            raise ValueError(f"field {number} where a layout belongs")
    return stages[0] if stages else 0, iter(items)


def _stages_of(item: memoryview) -> Iterator[int]:
    for number, value in read_fields(item):
        if number == 2:
            yield from (as_integer(inner) for key, inner in read_fields(as_bytes(value)) if key == 1)


def _read_layout_item(item: memoryview) -> _Item:
    name, layouts = None, None
    for number, value in read_fields(item):
        if number == 1:
            name = as_text(value)
        elif number == 2:
            layouts = as_bytes(value)
    if name is None or layouts is None:
        raise ValueError("a layout without its parameter's name")
    lists: dict[int, list[list[int]]] = {1: [], 2: [], 3: []}
    optimizer_shards = 0
    for number, value in read_fields(layouts):
        if number in lists:
            lists[number].append(
                [dim for key, inner in read_fields(as_bytes(value)) if key == 1 for dim in as_integers(inner)]
            )
        elif number == 7:
            optimizer_shards = as_int32(value)
    dev_matrices, maps, shapes = lists[1], [each for each in lists[2] if each], lists[3]
    if not dev_matrices:
        raise ValueError(f"parameter {shown(name)} has no dev_matrix")
    split_shape = shapes[0] if shapes else []
    # One map of all dimensions, or one of each where axes are joined.
    joined = len(maps) > 1 or (maps and len(split_shape) == 1 and len(maps[0]) > 1)
    tensor_map = maps if joined else [[axis] for axis in (maps[0] if maps else [])]
    return name, _layout(name, dev_matrices[0], tensor_map, split_shape, optimizer_shards)


def _protobuf(layouts: Mapping[str, Layout], stage: int) -> bytes:
    data = [integer_field(1, 1)]
    for name, layout in layouts.items():
        parts = bytes_field(2, _dims(layout.parts))
        data.append(bytes_field(2, _text(1, name) + bytes_field(2, integer_field(1, stage) + parts)))
    for name, layout in layouts.items():
        axes = layout.tensor_map
        joined = any(isinstance(each, list) for each in axes)
        maps = [each if isinstance(each, list) else [each] for each in axes]
        tensor_map = maps if joined else [[axis for each in maps for axis in each]]
        fields = [(1, _dims(layout.dev_matrix)), *((2, _dims(each)) for each in tensor_map)]
        fields += [(3, _dims(layout.split_shape)), (4, b"")]
        body = b"".join(bytes_field(number, dims) for number, dims in fields)
        body += b"".join(integer_field(number, value) for number, value in _numbers(layout))
        data.append(bytes_field(3, _text(1, name) + bytes_field(2, body)))
    return b"".join(data)


def _numbers(layout: Layout) -> tuple[tuple[int, int], ...]:
    step = _optimizer_step(layout)
    return (5, 0), (6, step), (7, layout.optimizer_shards)


def _optimizer_step(layout: Layout) -> int:
    """Ranks from one optimizer shard to the next: those behind the innermost axis that repeats."""
    cutting = {axis for dimension in layout.axes for axis in dimension}
    repeating = [i for i, size in enumerate(layout.dev_matrix) if i not in cutting and size > 1]
    if not layout.optimizer_shards or not repeating:
        return 0
    return math.prod(layout.dev_matrix[repeating[-1] + 1 :])


def _dims(values: Sequence[int]) -> bytes:
    return b"".join(integer_field(1, value) for value in values)


def _text(number: int, text: str) -> bytes:
    return bytes_field(number, text.encode())


# ---- JSON


def _read_json(table: Mapping[str, Any]) -> tuple[int, Iterator[_Item]]:
    strategies = _mapping(table.get("parallel_strategy_item", {}), "parallel_strategy_item")
    stage = 0
    for name, item in strategies.items():
        stage = _integer(_mapping(item, name).get("stage", 0), f"{name}: stage")
        break
    layouts = _mapping(table.get("parallel_layout_item", {}), "parallel_layout_item")
    return stage, (_json_layout(name, _mapping(item, name)) for name, item in layouts.items())


def _json_layout(name: str, item: Mapping[str, Any]) -> _Item:
    def numbers(key: str) -> list[int]:
        values = item.get(key, [])
        if not isinstance(values, list):
            raise ValueError(f"parameter {shown(name)}: {key} is {shown(values)}; it must be a list")
        return [_integer(value, f"parameter {shown(name)}: {key}") for value in values]

    axes = item.get("tensor_map", [])
    if isinstance(axes, list) and any(isinstance(each, list) for each in axes):
        what = f"parameter {shown(name)}: tensor_map"
        tensor_map = [
            [_integer(axis, what) for axis in (each if isinstance(each, list) else [each])] for each in axes
        ]
    else:
        tensor_map = [[axis] for axis in numbers("tensor_map")]
    shards = _integer(item.get("opt_weight_shard_size", 0), f"parameter {shown(name)}: opt_weight_shard_size")
    return name, _layout(name, numbers("dev_matrix"), tensor_map, numbers("param_split_shape"), shards)


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {shown(value)}; it must be an object")
    return value


def _integer(value: object, what: str) -> int:
    if type(value) is not int or not -(1 << 48) <= value <= 1 << 48:
        raise ValueError(f"{what} is {shown(value)}; it must be a whole number")
    return value


def layout_as_json(layout: Layout) -> dict[str, Any]:
    """A layout in the words of the JSON form."""
    return {
        "dev_matrix": list(layout.dev_matrix),
        "tensor_map": layout.tensor_map,
        "param_split_shape": list(layout.split_shape),
        "opt_weight_shard_step": _optimizer_step(layout),
        "opt_weight_shard_size": layout.optimizer_shards,
    }


def layout_from_json(name: str, item: Mapping[str, Any]) -> Layout:
    """The layout of parameter `name`; a ValueError where it is none."""
    return _json_layout(name, item)[1]


def _json(layouts: Mapping[str, Layout], stage: int) -> bytes:
    table = {
        "current_stage": 1,
        "parallel_strategy_item": {
            name: {"stage": stage, "parallel_strategy": [list(layout.parts)]}
            for name, layout in layouts.items()
        },
        "parallel_layout_item": {
            name: {**layout_as_json(layout), "indices_offset": [], "field": 0}
            for name, layout in layouts.items()
        },
    }
    return json.dumps(table, indent=1).encode()
