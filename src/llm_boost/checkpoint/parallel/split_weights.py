"""The folders `rank_N` of a split checkpoint as one: every parameter whole again, read as it is asked for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.fields import shown
from llm_boost.checkpoint.mindformers import RANK_FOLDER
from llm_boost.checkpoint.parallel.cuts import Joined, check_names, check_shape, local_boxes
from llm_boost.checkpoint.parallel.layout import Box, Layout
from llm_boost.checkpoint.parallel.manifest import NAME, Manifest, read_manifest, strategy_of
from llm_boost.checkpoint.parallel.pieces import Piece, PiecedTensor, whole_box
from llm_boost.checkpoint.parallel.strategy import Strategy
from llm_boost.checkpoint.parallel.strategy_files import read_strategy
from llm_boost.checkpoint.weight_files import Shard, as_floats, open_shard, update_digest
from llm_boost.checkpoint.whole_file import Progress
from llm_boost.errors import CheckpointError


class SplitWeights:
    """Like WeightFiles, of all ranks: opened, checked against the strategy and the manifests.

    A parameter's SHA-256 is compared with the manifest's when it is first read. Raises CheckpointError for
    folders that are missing or doubled, and for ranks, strategy and manifests that contradict each other.
    """

    def __init__(
        self,
        path: Path,
        strategy: Strategy | None = None,
        joined: Joined = Joined(),  # noqa: B008 - it is frozen
        file_suffix: str | None = None,
    ) -> None:
        self.path = path
        folders = rank_folders(path)
        self.shards = [open_shard(rank_file(folder, file_suffix)) for folder in folders]
        self._manifests = _manifests(self.shards)
        self.strategy = _strategy(path, strategy, self._manifests)
        if self.strategy.ranks != len(folders):
            raise CheckpointError(
                f"{path}: holds {len(folders)} rank folders; {self.strategy.source} is for "
                f"{self.strategy.ranks} ranks"
            )
        names = list(dict.fromkeys(name for shard in self.shards for name in shard.infos()))
        check_names(self.strategy, names, str(path))
        self._pieced = {name: self._assemble(name, joined) for name in names}
        self._checked: set[str] = set()
        self.tensors: Mapping[str, TensorInfo] = {name: each.info for name, each in self._pieced.items()}

    def pieced(self, name: str) -> PiecedTensor:
        """The parameter, its bytes as they are, checked where a manifest says what they must be."""
        if name not in self._pieced:
            raise CheckpointError(f"{self.path}: has no tensor {shown(name)}")
        if name not in self._checked:
            self._check_bytes(name)
            self._checked.add(name)
        return self._pieced[name]

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as float32, float16 or bfloat16."""
        return as_floats(self.stored(name), name, self.path)

    def stored(self, name: str) -> NDArray[Any]:
        """The tensor in whatever type it is stored."""
        tensor = self.pieced(name)
        return tensor.read(whole_box(tensor.info.shape))

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of it; no others are read."""
        tensor = self.pieced(name)
        rows, *rest = tensor.info.shape or (0,)
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start} to {stop} of {name}, which has {rows}")
        return as_floats(tensor.read(((start, stop), *whole_box(rest))), name, self.path)

    def update_digest(self, digest: hashlib._Hash) -> None:
        """Adds what changes when the files or the strategy do; reads no tensor."""
        for shard in self.shards:
            digest.update(shard.path.parent.name.encode())
            update_digest(digest, shard)
        digest.update(repr(self.strategy.stages).encode())

    def forget(self) -> None:
        """See Checkpoint.forget."""
        for shard in self.shards:
            shard.forget()

    def close(self) -> None:
        """Lets go of the files; arrays already read stay valid."""
        for shard in self.shards:
            shard.close()

    def _assemble(self, name: str, joined: Joined) -> PiecedTensor:
        having = [rank for rank, shard in enumerate(self.shards) if name in shard.infos()]
        infos = [self.shards[rank].infos()[name] for rank in having]
        for rank, info in zip(having, infos, strict=True):
            if (info.shape, info.dtype) != (infos[0].shape, infos[0].dtype):
                raise CheckpointError(
                    f"{self.shards[rank].path}: parameter {shown(name)} is {list(info.shape)} {info.dtype}, "
                    f"in {self.shards[having[0]].path.parent.name} {list(infos[0].shape)} {infos[0].dtype}"
                )
        holders = self.strategy.holders(name)
        if not holders:
            piece = Piece(whole_box(infos[0].shape), self.shards[having[0]], name)
            return PiecedTensor(infos[0], (piece,))
        first, layout = next((each for each in holders if self._has(each[0], name)), holders[0])
        return self._cut_tensor(name, infos[0], first, layout, joined)

    def _has(self, first: int, name: str) -> bool:
        """Whether a rank of the stage that begins with rank `first` holds the parameter."""
        ranks = range(first, first + self.strategy.stage_ranks)
        return any(name in self.shards[rank].infos() for rank in ranks)

    def _cut_tensor(
        self, name: str, info: TensorInfo, first: int, layout: Layout, joined: Joined
    ) -> PiecedTensor:
        where = str(self.shards[first].path)
        if len(layout.axes) != len(info.shape):
            raise CheckpointError(
                f"{where}: parameter {shown(name)} has {len(info.shape)} dimensions, "
                f"{self.strategy.source} lays out {len(layout.axes)}"
            )
        check_shape(name, layout, info.shape, self.strategy.source, where)
        whole = layout.whole_shape(info.shape)
        try:
            runs = joined.runs(name, whole[0], layout) if whole else ()
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        pieces: dict[Box, Piece] = {}
        wanted: dict[Box, Shard] = {}  # ranks that repeat each other need not all have it
        for rank in range(self.strategy.stage_ranks):
            shard, row = self.shards[first + rank], 0
            for box in local_boxes(layout, rank, whole, runs):
                wanted.setdefault(box, shard)
                if name in shard.infos():
                    pieces.setdefault(box, Piece(box, shard, name, row))
                row += box[0][1] - box[0][0] if box else 0
        for box, shard in wanted.items():
            if box not in pieces:
                raise CheckpointError(
                    f"{shard.path}: has no parameter {shown(name)}, which {self.strategy.source} lays there"
                )
        return PiecedTensor(TensorInfo(name, whole, info.dtype), tuple(pieces.values()))

    def _check_bytes(self, name: str) -> None:
        """Against the manifests; without them, what no strategy names must be the same on every rank."""
        used = {id(piece.shard) for piece in self._pieced[name].pieces}
        unnamed = not self.strategy.holders(name)
        first = ""
        for rank, shard in enumerate(self.shards):
            manifest = self._manifests.get(rank)
            compare = unnamed and manifest is None and name in shard.infos()
            if not compare and (id(shard) not in used or manifest is None):
                continue
            found = _check_sum(shard, name, manifest) if manifest else sha256(shard, name)
            if compare and found != (first := first or found):
                raise CheckpointError(
                    f"{shard.path}: parameter {shown(name)} differs from that of other ranks, though "
                    f"{self.strategy.source} does not cut it; give the strategy of this checkpoint"
                )


def is_split(path: Path) -> bool:
    """Whether it is a folder with those of several ranks."""
    return path.is_dir() and sum(1 for each in path.iterdir() if RANK_FOLDER.fullmatch(each.name)) > 1


def rank_folders(path: Path) -> list[Path]:
    """The folders rank_0, rank_1 and so on of a split checkpoint, all of them, once; [] if none."""
    folders: dict[int, Path] = {}
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        match = RANK_FOLDER.fullmatch(entry.name)
        if match and entry.is_dir():
            rank = int(match[1])
            if rank in folders:
                raise CheckpointError(
                    f"{path}: rank {rank} is there twice, {folders[rank].name} and {entry.name}"
                )
            folders[rank] = entry
    for expected, rank in enumerate(sorted(folders)):
        if rank != expected:
            raise CheckpointError(
                f"{path}: the folder rank_{expected} is missing; rank_{max(folders)} is there"
            )
    return [folders[rank] for rank in sorted(folders)]


def rank_file(folder: Path, suffix: str | None = None) -> Path:
    """A rank's weights: as in MindFormers the last of its files by name, or the one of `suffix`."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".ckpt", ".safetensors"))
    if suffix is not None:
        files = [
            file for file in files if re.search(rf"(^|[-_]){re.escape(suffix.lstrip('-_'))}$", file.stem)
        ]
    if not files:
        ending = f" whose name ends in {suffix}" if suffix is not None else ""
        raise CheckpointError(f"{folder}: no .ckpt or .safetensors file{ending} there")
    if len({file.suffix for file in files}) > 1:
        raise CheckpointError(f"{folder}: holds {files[0].name} and {files[-1].name}; keep one format")
    return files[-1]


