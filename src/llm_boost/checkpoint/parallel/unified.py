"""Unified safetensors: a complete checkpoint in parts of about 3 GiB, as MindSpore's unified_safetensors.

OUTPUT/{SUFFIX_}ckpt_convert/unified_safe/part0.safetensors, part1.safetensors, ...
                                          param_name_map.json   which part holds which parameter
                                          hyper_param.safetensors   what no strategy names
OUTPUT/{SUFFIX_}ckpt_convert/merge_strategy/merge_strategy.ckpt
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from llm_boost.checkpoint.parallel.pieces import CODES, whole_box
from llm_boost.checkpoint.parallel.source import Source
from llm_boost.checkpoint.parallel.strategy_files import write_merged_strategy
from llm_boost.checkpoint.parallel.transform import Share, transform
from llm_boost.checkpoint.safetensors_writer import TensorSpec
from llm_boost.checkpoint.whole_file import Progress, whole_file
from llm_boost.errors import CheckpointError

PART_BYTES = 3 << 30
_LEFT_OUT = "accu_grads"  # gradients that training accumulates


def unify(
    source: Source,
    output: Path,
    suffix: str | None,
    left_out: str | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> tuple[Path, int, int]:
    """Writes a source as unified safetensors; returns their folder, bytes and number of parts.

    Raises:
        CheckpointError: parts that are there already, a full disk, a source that is damaged.
    """
    base = output / (f"{suffix}_ckpt_convert" if suffix else "ckpt_convert")
    folder = base / "unified_safe"
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: is there, and not empty; choose another --output_dir, or remove it")
    prefixes = tuple(each for each in (_LEFT_OUT, left_out) if each)
    specs = {
        name: TensorSpec(name, CODES[info.dtype], info.shape)
        for name, info in source.parameters.items()
        if not name.startswith(prefixes)
    }
    named = set(source.strategy.names) if source.strategy else set(specs)
    parts = _parts([spec for name, spec in specs.items() if name in named])
    files = {f"part{index}.safetensors": part for index, part in enumerate(parts)}
    hyper = [spec for name, spec in specs.items() if name not in named]
    if hyper:
        files["hyper_param.safetensors"] = hyper
    shares = [
        Share(folder / file, None, 1, 0, tuple(part), {s.name: [whole_box(s.shape)] for s in part}, {})
        for file, part in files.items()
    ]
    transform(source, shares, workers=workers, progress=progress)
    size = sum(spec.nbytes for part in parts for spec in part)
    weight_map = {spec.name: f"part{index}.safetensors" for index, part in enumerate(parts) for spec in part}
    data = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=4).encode()
    if source.strategy is not None:
        strategy_folder = base / "merge_strategy"
        strategy_folder.mkdir(parents=True, exist_ok=True)
        write_merged_strategy(strategy_folder / "merge_strategy.ckpt", source.strategy)
    with whole_file(folder / "param_name_map.json", len(data)) as file:
        file.write(data)
    return folder, size, len(parts)


def _parts(specs: list[TensorSpec]) -> list[list[TensorSpec]]:
    """The largest first, each to the smallest part so far; within a part they keep their order."""
    total = sum(spec.nbytes for spec in specs)
    count = max(1, min(math.ceil(total / PART_BYTES), len(specs)))
    sizes, part_of = [0] * count, {}
    for spec in sorted(specs, key=lambda each: -each.nbytes):
        smallest = sizes.index(min(sizes))
        part_of[spec.name] = smallest
        sizes[smallest] += spec.nbytes
    return [[spec for spec in specs if part_of[spec.name] == index] for index in range(count)]
