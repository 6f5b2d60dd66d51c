"""A checkpoint in another format, in bounded memory: checked before, verified after, whole or not there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_boost.checkpoint.checkpoint import open_checkpoint
from llm_boost.checkpoint.parallel.split_weights import rank_folders
from llm_boost.checkpoint.whole_file import Progress, check_free_space, disk_errors, whole_folder
from llm_boost.convert import gguf, huggingface, mindspore, packed
from llm_boost.convert.gguf_metadata import gguf_metadata
from llm_boost.convert.progress import Steps
from llm_boost.convert.settings import settings_files
from llm_boost.convert.source import MODEL_TYPES, Source, main_dtype, target_dtypes
from llm_boost.convert.tensors import OutTensor, stored_dtype
from llm_boost.errors import ConfigError
from llm_boost.models.config import ModelConfig

DTYPES = {
    "fp32": "F32", "float32": "F32", "bf16": "BF16", "bfloat16": "BF16", "fp16": "F16", "float16": "F16",
}  # fmt: skip
PACKED_DTYPES = {"fp32": "float32", "bf16": "bfloat16", **{name: name for name in packed.DTYPES}}
FOLDERS = ("hf", "packed")  # targets that are a folder
SUFFIXES = {**mindspore.SUFFIXES, "gguf": ".gguf"}
DEFAULT_SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class Options:
    """`dtype` is one of DTYPES, for `packed` of PACKED_DTYPES; None keeps what is stored."""

    to: str
    dtype: str | None = None
    gguf_type: str | None = None
    qkv_layout: str | None = None  # of MindSpore output: None leaves q, k and v apart
    max_shard_size: int = DEFAULT_SHARD_SIZE
    threads: int = 2


@dataclass(frozen=True)
class Result:
    """`nbytes` are those of the tensors that were written."""

    path: Path
    format: str
    dtype: str
    tensors: int
    nbytes: int
    seconds: float


def convert(source: Source, output: Path, options: Options, progress: Progress | None = None) -> Result:
    """Writes `source` to `output`; a file's suffix is added where it lacks it.

    Raises:
        ConfigError: options that do not fit the target, an output that is the source or a folder in use.
        CheckpointError: a tensor that the target cannot hold, a full disk. Nothing is left of the output.
    """
    start = time.monotonic()
    path = output_path(output, options.to, source.path)
    dtype, tensors, nbytes = _WRITERS[options.to](source, path, options, progress)
    return Result(path, options.to, dtype, tensors, nbytes, time.monotonic() - start)


def output_path(output: Path, to: str, source: Path) -> Path:
    """Where exactly the output goes; ConfigError where it may not."""
    output = output.expanduser()
    if to in FOLDERS:
        if output.is_dir() and any(output.iterdir()):
            raise ConfigError(
                f"--output_path: {output} is there and not empty; remove it, or name another folder"
            )
        if output.exists() and not output.is_dir():
            raise ConfigError(f"--output_path: {output} is a file; {to} output is a folder")
        if output.suffix in (".bin", ".pth", ".safetensors", ".gguf", ".ckpt"):
            raise ConfigError(f"--output_path: {output} is a file's name; {to} output is a folder, name that")
        return output
    suffix = SUFFIXES[to]
    if output.is_dir():
        output = output / f"{source.resolve().name if source.is_dir() else source.stem}{suffix}"
    if output.suffix != suffix:
        output = output.with_name(output.name + suffix)
    if output.is_dir():
        raise ConfigError(f"--output_path: {output} is a folder")
    at = output.resolve()
    if at.exists() and (at == source.resolve() or source.resolve() in at.parents):
        raise ConfigError(
            f"--output_path: {output} belongs to the source, which is left as it is; name another"
        )
    return output


def convert_ranks(
    folder: Path, output: Path, hf_config: dict[str, Any] | None, layout: str | None, dtype: str | None,
    progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Concatenates q, k and v (gate and up) in each rank's share: `rank_N/checkpoint_N.ckpt` in and out.

    `layout` None is the family's (`default_layout`).
    """
    start = time.monotonic()
    ranks = rank_folders(folder)
    output_path(output, "hf", folder)
    plans, kinds = {}, set()
    for number, rank in enumerate(ranks):
        checkpoint = open_checkpoint(rank, hf_config)
        model = ModelConfig.from_hf(checkpoint.config, str(checkpoint.folder / "config.json"))
        dtypes = {name: dtype or stored_dtype(checkpoint, name) for name in checkpoint.tensors}
        kinds |= set(dtypes.values())
        model_type = MODEL_TYPES[model.architecture]
        name = f"rank_{number}/checkpoint_{number}.ckpt"
        order = layout or default_layout(model_type)
        plans[name] = mindspore.plan(
            checkpoint, list(checkpoint.tensors), model_type, dtypes, order, model.head_dim
        )
    total = sum(tensor.spec.nbytes for tensors in plans.values() for tensor in tensors)
    steps = Steps(total, progress)
    _make_parent(output)
    with whole_folder(output, total) as temporary:
        for name, tensors in plans.items():
            (temporary / name).parent.mkdir()
            mindspore.write(temporary / name, tensors, {}, steps)
    count = sum(map(len, plans.values()))
    return Result(output, "mindspore-ckpt", _joined(kinds), count, total, time.monotonic() - start)