def sha256(shard: Shard, name: str) -> str:
    """Of a tensor's bytes in a file, row-major."""
    digest = hashlib.sha256()
    info = shard.infos()[name]
    tensor = PiecedTensor(info, (Piece(whole_box(info.shape), shard, name),))
    for rows in tensor.rows([whole_box(info.shape)]):
        digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def verify_ranks(path: Path, progress: Progress | None = None) -> tuple[int, int]:
    """Compares every parameter of every rank with its manifest; returns ranks and bytes.

    Raises:
        CheckpointError: a manifest that is missing, or a parameter that is not what it says.
    """
    shards = [open_shard(rank_file(folder)) for folder in rank_folders(path)]
    if not shards:
        raise CheckpointError(f"{path}: no folders rank_0, rank_1, ... there")
    manifests = _manifests(shards)
    total = sum(manifest.size for manifest in manifests.values())
    done = 0
    for rank, shard in enumerate(shards):
        if rank not in manifests:
            raise CheckpointError(f"{shard.path.parent}: has no {NAME} to compare {shard.path.name} with")
        for name in shard.infos():
            _check_sum(shard, name, manifests[rank])
            done += shard.read(name).nbytes
            shard.forget()
            if progress:
                progress(done, total)
    return len(shards), total


def _check_sum(shard: Shard, name: str, manifest: Manifest) -> str:
    found = sha256(shard, name)
    if found != manifest.parameters[name].sha256:
        raise CheckpointError(
            f"{shard.path}: parameter {shown(name)} is not what its manifest says "
            "(SHA-256 differs): the file has changed or is damaged"
        )
    return found


