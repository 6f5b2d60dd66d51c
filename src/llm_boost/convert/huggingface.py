"""A Hugging Face folder: weights in shards, their index, and the small files beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm_boost.checkpoint.safetensors_reader import DTYPES, SafetensorsFile
from llm_boost.checkpoint.safetensors_writer import TensorSpec, write_safetensors
from llm_boost.checkpoint.whole_file import whole_folder
from llm_boost.convert.progress import Steps
from llm_boost.convert.source import Source
from llm_boost.convert.tensors import OutTensor, streamed
from llm_boost.convert.verify import Checksums

Tensors = Sequence[OutTensor[TensorSpec]]


def plan(source: Source, dtypes: Mapping[str, str]) -> list[OutTensor[TensorSpec]]:
    """The tensors under their own names, in the model's order."""
    return [streamed(source.checkpoint, name, dtypes[name], name) for name in source.names()]


def write(
    folder: Path, tensors: Tensors, files: Mapping[str, bytes], max_shard_size: int, steps: Steps
) -> int:
    """Writes everything, verified, into a folder that takes its name at the end; returns the bytes."""
    shards = _shards(tensors, max_shard_size)
    total = sum(tensor.spec.nbytes for tensor in tensors)
    with whole_folder(folder, total) as temporary:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            _write_shard(temporary / name, shard, steps)
            weight_map |= {tensor.spec.name: name for tensor in shard}
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        write_files(temporary, files)
    return total


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Small files by name, a name may have a folder in it."""
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def _shards(tensors: Tensors, max_shard_size: int) -> list[Tensors]:
    """As many as it takes, none larger than the limit but where one tensor is."""
    shards: list[list[OutTensor[TensorSpec]]] = [[]]
    room = max_shard_size
    for tensor in tensors:
        if tensor.spec.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_size
        shards[-1].append(tensor)
        room -= tensor.spec.nbytes
    return shards  # type: ignore[return-value]


def _write_shard(path: Path, tensors: Tensors, steps: Steps) -> None:
    """Wider types first, so that each element is aligned though the file has no padding."""
    tensors = sorted(tensors, key=lambda tensor: -DTYPES[tensor.spec.dtype].itemsize)
    sums = Checksums()
    write_safetensors(
        path,
        [tensor.spec for tensor in tensors],
        sums.outgoing(tensors),
        {"format": "pt"},
        steps.writing,
        alignment=1,
        verify=lambda file: sums.check(file, SafetensorsFile(file), steps.verifying),
    )
    steps.finish_file()
