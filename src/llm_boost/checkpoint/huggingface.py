"""A Hugging Face directory: config.json and one or many weight files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.fields import read_json_object, shown
from llm_boost.checkpoint.safetensors_reader import SafetensorsFile
from llm_boost.errors import CheckpointError

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


class Shard(Protocol):
    """One weight file."""

    path: Path

    def infos(self) -> dict[str, TensorInfo]: ...

    def read(self, name: str) -> NDArray[Any]: ...

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]: ...

    def forget(self) -> None: ...

    def close(self) -> None: ...


class HuggingFaceCheckpoint:
    """config.json, generation_config.json and *.safetensors (or pytorch_model*.bin) in one directory."""

    format = "huggingface"

    def __init__(self, path: Path, hf_config: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.config = _config(path, hf_config)
        generation = path / "generation_config.json"
        self.generation_config = read_json_object(generation) if generation.is_file() else {}
        self.metadata: dict[str, Any] = {}
        files, index = _weight_files(path)
        self._shards = [_open_shard(path / name) for name in files]
        self._home = _locate(self._shards, index, path)
        self.tensors: Mapping[str, TensorInfo] = {
            name: shard.infos()[name] for name, shard in self._home.items()
        }

    def read(self, name: str) -> NDArray[Any]:
        """See Checkpoint.read."""
        return self._floats(name, self._shard(name).read(name))

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """See Checkpoint.read_rows."""
        shard = self._shard(name)
        rows = (self.tensors[name].shape or (0,))[0]
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start} to {stop} of {name}, which has {rows}")
        return self._floats(name, shard.read_rows(name, start, stop))

    def fingerprint(self) -> str:
        """See Checkpoint.fingerprint."""
        digest = hashlib.sha256()
        for name in ("config.json", "generation_config.json"):
            if (self.path / name).is_file():
                digest.update(f"{name}\n".encode() + (self.path / name).read_bytes())
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        for shard in self._shards:
            stat = shard.path.stat()
            digest.update(f"{shard.path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
            if isinstance(shard, SafetensorsFile):
                digest.update(shard.header)
        return digest.hexdigest()

    def forget(self) -> None:
        """See Checkpoint.forget."""
        for shard in self._shards:
            shard.forget()

    def close(self) -> None:
        """Lets go of the files; arrays already read stay valid."""
        for shard in self._shards:
            shard.close()

    def _shard(self, name: str) -> Shard:
        if name not in self._home:
            raise CheckpointError(f"{self.path}: has no tensor {shown(name)}")
        return self._home[name]

    def _floats(self, name: str, tensor: NDArray[Any]) -> NDArray[Any]:
        if tensor.dtype in FLOATS:
            return tensor
        if tensor.dtype == np.float64:
            return tensor.astype(np.float32)
        raise CheckpointError(
            f"{self._home[name].path}: tensor {name} is {tensor.dtype}; weights must be float32, "
            "float16 or bfloat16 (a quantised checkpoint can be read as GGUF)"
        )


def _config(path: Path, otherwise: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json, or what stands in for it."""
    if (path / "config.json").is_file():
        return read_json_object(path / "config.json")
    if otherwise is None:
        raise CheckpointError(
            f"{path}: config.json is missing; a Hugging Face model has one beside its weights"
        )
    return dict(otherwise)


def _weight_files(path: Path) -> tuple[list[str], dict[str, str] | None]:
    """The names of the files to read, and the index's weight_map, in transformers' order of search."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (path / single).is_file():
            return [single], None
        if (path / index).is_file():
            weight_map = _weight_map(path / index)
            return sorted(set(weight_map.values())), weight_map
    names = sorted(file.name for file in path.glob("*.safetensors"))
    for name in names:
        _check_all_parts(name, names, path)
    return names, None


def _weight_map(index: Path) -> dict[str, str]:
    """An index's `weight_map`: tensor name -> file name, which must lie in the index's own folder."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is {shown(weight_map)}; it must map tensors to files")
    for file in weight_map.values():
        if (
            not isinstance(file, str)
            or PurePosixPath(file).name != file
            or file in ("", "..")
            or "\0" in file
        ):
            raise CheckpointError(
                f"{index}: {shown(file)} points outside the model's folder; it must be a file name"
            )
    for file in sorted(set(weight_map.values())):
        if not (index.parent / file).is_file():
            raise CheckpointError(
                f"{index.parent / file}: this part of the model is missing; download it too"
            )
    return weight_map


def _check_all_parts(name: str, names: list[str], path: Path) -> None:
    """`x-00002-of-00003.safetensors` wants parts 1 and 3 beside it."""
    match = SHARD.fullmatch(name)
    for part in range(1, int(match[3]) + 1) if match else ():
        wanted = f"{match[1]}-{part:05}-of-{match[3]}.safetensors"  # type: ignore[index]
        if wanted not in names:
            raise CheckpointError(f"{path / wanted}: this part of the model is missing; download it too")


def _open_shard(path: Path) -> Shard:
    if path.suffix == ".bin":
        from llm_boost.checkpoint.torch_bin import TorchFile

        return TorchFile(path)
    return SafetensorsFile(path)


def _locate(shards: list[Shard], index: dict[str, str] | None, path: Path) -> dict[str, Shard]:
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
