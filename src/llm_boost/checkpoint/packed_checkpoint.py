"""A folder of packed weights, from `convert` or `quantize`: a Checkpoint that is mapped as it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.fields import parse_json_object, shown
from llm_boost.checkpoint.huggingface import read_config, read_generation_config, settings_bytes
from llm_boost.checkpoint.packed import MANIFEST, TENSORS, PackedModel, PlannedEntry, opened
from llm_boost.checkpoint.safetensors_reader import SafetensorsFile
from llm_boost.errors import CheckpointError

WEIGHTS = "weights.packed"


class PackedCheckpoint:
    """config.json, the tokenizer's files and the packed weights, in one folder.

    `tensors` are those of the checkpoint that was packed; they cannot be read any more.
    """

    format = "packed"

    def __init__(self, folder: Path, hf_config: Mapping[str, Any] | None = None) -> None:
        self.path = self.folder = folder
        self.config = read_config(folder, hf_config)
        self.generation_config = read_generation_config(folder)
        self.metadata: dict[str, Any] = {}
        self._file = SafetensorsFile(folder / WEIGHTS)
        if not {MANIFEST, TENSORS} <= set(self._file.metadata):
            raise CheckpointError(f"{self._file.path}: holds no packed weights of llm-boost")
        where = f"{self._file.path}: header"
        self.manifest = parse_json_object(self._file.metadata[MANIFEST].encode(), where)
        table = parse_json_object(self._file.metadata[TENSORS].encode(), where)
        self.dtype = str(self.manifest.get("dtype"))
        try:
            self.tensors: Mapping[str, TensorInfo] = {
                name: TensorInfo(name, tuple(map(int, shape)), str(dtype))
                for name, (dtype, shape) in table.items()
            }
        except (TypeError, ValueError):
            raise CheckpointError(f"{where}: its table of tensors is damaged") from None

    def packed(self, planned: Sequence[PlannedEntry], layout: str) -> PackedModel:
        """The mapped weights, if they are laid out as this version of the engine plans them."""
        version = self.manifest.get("layout")
        entries = opened(self._file, planned)
        if (
            version != layout
            or entries is None
            or self.manifest.get("entries") != json.loads(_metas(planned))
        ):
            raise CheckpointError(
                f"{self._file.path}: packed by another version of llm-boost (layout {shown(version)}), "
                "or for another config.json; convert or quantise the model again"
            )
        return PackedModel(self._file.path, entries, built=False)

    def read(self, name: str) -> NDArray[Any]:
        """Never: see `tensors`."""
        raise CheckpointError(
            f"{self.path}: packed weights cannot be read as tensors; take the source of the model"
        )

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Never: see `tensors`."""
        return self.read(name)

    def fingerprint(self) -> str:
        """See Checkpoint.fingerprint."""
        digest = hashlib.sha256(settings_bytes(self.folder, self.config))
        digest.update(self._file.header)
        return digest.hexdigest()

    def forget(self) -> None:
        """See Checkpoint.forget."""
        self._file.forget()

    def close(self) -> None:
        """Lets go of the file; what has been mapped stays valid."""
        self._file.close()


def _metas(planned: Sequence[PlannedEntry]) -> str:
    return json.dumps({entry.name: dict(entry.meta) for entry in planned})
