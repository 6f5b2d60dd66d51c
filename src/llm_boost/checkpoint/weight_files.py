"""The weight files of a checkpoint as one: every tensor in exactly one of them, under the file's own name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.fields import shown
from llm_boost.checkpoint.safetensors_reader import SafetensorsFile
from llm_boost.errors import CheckpointError

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


class Shard(Protocol):
    """One weight file."""

    path: Path

    def infos(self) -> dict[str, TensorInfo]: ...

    def read(self, name: str) -> NDArray[Any]: ...

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]: ...

    def forget(self) -> None: ...

    def close(self) -> None: ...


class Weights(Protocol):
    """The weights of a checkpoint, in whatever files, under the files' own names."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> NDArray[Any]: ...

    def stored(self, name: str) -> NDArray[Any]: ...

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]: ...

    def update_digest(self, digest: hashlib._Hash) -> None: ...

    def forget(self) -> None: ...

    def close(self) -> None: ...


def open_shard(path: Path) -> Shard:
    """The file in its format, which its name tells."""
    if path.suffix in (".bin", ".pth"):
        from llm_boost.checkpoint.torch_bin import TorchFile

        return TorchFile(path)
    if path.suffix == ".ckpt":
        from llm_boost.checkpoint.mindspore_ckpt import MindSporeFile

        return MindSporeFile(path)
    return SafetensorsFile(path)


class WeightFiles:
    """Files opened and checked; `index` maps tensors to file names, where there is one."""

    def __init__(self, path: Path, files: Iterable[Path], index: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.shards = [open_shard(file) for file in files]
        self._home = _locate(self.shards, index, path)
        self.tensors: Mapping[str, TensorInfo] = {
            name: shard.infos()[name] for name, shard in self._home.items()
        }

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as float32, float16 or bfloat16."""
        shard = self.shard(name)
        return as_floats(shard.read(name), name, shard.path)

    def stored(self, name: str) -> NDArray[Any]:
        """The tensor in whatever type it is stored."""
        return self.shard(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of it; no others are read."""
        shard = self.shard(name)
        rows = (self.tensors[name].shape or (0,))[0]
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start} to {stop} of {name}, which has {rows}")
        return as_floats(shard.read_rows(name, start, stop), name, shard.path)

    def update_digest(self, digest: hashlib._Hash) -> None:
        """Adds what changes when the files do; reads no tensor."""
        for shard in self.shards:
            update_digest(digest, shard)

    def forget(self) -> None:
        """See Checkpoint.forget."""
        for shard in self.shards:
            shard.forget()

    def close(self) -> None:
        """Lets go of the files; arrays already read stay valid."""
        for shard in self.shards:
            shard.close()

    def shard(self, name: str) -> Shard:
        """The file that holds a tensor."""
        if name not in self._home:
            raise CheckpointError(f"{self.path}: has no tensor {shown(name)}")
        return self._home[name]


def as_floats(tensor: NDArray[Any], name: str, path: Path) -> NDArray[Any]:
    """Tensor `name` of `path` as float32, float16 or bfloat16; a CheckpointError for other types."""
    if tensor.dtype in FLOATS:
        return tensor
    if tensor.dtype == np.float64:
        return tensor.astype(np.float32)
    raise CheckpointError(
        f"{path}: tensor {name} is {tensor.dtype}; weights must be float32, "
        "float16 or bfloat16 (a quantised checkpoint can be read as GGUF)"
    )


def update_digest(digest: hashlib._Hash, shard: Shard) -> None:
    """Adds what changes when a file does; reads no tensor."""
    stat = shard.path.stat()
    digest.update(f"{shard.path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    if isinstance(shard, SafetensorsFile):
        digest.update(shard.header)


def _locate(shards: list[Shard], index: Mapping[str, str] | None, path: Path) -> dict[str, Shard]:
    """Which file holds which tensor; every tensor must stand in one file, the one that the index names."""
    home: dict[str, Shard] = {}
    for shard in shards:
        for name in shard.infos():
            if name in home:
                raise CheckpointError(
                    f"{path}: tensor {shown(name)} is in both {home[name].path.name} and {shard.path.name}"
                )
            home[name] = shard
    for name, file in (index or {}).items():
        if name not in home or home[name].path.name != file:
            raise CheckpointError(f"{path / file}: has no tensor {shown(name)}, though the index says so")
    return home
