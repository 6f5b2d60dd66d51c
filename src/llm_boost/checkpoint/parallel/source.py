"""What is split, merged or re-split: a complete checkpoint or the folders of ranks, its bytes as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.fields import Fields, read_json_object, shown
from llm_boost.checkpoint.huggingface import weight_file_names
from llm_boost.checkpoint.mindformers import rank_files, settings_folder
from llm_boost.checkpoint.mindformers_names import is_mindformers, mindformers_name
from llm_boost.checkpoint.parallel.cuts import Joined
from llm_boost.checkpoint.parallel.pieces import Piece, PiecedTensor, whole_box
from llm_boost.checkpoint.parallel.split_weights import SplitWeights, is_split
from llm_boost.checkpoint.parallel.strategy import Strategy
from llm_boost.checkpoint.parallel.tensor_parallel import Heads
from llm_boost.checkpoint.weight_files import Shard, WeightFiles
from llm_boost.errors import CheckpointError

# Never a weight: tables that older checkpoints carry, and that their readers compute.
_COMPUTED = ".rotary_emb.inv_freq"


class Source(Protocol):
    """Parameters by the names they are written under; `digest` is of the files and how they are read."""

    @property
    def path(self) -> Path: ...

    @property
    def parameters(self) -> Mapping[str, TensorInfo]: ...

    @property
    def shards(self) -> list[Shard]: ...

    @property
    def strategy(self) -> Strategy | None: ...

    def pieced(self, name: str) -> PiecedTensor: ...

    def digest(self) -> str: ...

    def forget(self) -> None: ...


class CompleteSource:
    """One or many files of a complete checkpoint; Hugging Face's names become MindFormers'."""

    strategy = None

    def __init__(self, path: Path, files: WeightFiles, model_type: str | None) -> None:
        self.path = path
        self._files = files
        self.shards = files.shards
        self._names = _written_names(path, files, model_type)
        self.parameters: Mapping[str, TensorInfo] = {
            ours: files.tensors[theirs] for ours, theirs in self._names.items()
        }

    def pieced(self, name: str) -> PiecedTensor:
        info, theirs = self.parameters[name], self._names[name]
        return PiecedTensor(info, (Piece(whole_box(info.shape), self._files.shard(theirs), theirs),))

    def digest(self) -> str:
        digest = hashlib.sha256(json.dumps(list(self._names.items())).encode())
        self._files.update_digest(digest)
        return digest.hexdigest()

    def forget(self) -> None:
        self._files.forget()


class SplitSource:
    """The folders of ranks, merged."""

    def __init__(self, weights: SplitWeights) -> None:
        self.path = weights.path
        self._weights = weights
        self.shards = weights.shards
        self.strategy = weights.strategy
        self.parameters: Mapping[str, TensorInfo] = weights.tensors

    def pieced(self, name: str) -> PiecedTensor:
        return self._weights.pieced(name)

    def digest(self) -> str:
        digest = hashlib.sha256(b"split")
        self._weights.update_digest(digest)
        return digest.hexdigest()

    def forget(self) -> None:
        self._weights.forget()


def open_source(
    path: Path,
    strategy: Strategy | None = None,
    qkv_layout: str | None = None,
    file_suffix: str | None = None,
) -> tuple[Source, Joined]:
    """Opens `path` and says how its concatenated parameters are joined.

    A folder of several ranks is split, by `strategy` or what stands beside it; all else is complete.

    Raises:
        CheckpointError: nothing there, a format that cannot be split, or files that contradict each other.
    """
    path = path.expanduser()
    config = beside(path)
    joined = joined_rows(path, qkv_layout, config)
    try:
        if is_split(path):
            return SplitSource(SplitWeights(path, strategy, joined, file_suffix)), joined
        files, index = _complete_files(path)
    except OSError as error:
        raise CheckpointError(f"{path}: no checkpoint can be read there ({error.strerror})") from None
    model_type = str(config.get("model_type", "llama")) if config else None
    return CompleteSource(path, WeightFiles(path, files, index), model_type), joined


def _complete_files(path: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    if path.suffix == ".gguf" or (path.is_dir() and list(path.glob("*.gguf"))):
        raise CheckpointError(
            f"{path}: a GGUF file is not split; llm-boost convert makes a checkpoint of it that can be"
        )
    if not path.is_dir():
        path.stat()
        return [path], None
    names, index = weight_file_names(path)
    if names:
        return [path / name for name in names], index
    files = rank_files(path)
    if not files:
        raise CheckpointError(
            f"{path}: no checkpoint there (a .ckpt or .safetensors file, or folders rank_0, rank_1, ...)"
        )
    return files, None


def _written_names(path: Path, files: WeightFiles, model_type: str | None) -> dict[str, str]:
    """The name a parameter is written under -> its name in the file."""
    theirs_all = [name for name in files.tensors if not name.endswith(_COMPUTED)]
    renamed = {name: mindformers_name(name, model_type or "llama") for name in theirs_all}
    if is_mindformers(theirs_all) or all(ours in (None, theirs) for theirs, ours in renamed.items()):
        return {name: name for name in theirs_all}
    if model_type is None:
        raise CheckpointError(f"{path}: Hugging Face's names, and no config.json beside them says whose")
    names: dict[str, str] = {}
    for theirs, ours in renamed.items():
        if ours is None:
            raise CheckpointError(f"{path}: MindFormers has no name for parameter {shown(theirs)}")
        names[ours] = theirs
    return names


def beside(path: Path) -> dict[str, Any] | None:
    """The config.json that belongs to a checkpoint, if there is one."""
    settings = settings_folder(path) / "config.json"
    return read_json_object(settings) if settings.is_file() else None


def joined_rows(path: Path, qkv_layout: str | None, config: Mapping[str, Any] | None) -> Joined:
    """How the concatenated parameters of a checkpoint are joined, by the heads of its config.json."""
    if config is None:
        return Joined(qkv_layout)
    return Joined(qkv_layout, _heads(config, settings_folder(path) / "config.json"))


def _heads(config: Mapping[str, Any], path: Path) -> Heads | None:
    fields = Fields(config, str(path))
    if not fields.has("num_attention_heads"):
        return None
    query = fields.integer("num_attention_heads", 1, 1 << 16)
    return Heads(query, fields.integer("num_key_value_heads", 1, query, query))
