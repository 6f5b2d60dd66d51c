"""A Hugging Face directory: config.json and one or many weight files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from numpy.typing import NDArray

from llm_boost.checkpoint.fields import read_json_object, shown
from llm_boost.checkpoint.group_quants import QuantizedLinears, read_quantization
from llm_boost.checkpoint.weight_files import Weights
from llm_boost.errors import CheckpointError

SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


class HuggingFaceCheckpoint:
    """config.json, generation_config.json and *.safetensors (or pytorch_model*.bin) in one directory.

    Linears that GPTQ or AWQ has quantised are given dequantised, and `config` then is as if they were floats.
    """

    format = "huggingface"

    def __init__(self, path: Path, files: Weights, hf_config: Mapping[str, Any] | None = None) -> None:
        self.path = self.folder = path
        self.config = read_config(path, hf_config)
        self.generation_config = read_generation_config(path)
        self.metadata: dict[str, Any] = {}
        self._files = files
        self.tensors = files.tensors
        self._linears = self._quantized_linears()
        if self._linears is not None:
            self.config = {k: v for k, v in self.config.items() if k != "quantization_config"}
            self.tensors = {**self._linears.others(), **self._linears.tensors}

    def read(self, name: str) -> NDArray[Any]:
        """See Checkpoint.read."""
        if self._linears is not None and name in self._linears.tensors:
            return self._linears.read_rows(name, 0, self.tensors[name].shape[0])
        return self._files.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """See Checkpoint.read_rows."""
        if self._linears is not None and name in self._linears.tensors:
            return self._linears.read_rows(name, start, stop)
        return self._files.read_rows(name, start, stop)

    def _quantized_linears(self) -> QuantizedLinears | None:
        """By config.json's quantization_config, or what AutoGPTQ once wrote into a file of its own."""
        source, old = self.path / "config.json", self.path / "quantize_config.json"
        config = self.config
        if config.get("quantization_config") is None and old.is_file():
            source, config = old, {"quantization_config": {"quant_method": "gptq", **read_json_object(old)}}
        quantization = read_quantization(config, str(source))
        return None if quantization is None else QuantizedLinears(self._files, quantization, self.path)

    def fingerprint(self) -> str:
        """See Checkpoint.fingerprint."""
        digest = hashlib.sha256(settings_bytes(self.path, self.config))
        self._files.update_digest(digest)
        return digest.hexdigest()

    def forget(self) -> None:
        """See Checkpoint.forget."""
        self._files.forget()

    def close(self) -> None:
        """Lets go of the files; arrays already read stay valid."""
        self._files.close()


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json's keys; {} without one."""
    path = folder / "generation_config.json"
    return read_json_object(path) if path.is_file() else {}


def settings_bytes(folder: Path, config: Mapping[str, Any]) -> bytes:
    """config.json and generation_config.json, and the config in use, as part of a fingerprint."""
    data = b""
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            data += f"{name}\n".encode() + (folder / name).read_bytes()
    return data + json.dumps(config, sort_keys=True).encode()


def read_config(path: Path, otherwise: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json, or what stands in for it."""
    if (path / "config.json").is_file():
        return read_json_object(path / "config.json")
    if otherwise is None:
        raise CheckpointError(
            f"{path}: config.json is missing; a Hugging Face model has one beside its weights"
        )
    return dict(otherwise)


def weight_file_names(path: Path) -> tuple[list[str], dict[str, str] | None]:
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