def found_strategy(path: Path) -> Path | None:
    """Where the strategy of a split checkpoint may stand beside it: `strategy/` there or one folder above."""
    for folder in (path / "strategy", path.absolute().parent / "strategy"):
        if folder.is_dir() and any(file.suffix in (".ckpt", ".json") for file in folder.iterdir()):
            return folder
    return None


def _strategy(path: Path, given: Strategy | None, manifests: Mapping[int, Manifest]) -> Strategy:
    if given is not None:
        for manifest in manifests.values():
            _check_same_cuts(given, manifest, path)
        return given
    stated = strategy_of(manifests, path)
    if stated is not None:
        return stated
    beside = found_strategy(path)
    if beside is None:
        raise CheckpointError(
            f"{path}: a split checkpoint without its strategy: give it as src_strategy_path_or_dir "
            "(--src_strategy), or put it beside as strategy/"
        )
    return read_strategy(beside)


def _check_same_cuts(given: Strategy, manifest: Manifest, path: Path) -> None:
    layouts = given.of_rank(manifest.rank) if manifest.rank < given.ranks else {}
    rank = manifest.rank % given.stage_ranks
    for name, part in manifest.parameters.items():
        if name not in layouts or part.layout is None:
            continue
        try:
            same = layouts[name].box(rank, part.whole_shape) == part.layout.box(rank, part.whole_shape)
        except ValueError:
            same = False
        if not same:
            raise CheckpointError(
                f"{path}: parameter {shown(name)} was cut by another strategy than {given.source}, "
                f"says the manifest of rank_{manifest.rank}"
            )


def _manifests(shards: Sequence[Shard]) -> dict[int, Manifest]:
    """The manifests that are there, by rank, each checked against its folder, file and the others."""
    manifests: dict[int, Manifest] = {}
    for rank, shard in enumerate(shards):
        file, folder = shard.path, shard.path.parent
        manifest = read_manifest(folder)
        if manifest is None or manifest.file != file.name:
            continue
        if (manifest.rank, manifest.ranks) != (rank, len(shards)):
            raise CheckpointError(
                f"{folder}: its manifest says rank {manifest.rank} of {manifest.ranks}; "
                f"{len(shards)} rank folders are there, and this one is rank {rank}"
            )
        if manifest.size != file.stat().st_size:
            raise CheckpointError(
                f"{file}: {file.stat().st_size} bytes, its manifest says {manifest.size}; "
                "it is cut off or damaged"
            )
        _check_parts(manifest, shard)
        for other in manifests.values():
            if manifest.source.get("digest") != other.source.get("digest"):
                raise CheckpointError(
                    f"{folder}: is of another split than rank_{other.rank}, their manifests say"
                )
        manifests[rank] = manifest
    return manifests


def _check_parts(manifest: Manifest, shard: Shard) -> None:
    infos = shard.infos()
    for name in dict.fromkeys([*infos, *manifest.parameters]):
        part, info = manifest.parameters.get(name), infos.get(name)
        if part is None or info is None or (part.shape, part.dtype) != (info.shape, info.dtype):
            raise CheckpointError(
                f"{shard.path}: parameter {shown(name)} is not what the manifest beside it says"
            )
