"""What lies at a path, be it a whole model or not: the model's tensors, or a weight file's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from llm_boost.checkpoint.weight_files import WeightFiles
from llm_boost.errors import CheckpointError

WEIGHTS = (".safetensors", ".ckpt", ".bin", ".pth")


class Contents(Protocol):
    """As much of a Checkpoint as a weight file without its model has."""

    @property
    def path(self) -> Path: ...

    @property
    def format(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> NDArray[Any]: ...

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]: ...

    def forget(self) -> None: ...

    def close(self) -> None: ...


class BareWeights:
    """Weight files that are no whole model: parameters under their own names, no configuration."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path, self.format = path, files[0].suffix.removeprefix(".")
        self.config: Mapping[str, Any] = {}
        self._files = WeightFiles(path, files)
        self.tensors = self._files.tensors
        self._shards = {name: shard for shard in self._files.shards for name in shard.infos()}

    def read(self, name: str) -> NDArray[Any]:
        """The tensor, of whatever type."""
        return self._shards[name].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of it."""
        return self._shards[name].read_rows(name, start, stop)

    def forget(self) -> None:
        """See Checkpoint.forget."""
        self._files.forget()

    def close(self) -> None:
        """Lets go of the files."""
        self._files.close()


def open_contents(
    path: Path, hf_config: Mapping[str, Any] | None = None, qkv_layout: str | None = None
) -> Checkpoint | Contents:
    """The checkpoint at `path`, or the weights there where they have no configuration, or are one part of it.

    Raises:
        CheckpointError: nothing there that is either, or a file that is damaged.
    """
    try:
        return open_checkpoint(path, hf_config, qkv_layout)
    except CheckpointError as error:
        files = [path] if path.suffix in WEIGHTS and path.is_file() else []
        if path.is_dir() and not (path / "config.json").is_file():
            files = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS)
        if not files:
            raise
        try:
            return BareWeights(path, files)
        except CheckpointError:
            raise error from None  # damaged either way; the first message knows more
