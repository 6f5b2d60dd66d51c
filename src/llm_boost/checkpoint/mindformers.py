"""MindSpore's `.ckpt` or safetensors with MindFormers' parameter names, as a Checkpoint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.fields import Fields, read_json_object, shown
from llm_boost.checkpoint.huggingface import read_generation_config, settings_bytes
from llm_boost.checkpoint.mindformers_names import (
    LAYOUTS,
    RowOrder,
    concatenated_parts,
    hf_name,
    row_order,
)
from llm_boost.checkpoint.weight_files import Weights
from llm_boost.errors import CheckpointError

RANK_FOLDER = re.compile(r"rank_(\d+)")


class MindFormersCheckpoint:
    """A checkpoint, complete or of several ranks, its tensors under Hugging Face's names.

    The configuration is that of the config.json beside the weights or one folder above (above `rank_0` two);
    `hf_config` stands in where there is none. `qkv_layout` says how rows of a concatenated w_qkv and
    w_gate_hidden are ordered (`mindformers_names.LAYOUTS`), which the file itself does not.
    """

    format = "mindspore"

    def __init__(
        self,
        path: Path,
        files: Weights,
        hf_config: Mapping[str, Any] | None = None,
        qkv_layout: str | None = None,
    ) -> None:
        self.path = path
        self.folder = settings_folder(path)
        self.config = _config(self.folder, hf_config, path)
        self.generation_config = read_generation_config(self.folder)
        self.metadata: dict[str, Any] = {}
        self._files = files
        self._orders: dict[str, RowOrder] = {}
        self._source: dict[str, tuple[str, NDArray[np.intp] | None]] = {}
        tensors = {}
        for name, info in files.tensors.items():
            for theirs, rows in self._read_as(name, info, qkv_layout):
                if theirs in tensors:
                    raise CheckpointError(f"{path}: two parameters mean the same tensor {shown(theirs)}")
                shape = info.shape if rows is None else (len(rows), *info.shape[1:])
                tensors[theirs] = TensorInfo(theirs, shape, info.dtype)
                self._source[theirs] = (name, rows)
        self.tensors: Mapping[str, TensorInfo] = tensors

    def read(self, name: str) -> NDArray[Any]:
        """See Checkpoint.read."""
        source, rows = self._located(name)
        return self._files.read(source) if rows is None else self.read_rows(name, 0, len(rows))

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """See Checkpoint.read_rows."""
        source, rows = self._located(name)
        if rows is None:
            return self._files.read_rows(source, start, stop)
        if not 0 <= start <= stop <= len(rows):
            raise ValueError(f"rows {start} to {stop} of {name}, which has {len(rows)}")
        if start == stop:
            return self._files.read_rows(source, 0, 0)
        first = int(rows[start])  # rows of a part ascend
        return self._files.read_rows(source, first, int(rows[stop - 1]) + 1)[rows[start:stop] - first]

    def fingerprint(self) -> str:
        """See Checkpoint.fingerprint."""
        digest = hashlib.sha256(settings_bytes(self.folder, self.config))
        self._files.update_digest(digest)
        return digest.hexdigest()

    def forget(self) -> None:
        """See Checkpoint.forget."""
        self._files.forget()

    def close(self) -> None:
        """Lets go of the files; arrays already read stay valid."""
        self._files.close()

    def _located(self, name: str) -> tuple[str, NDArray[np.intp] | None]:
        if name not in self._source:
            raise CheckpointError(f"{self.path}: has no tensor {shown(name)}")
        return self._source[name]

    def _read_as(
        self, name: str, info: TensorInfo, layout: str | None
    ) -> list[tuple[str, NDArray[np.intp] | None]]:
        """The Hugging Face tensors that a parameter holds, and which of its rows each is (None: all)."""
        parts = concatenated_parts(name)
        if not parts:
            return [(hf_name(name) or name, None)]
        if layout is None:
            raise CheckpointError(
                f"{self.path}: parameter {name} is concatenated, in an order that the file does not tell; "
                f"llm-boost convert takes it as --qkv_layout ({', '.join(LAYOUTS)})"
            )
        sizes, head_dim = self._part_sizes(name, info, len(parts))
        order = row_order(name, layout, sizes, head_dim)
        return [(part, order.rows_of(index)) for index, part in enumerate(parts)]

    def _part_sizes(self, name: str, info: TensorInfo, parts: int) -> tuple[tuple[int, ...], int]:
        """Rows of the parts, by the config's heads; what is there must divide by them."""
        fields = Fields(self.config, str(self.folder / "config.json"))
        heads = fields.integer("num_attention_heads", 1, 1 << 16)
        kv_heads = fields.integer("num_key_value_heads", 1, heads, heads)
        hidden_size = fields.integer("hidden_size", 1, 1 << 24)
        head_dim = fields.integer("head_dim", 1, 1 << 16, max(1, hidden_size // heads))
        rows = info.shape[0] if info.shape else 0
        if parts == 2:
            if rows % 2:
                raise CheckpointError(f"{self.path}: parameter {name} has {rows} rows, which is odd")
            return (rows // 2, rows // 2), head_dim
        if heads % kv_heads:
            raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
        sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        if rows != sum(sizes):
            raise CheckpointError(
                f"{self.path}: parameter {name} has {rows} rows; {heads} heads and twice {kv_heads} "
                f"key heads of {head_dim} make {sum(sizes)}"
            )
        return sizes, head_dim


def settings_folder(path: Path) -> Path:
    """The nearest folder with a config.json: the weights' own, or one above it (above `rank_N` two)."""
    folder = path if path.is_dir() else path.parent
    folder = folder.absolute()
    candidates = [folder, folder.parent]
    if RANK_FOLDER.fullmatch(folder.name):
        candidates.append(folder.parent.parent)
    return next((each for each in candidates if (each / "config.json").is_file()), folder)


def _config(folder: Path, otherwise: Mapping[str, Any] | None, path: Path) -> dict[str, Any]:
    if (folder / "config.json").is_file():
        return read_json_object(folder / "config.json")
    if otherwise is None:
        raise CheckpointError(
            f"{path}: a MindSpore checkpoint says nothing of its model: put the model's config.json beside "
            "it, or give an llm_boost YAML with --config_path"
        )
    return dict(otherwise)


def rank_files(path: Path) -> list[Path]:
    """The weight files of a complete checkpoint in a directory: its own, or those of its only rank folder.

    As in MindFormers the last file of a rank's folder, in order of names, is the one that counts.
    """
    ranks = sorted(entry for entry in path.iterdir() if entry.is_dir() and RANK_FOLDER.fullmatch(entry.name))
    own = sorted(path.glob("*.ckpt"))
    if own and ranks:
        raise CheckpointError(f"{path}: holds both {own[0].name} and {ranks[0].name}; name the one to use")
    if ranks:
        own = sorted(file for kind in ("*.ckpt", "*.safetensors") for file in ranks[0].glob(kind))[-1:]
        if not own:
            raise CheckpointError(f"{ranks[0]}: no .ckpt or .safetensors file there")
    elif len(own) > 1 and not RANK_FOLDER.fullmatch(path.name):
        names = [file.name for file in own]
        raise CheckpointError(
            f"{path}: holds {len(own)} .ckpt files; name the one to use: {shown(names, 200)}"
        )
    return own[-1:]
