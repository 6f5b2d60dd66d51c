"""Makes the files of tests/goldens/mindspore_parallel with MindSpore itself.

usage: python tests/goldens/make_mindspore_strategies.py (needs mindspore, from PyPI, with numpy 1)

    source.ckpt, target.ckpt  strategies of two pipeline stages of 4 ranks, and of 8 ranks with an optimizer
                              shard, a repeating inner axis and two axes that cut one dimension; written by
                              MindSpore's own protobuf, the stages merged by merge_pipeline_strategys
    source.json               the first one, its stages merged in the JSON form
    whole.npz                 the parameters
    source_N.ckpt             rank N of the source, whose files MindSpore wrote
    target_N.ckpt             rank N of the target: what transform_checkpoints made of the source
    whole.ckpt                what it made of the source without a target
"""

import json
import shutil
import tempfile
from pathlib import Path

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, save_checkpoint
from mindspore.parallel import merge_pipeline_strategys, transform_checkpoints
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

HERE = Path(__file__).parent / "mindspore_parallel"
WHOLE = {
    "model.tok_embeddings.embedding_weight": (16, 8),
    "model.layers.0.attention.wq.weight": (16, 8),
    "model.layers.1.attention.wk.weight": (8, 8),
    "model.layers.1.attention.wo.weight": (8, 16),
    "model.norm_out.weight": (8,),
}
# name: (dev_matrix, tensor_map, opt_weight_shard_step, opt_weight_shard_size)
STAGES = [
    {
        "model.tok_embeddings.embedding_weight": ([4], [-1, -1], 0, 0),
        "model.layers.0.attention.wq.weight": ([2, 2], [0, -1], 2, 2),
    },
    {
        "model.layers.1.attention.wk.weight": ([2, 1, 2], [2, 1], 0, 0),
        "model.layers.1.attention.wo.weight": ([1, 4], [1, 0], 0, 0),
        "model.norm_out.weight": ([4], [-1], 0, 0),
    },
]
TARGET = {
    "model.tok_embeddings.embedding_weight": ([1, 4], [1, 0], 0, 0),
    "model.layers.0.attention.wq.weight": ([4, 1], [1, 0], 0, 0),
    "model.layers.1.attention.wk.weight": ([2, 2], [[1, 0], [-1]], 0, 0),
    "model.layers.1.attention.wo.weight": ([2, 2], [-1, 0], 2, 2),
    "model.norm_out.weight": ([4], [-1], 1, 4),
}


def cut(tensor, layout, rank):
    matrix, tensor_map, _, shards = layout
    at = np.unravel_index(rank, matrix)
    used = []
    for dimension, axes in enumerate(tensor_map):
        for axis in axes if isinstance(axes, list) else [axes]:
            if axis >= 0:
                place = len(matrix) - 1 - axis
                used.append(place)
                tensor = np.split(tensor, matrix[place], dimension)[at[place]]
    if shards:
        twins = [
            other
            for other in range(int(np.prod(matrix)))
            if all(np.unravel_index(other, matrix)[place] == at[place] for place in used)
        ]
        tensor = np.split(tensor, shards, 0)[twins.index(rank) % shards]
    return tensor


def part_shape(name, layout):
    return list(cut(np.zeros(WHOLE[name]), layout, 0).shape)


def json_strategy(layouts, stage):
    items = {
        name: {
            "dev_matrix": matrix,
            "tensor_map": tensor_map,
            "param_split_shape": part_shape(name, layouts[name]),
            "indices_offset": [],
            "field": 0,
            "opt_weight_shard_step": step,
            "opt_weight_shard_size": shards,
        }
        for name, (matrix, tensor_map, step, shards) in layouts.items()
    }
    nodes = {name: {"stage": stage, "parallel_strategy": [matrix]} for name, (matrix, *_) in layouts.items()}
    return {"current_stage": 1, "parallel_strategy_item": nodes, "parallel_layout_item": items}


def strategy(layouts, stage):
    made = ParallelStrategyMap(current_stage=1)
    for name, (matrix, tensor_map, step, shards) in layouts.items():
        item = made.parallel_strategy_item.add(node_name=name)
        item.parallel_strategys.stage = stage
        item.parallel_strategys.parallel_strategy.add().dim.extend(matrix)
        layout = made.parallel_layout_item.add(param_name=name).parallel_layouts
        layout.dev_matrix.add().dim.extend(matrix)
        joined = any(isinstance(each, list) for each in tensor_map)
        for axes in tensor_map if joined else [tensor_map]:
            layout.tensor_map.add().dim.extend(axes)
        layout.param_split_shape.add().dim.extend(part_shape(name, layouts[name]))
        layout.indices_offset.add()
        layout.field, layout.opt_weight_shard_step, layout.opt_weight_shard_size = 0, step, shards
    return made


def save(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        [{"name": n, "data": Parameter(Tensor(t), name=n)} for n, t in tensors.items()], str(path)
    )


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir(parents=True)
    rng = np.random.default_rng(0)
    whole = {name: rng.integers(-99, 99, shape).astype(np.float32) for name, shape in WHOLE.items()}
    np.savez_compressed(HERE / "whole.npz", version=np.array(mindspore.__version__), **whole)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("ckpt", "json"):
            (folder / kind).mkdir()
        for stage, layouts in enumerate(STAGES):
            (folder / "ckpt" / f"stage_{stage}.ckpt").write_bytes(
                strategy(layouts, stage).SerializeToString()
            )
            (folder / "json" / f"stage_{stage}.json").write_text(json.dumps(json_strategy(layouts, stage)))
            for rank in range(4):
                held = {name: cut(whole[name], layout, rank) for name, layout in layouts.items()}
                save(folder / f"src/rank_{4 * stage + rank}/checkpoint.ckpt", held)
        merge_pipeline_strategys(str(folder / "ckpt"), str(HERE / "source.ckpt"))
        merge_pipeline_strategys(str(folder / "json"), str(HERE / "source.json"))
        (HERE / "target.ckpt").write_bytes(strategy(TARGET, 0).SerializeToString())
        source, target = str(HERE / "source.ckpt"), str(HERE / "target.ckpt")
        transform_checkpoints(str(folder / "src"), str(folder / "dst"), "c", source, target)
        transform_checkpoints(str(folder / "src"), str(folder / "one"), "c", source, None)
        for rank in range(8):
            shutil.copy(folder / f"src/rank_{rank}/checkpoint.ckpt", HERE / f"source_{rank}.ckpt")
        for rank in range(4):
            shutil.copy(folder / f"dst/rank_{rank}/c{rank}.ckpt", HERE / f"target_{rank}.ckpt")
        shutil.copy(folder / "one/rank_0/c0.ckpt", HERE / "whole.ckpt")
    for file in HERE.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main()
