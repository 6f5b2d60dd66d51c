"""A checkpoint, whatever its format: a config, and tensors under Hugging Face's names in its layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from llm_boost.checkpoint.fields import shown
from llm_boost.errors import CheckpointError


@dataclass(frozen=True)
class TensorInfo:
    """dtype as stored: "float32", "float16", "bfloat16", another numpy name, or a GGUF type as "Q4_K"."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint(Protocol):
    """A model's files, opened and checked; tensors are read when asked for."""

    @property
    def path(self) -> Path: ...

    @property
    def folder(self) -> Path:
        """Where config.json, the tokenizer and their like are."""
        ...

    @property
    def format(self) -> str:
        """ "huggingface", "mindspore", "gguf", "meta" or "packed"."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """config.json's keys; for GGUF made from its metadata, `architectures` included."""
        ...

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json's keys; {} without one; for GGUF the token ids and sampling values in it."""
        ...

    @property
    def metadata(self) -> dict[str, Any]:
        """A GGUF file's keys and values (arrays: numpy's of numbers, lists of strings), else {}."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as float32, float16 or bfloat16 (a quantised one: float32); it may be read-only.

        Raises:
            CheckpointError: no such tensor, or its type is not one of floating point.
        """
        ...

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of the tensor, as `read` gives them; no others are read."""
        ...

    def fingerprint(self) -> str:
        """Changes when the files do (names, sizes, modification times, headers); reads no tensor."""
        ...

    def forget(self) -> None:
        """Drops what has been read from this process's memory; it can be read again, arrays stay valid."""
        ...

    def close(self) -> None: ...


def open_checkpoint(
    path: str | Path,
    hf_config: Mapping[str, Any] | None = None,
    qkv_layout: str | None = None,
    src_strategy: str | Path | None = None,
) -> Checkpoint:
    """Opens a Hugging Face directory, a GGUF file, MindSpore's `.ckpt` or safetensors, or a directory of one;
    a directory of Meta's `consolidated.*.pth`, or of packed weights.

    `hf_config` stands in for config.json where weights have none beside them. `qkv_layout` is that of a
    MindFormers checkpoint with concatenated weights (`mindformers_names.LAYOUTS`). A folder of several ranks
    is merged as it is read, by `src_strategy`, its manifests, or the strategy that lies beside it.

    Raises:
        CheckpointError: nothing there, a format not supported, or a file that is damaged.
    """
    path = Path(path).expanduser()
    try:
        if path.is_file():
            return _open_file(path, hf_config, qkv_layout)
        names = sorted(entry.name for entry in path.iterdir())
        if sum(1 for name in names if re.fullmatch(r"rank_\d+", name)) > 1:
            return _open_ranks(path, hf_config, qkv_layout, src_strategy)
        return _open_directory(path, names, hf_config, qkv_layout)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: cannot open the model ({getattr(error, 'strerror', error)})"
        ) from None


def _open_file(path: Path, hf_config: Mapping[str, Any] | None, qkv_layout: str | None) -> Checkpoint:
    if path.suffix == ".gguf":
        from llm_boost.checkpoint.gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if path.suffix == ".packed":
        return _open_directory(path.parent, [path.name], hf_config, qkv_layout)
    if path.suffix in (".ckpt", ".safetensors"):
        return _open_weights(path, [path], None, hf_config, qkv_layout)
    raise CheckpointError(
        f"{path}: not a model; give a .gguf or .ckpt file, or the directory that holds config.json"
    )


def _open_directory(
    path: Path, names: list[str], hf_config: Mapping[str, Any] | None, qkv_layout: str | None
) -> Checkpoint:
    if "weights.packed" in names:
        from llm_boost.checkpoint.packed_checkpoint import PackedCheckpoint

        return PackedCheckpoint(path, hf_config)
    weights = [n for n in names if n.endswith(".safetensors") or re.fullmatch(r"pytorch_model.*\.bin", n)]
    ggufs = [n for n in names if n.endswith(".gguf")]
    if weights or any(n.endswith(".index.json") for n in names):
        from llm_boost.checkpoint.huggingface import weight_file_names

        files, index = weight_file_names(path)
        return _open_weights(path, [path / name for name in files], index, hf_config, qkv_layout)
    if len(ggufs) == 1:
        return _open_file(path / ggufs[0], None, None)
    if ggufs:
        raise CheckpointError(
            f"{path}: holds {len(ggufs)} GGUF files; name the one to use: {shown(ggufs, 200)}"
        )
    if any(re.fullmatch(r"consolidated\.\d+\.pth", n) for n in names):
        from llm_boost.checkpoint.meta_pth import MetaCheckpoint

        return MetaCheckpoint(path, hf_config)
    if any(n.endswith(".ckpt") or re.fullmatch(r"rank_\d+", n) for n in names):
        from llm_boost.checkpoint.mindformers import rank_files

        return _open_weights(path, rank_files(path), None, hf_config, qkv_layout)
    if not names:
        raise CheckpointError(
            f"{path}: the directory is empty; it must hold config.json and *.safetensors, or a .gguf"
        )
    raise CheckpointError(f"{path}: no *.safetensors, pytorch_model*.bin, .ckpt or .gguf file there")


def _open_ranks(
    path: Path,
    hf_config: Mapping[str, Any] | None,
    qkv_layout: str | None,
    src_strategy: str | Path | None,
) -> Checkpoint:
    from llm_boost.checkpoint.huggingface import HuggingFaceCheckpoint
    from llm_boost.checkpoint.mindformers import MindFormersCheckpoint
    from llm_boost.checkpoint.mindformers_names import is_mindformers
    from llm_boost.checkpoint.parallel.source import beside, joined_rows
    from llm_boost.checkpoint.parallel.split_weights import SplitWeights
    from llm_boost.checkpoint.parallel.strategy_files import read_strategy

    strategy = read_strategy(src_strategy) if src_strategy is not None else None
    weights = SplitWeights(path, strategy, joined_rows(path, qkv_layout, beside(path) or hf_config))
    if weights.shards[0].path.suffix == ".ckpt" or is_mindformers(weights.tensors):
        return MindFormersCheckpoint(path, weights, hf_config, qkv_layout)
    return HuggingFaceCheckpoint(path, weights, hf_config)


def _open_weights(
    path: Path,
    files: list[Path],
    index: Mapping[str, str] | None,
    hf_config: Mapping[str, Any] | None,
    qkv_layout: str | None,
) -> Checkpoint:
    """Whose checkpoint it is, its tensors' names tell."""
    from llm_boost.checkpoint.huggingface import HuggingFaceCheckpoint
    from llm_boost.checkpoint.mindformers import MindFormersCheckpoint
    from llm_boost.checkpoint.mindformers_names import is_mindformers
    from llm_boost.checkpoint.weight_files import WeightFiles

    weights = WeightFiles(path, files, index)
    if files[0].suffix == ".ckpt" or is_mindformers(weights.tensors):
        return MindFormersCheckpoint(path, weights, hf_config, qkv_layout)
    if path.is_file():
        raise CheckpointError(f"{path}: one file of a model; give the directory that holds its config.json")
    return HuggingFaceCheckpoint(path, weights, hf_config)
