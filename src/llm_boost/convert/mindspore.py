"""MindSpore's files: MindFormers' names, and where it is wanted q, k and v (gate and up) as one parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llm_boost.checkpoint.checkpoint import Checkpoint
from llm_boost.checkpoint.fields import shown
from llm_boost.checkpoint.mindformers_names import (
    concatenated_name,
    concatenated_parts,
    mindformers_name,
    row_order,
)
from llm_boost.checkpoint.mindspore_ckpt import MindSporeFile, write_ckpt
from llm_boost.checkpoint.safetensors_reader import SafetensorsFile
from llm_boost.checkpoint.safetensors_writer import TensorSpec, write_safetensors
from llm_boost.convert.huggingface import write_files
from llm_boost.convert.progress import Steps
from llm_boost.convert.tensors import OutTensor, joined, streamed
from llm_boost.convert.verify import Checksums
from llm_boost.errors import CheckpointError, ConfigError

SUFFIXES = {"mindspore-ckpt": ".ckpt", "mindspore-safetensors": ".safetensors"}


def plan(
    checkpoint: Checkpoint,
    names: Sequence[str],
    model_type: str,
    dtypes: Mapping[str, str],
    qkv_layout: str | None,
    head_dim: int,
) -> list[OutTensor[TensorSpec]]:
    """The parameters; with `qkv_layout` concatenated in it. The checkpoint may be a rank's share of a model.

    Raises:
        CheckpointError: a tensor that MindFormers has no name for. ConfigError: a layout it lacks.
    """
    if qkv_layout is not None and model_type == "qwen3":
        raise ConfigError("--qkv_concat: MindFormers has no concatenated weights for qwen3; leave it out")
    tensors: dict[str, OutTensor[TensorSpec]] = {}
    for name in names:
        if name.endswith("rotary_emb.inv_freq"):  # the configuration implies it
            continue
        target = mindformers_name(name, model_type)
        if target is None:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {shown(name)}: MindFormers has no such parameter"
            )
        whole = concatenated_name(name) if qkv_layout is not None else None
        if whole is None or qkv_layout is None:
            tensors[target] = streamed(checkpoint, name, dtypes[name], target)
        elif whole not in tensors:
            tensors[whole] = _concatenated(checkpoint, whole, qkv_layout, head_dim, dtypes)
    return list(tensors.values())


def _concatenated(
    checkpoint: Checkpoint, whole: str, layout: str, head_dim: int, dtypes: Mapping[str, str]
) -> OutTensor[TensorSpec]:
    parts = concatenated_parts(whole)
    missing = [part for part in parts if part not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"{checkpoint.path}: tensor {missing[0]} is missing, a part of {whole}")
    sizes = tuple(checkpoint.tensors[part].shape[0] for part in parts)
    if len(parts) == 3 and (sizes[1] % head_dim or sizes[0] % (sizes[1] // head_dim or 1)):
        raise CheckpointError(
            f"{checkpoint.path}: {whole}: {sizes[0]} and {sizes[1]} rows of q and k are not whole groups "
            f"of heads of {head_dim}"
        )
    if len({dtypes[part] for part in parts}) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: {whole}: its parts differ in type; choose one with --dtype"
        )
    return joined(checkpoint, parts, row_order(whole, layout, sizes, head_dim), dtypes[parts[0]], whole)


def write(
    path: Path, tensors: Sequence[OutTensor[TensorSpec]], files: Mapping[str, bytes], steps: Steps
) -> int:
    """Writes a .ckpt or safetensors file by its name, verified, and what is missing of `files` beside it."""
    specs = [tensor.spec for tensor in tensors]
    sums = Checksums()

    def check(temporary: Path) -> None:
        file = (MindSporeFile if path.suffix == ".ckpt" else SafetensorsFile)(temporary)
        sums.check(temporary, file, steps.verifying)
        write_files(
            path.parent, {name: data for name, data in files.items() if not (path.parent / name).exists()}
        )

    if path.suffix == ".ckpt":
        write_ckpt(path, specs, sums.outgoing(tensors), steps.writing, check)
    else:
        write_safetensors(
            path, specs, sums.outgoing(tensors), {"format": "ms"}, steps.writing, alignment=1, verify=check
        )
    steps.finish_file()
    return sum(spec.nbytes for spec in specs)
