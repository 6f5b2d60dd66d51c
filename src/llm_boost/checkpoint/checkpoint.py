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
    def format(self) -> str:
        """ "huggingface" or "gguf"."""
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


def open_checkpoint(path: str | Path, hf_config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Opens a Hugging Face directory, a GGUF file, or a directory that holds one.

    `hf_config` stands in for config.json where a directory of safetensors has none.

    Raises:
        CheckpointError: nothing there, a format not supported, or a file that is damaged.
    """
    path = Path(path).expanduser()
    try:
        if path.is_file():
            return _open_file(path)
        names = sorted(entry.name for entry in path.iterdir())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot open the model ({getattr(error, 'strerror', error)})"
        ) from None
    return _open_directory(path, names, hf_config)


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        from llm_boost.checkpoint.gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if path.suffix == ".ckpt":
        raise _mindspore_error(path)
    raise CheckpointError(f"{path}: not a model; give a .gguf file, or the directory that holds config.json")


def _open_directory(path: Path, names: list[str], hf_config: Mapping[str, Any] | None) -> Checkpoint:
    weights = [n for n in names if n.endswith(".safetensors") or re.fullmatch(r"pytorch_model.*\.bin", n)]
    ggufs = [n for n in names if n.endswith(".gguf")]
    if weights or any(n.endswith(".index.json") for n in names):
        from llm_boost.checkpoint.huggingface import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path, hf_config)
    if len(ggufs) == 1:
        return _open_file(path / ggufs[0])
    if ggufs:
        raise CheckpointError(
            f"{path}: holds {len(ggufs)} GGUF files; name the one to use: {shown(ggufs, 200)}"
        )
    if any(n.endswith(".ckpt") or re.fullmatch(r"rank_\d+", n) for n in names):
        raise _mindspore_error(path)
    if not names:
        raise CheckpointError(
            f"{path}: the directory is empty; it must hold config.json and *.safetensors, or a .gguf"
        )
    raise CheckpointError(f"{path}: no *.safetensors, pytorch_model*.bin or .gguf file there")


def _mindspore_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: MindSpore checkpoints (.ckpt files, rank_N folders) cannot be read; "
        "give the model as Hugging Face safetensors or as GGUF"
    )