def default_layout(model_type: str) -> str:
    """In which MindFormers' converters write a family's concatenated weights."""
    return "grouped" if model_type == "qwen2" else "grouped_plain_bias"


Written = tuple[str, int, int]  # dtype, tensors, bytes


def _write_huggingface(source: Source, path: Path, options: Options, progress: Progress | None) -> Written:
    dtypes = target_dtypes(source, float_dtype(options))
    tensors = huggingface.plan(source, dtypes)
    files = settings_files(source, _main(source, dtypes))
    _prepare(path, tensors)
    nbytes = huggingface.write(path, tensors, files, options.max_shard_size, _steps(tensors, progress))
    return _joined(set(dtypes.values())), len(tensors), nbytes


def _write_mindspore(source: Source, path: Path, options: Options, progress: Progress | None) -> Written:
    dtypes = target_dtypes(source, float_dtype(options))
    tensors = mindspore.plan(
        source.checkpoint,
        source.names(),
        source.model_type,
        dtypes,
        options.qkv_layout,
        source.model.head_dim,
    )
    files = settings_files(source, _main(source, dtypes))
    _prepare(path, tensors)
    nbytes = mindspore.write(path, tensors, files, _steps(tensors, progress))
    return _joined({tensor.spec.dtype for tensor in tensors}), len(tensors), nbytes


def _write_gguf(source: Source, path: Path, options: Options, progress: Progress | None) -> Written:
    if options.gguf_type and options.dtype:
        raise ConfigError("--gguf_type and --dtype: give one, both are the type of GGUF's tensors")
    kind = options.gguf_type or float_dtype(options, gguf.TYPES) or main_dtype(source)
    tensors = gguf.plan(source, kind)
    metadata = gguf_metadata(source, kind)
    _prepare(path, tensors)
    return kind, len(tensors), gguf.write(path, metadata, tensors, _steps(tensors, progress))


def _write_packed(source: Source, path: Path, options: Options, progress: Progress | None) -> Written:
    dtype = PACKED_DTYPES.get(options.dtype or "bf16")
    if dtype is None:
        raise ConfigError(f"--dtype: got {options.dtype!r}, allowed for packed: {', '.join(PACKED_DTYPES)}")
    files = settings_files(source, main_dtype(source))
    _make_parent(path)
    nbytes = packed.write(path, source, dtype, options.threads, files, progress)
    return dtype, len(source.checkpoint.tensors), nbytes


_WRITERS = {
    "hf": _write_huggingface,
    "mindspore-ckpt": _write_mindspore,
    "mindspore-safetensors": _write_mindspore,
    "gguf": _write_gguf,
    "packed": _write_packed,
}


def float_dtype(options: Options, more: Sequence[str] = ()) -> str | None:
    """--dtype as F32, F16 or BF16 (or one of `more`, in any case); None keeps what is stored."""
    if options.dtype is None:
        return None
    known = {**DTYPES, **{name.lower(): name for name in more}}
    if options.dtype.lower() not in known:
        raise ConfigError(f"--dtype: got {options.dtype!r}, allowed for {options.to}: {', '.join(known)}")
    return known[options.dtype.lower()]


def _main(source: Source, dtypes: dict[str, str]) -> str:
    return dtypes["model.layers.0.self_attn.q_proj.weight"]


def _prepare(path: Path, tensors: Sequence[OutTensor[Any]]) -> None:
    """The folder above exists, and has the room, before anything is written."""
    _make_parent(path)
    total = sum(tensor.spec.nbytes for tensor in tensors)
    with disk_errors(path, total):
        check_free_space(path.parent, total)


def _make_parent(path: Path) -> None:
    with disk_errors(path, 0):
        path.parent.mkdir(parents=True, exist_ok=True)


def _steps(tensors: Sequence[OutTensor[Any]], progress: Progress | None) -> Steps:
    return Steps(sum(tensor.spec.nbytes for tensor in tensors), progress)


def _joined(dtypes: set[str]) -> str:
    return " and ".join(sorted(dtypes))
