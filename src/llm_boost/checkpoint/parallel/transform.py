"""Splits, merges and re-splits: every rank's file from the boxes of it that the source holds.

Ranks are written side by side, parameter by parameter, so that the source is read once; or one after the
other. A rank's folder gets its manifest and then its file, under its name only when it is whole. What an
interrupted run had completed is kept by the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.fields import shown
from llm_boost.checkpoint.mindformers import RANK_FOLDER
from llm_boost.checkpoint.mindspore_ckpt import MindSporeFile, ckpt_steps
from llm_boost.checkpoint.parallel.cuts import Joined, check_names, check_shape, local_boxes
from llm_boost.checkpoint.parallel.layout import Box, Layout
from llm_boost.checkpoint.parallel.manifest import NAME, Manifest, Part, read_manifest
from llm_boost.checkpoint.parallel.pieces import CODES, whole_box
from llm_boost.checkpoint.parallel.source import Source
from llm_boost.checkpoint.parallel.strategy import Strategy
from llm_boost.checkpoint.safetensors_reader import SafetensorsFile
from llm_boost.checkpoint.safetensors_writer import TensorSpec, safetensors_steps
from llm_boost.checkpoint.weight_files import Shard
from llm_boost.checkpoint.whole_file import Progress, Rows, check_free_space, disk_errors
from llm_boost.errors import CheckpointError

FORMATS = ("ckpt", "safetensors")
MAPPED_BYTES = 64 << 20  # written between two times that the source's pages are let go


@dataclass(frozen=True)
class Share:
    """What one file will hold: of each parameter, in order, its shape there and the boxes that make it."""

    file: Path
    rank: int | None  # None: a file without a manifest
    ranks: int
    stage: int
    specs: tuple[TensorSpec, ...]
    boxes: dict[str, list[Box]]
    layouts: dict[str, Layout]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


def plan(
    source: Source,
    strategy: Strategy | None,
    folder: Path,
    prefix: str = "checkpoint_",
    output_format: str = "ckpt",
    joined: Joined = Joined(),  # noqa: B008 - it is frozen
) -> list[Share]:
    """What each rank's file, `folder/rank_N/{prefix}N.ckpt`, will hold; without a strategy one holds it all.

    Raises:
        CheckpointError: a strategy that contradicts the checkpoint.
    """
    if strategy is not None:
        check_names(strategy, source.parameters, str(source.path))
    shares = []
    for rank in range(strategy.ranks if strategy else 1):
        name = f"{prefix}{rank}.{output_format}"
        if Path(name).name != name:
            raise CheckpointError(f"--prefix {prefix!r}: must be the beginning of a file's name")
        shares.append(_share(source, strategy, rank, folder / f"rank_{rank}" / name, joined))
    return shares


def transform(
    source: Source,
    shares: Sequence[Share],
    *,
    by_rank: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
) -> list[Share]:
    """Writes the shares, `workers` groups of them at a time; returns those that were whole before.

    Raises:
        CheckpointError: a folder that holds something else, a full disk, a source that is damaged.
    """
    digest = source.digest()
    kept = [share for share in shares if _is_whole(share, digest)]
    todo = [share for share in shares if share not in kept]
    for share in todo:
        _check_vacant(share)
    _check_space(todo)
    meter = _Meter(sum(share.nbytes for share in todo), progress)
    workers = max(1, min(workers, len(todo)))
    groups = [[share] for share in todo] if by_rank else [list(todo[i::workers]) for i in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(_write_group, source, digest, group, meter) for group in groups if group]:
            done.result()
    return kept


def check_vacant(folder: Path, ranks: int, source: Source) -> None:
    """The source may not lie where the result goes, nor folders of more ranks than it has."""
    for shard in source.shards:
        if folder.resolve() in shard.path.resolve().parents and RANK_FOLDER.fullmatch(shard.path.parent.name):
            raise CheckpointError(f"{folder}: is where the source lies; choose another folder")
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = RANK_FOLDER.fullmatch(entry.name)
        if match and (int(match[1]) >= ranks or entry.name != f"rank_{int(match[1])}"):
            raise CheckpointError(
                f"{entry}: is there, and the result has {ranks} rank{'s' * (ranks > 1)}; "
                "choose another folder, or remove it"
            )


def _share(source: Source, strategy: Strategy | None, rank: int, file: Path, joined: Joined) -> Share:
    layouts = strategy.of_rank(rank) if strategy else {}
    local_rank = rank % strategy.stage_ranks if strategy else 0
    elsewhere = set(strategy.names) - set(layouts) if strategy else set()
    specs, boxes, used = [], {}, {}
    for name, info in source.parameters.items():
        if name in elsewhere:
            continue
        layout = layouts.get(name)
        if layout is None or strategy is None:
            shape, boxes[name] = info.shape, [whole_box(info.shape)]
        else:
            shape, boxes[name] = _cut(source, strategy, name, layout, local_rank, joined)
            used[name] = replace(layout, split_shape=shape)
        specs.append(TensorSpec(name, CODES[info.dtype], shape))
    stage = rank // strategy.stage_ranks if strategy else 0
    return Share(file, rank, strategy.ranks if strategy else 1, stage, tuple(specs), boxes, used)


def _cut(
    source: Source, strategy: Strategy, name: str, layout: Layout, local_rank: int, joined: Joined
) -> tuple[tuple[int, ...], list[Box]]:
    whole = source.parameters[name].shape
    try:
        shape = layout.local_shape(whole)
        runs = joined.runs(name, whole[0], layout) if whole else ()
        boxes = local_boxes(layout, local_rank, whole, runs)
    except ValueError as error:
        raise CheckpointError(f"{source.path}: parameter {shown(name)}: {strategy.source}: {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from None
    check_shape(name, layout, shape, strategy.source, str(source.path))
    return shape, boxes


def _write_group(source: Source, digest: str, shares: Sequence[Share], meter: _Meter) -> None:
    """Several files side by side: each parameter is read for all of them before the next one."""
    with contextlib.ExitStack() as stack:
        hashing = stack.enter_context(ThreadPoolExecutor(1))
        steps: list[tuple[set[str], Generator[None, None, None]]] = []
        for share in shares:
            share.file.parent.mkdir(parents=True, exist_ok=True)
            writing = _writing(source, digest, share, meter, hashing)
            steps.append((set(share.boxes), stack.enter_context(contextlib.closing(writing))))
        for name in source.parameters:
            for names, writing in steps:
                if name in names:
                    next(writing)
        for _, writing in steps:
            next(writing, None)


def _writing(
    source: Source, digest: str, share: Share, meter: _Meter, hashing: ThreadPoolExecutor
) -> Generator[None, None, None]:
    """Writes a share, a parameter a step."""
    sums: dict[str, str] = {}

    def tensors() -> Iterator[tuple[str, Rows]]:
        for spec in share.specs:
            rows = _released(source, source.pieced(spec.name).rows(share.boxes[spec.name]))
            yield spec.name, _hashed(rows, spec.name, sums, hashing)

    def verify(temporary: Path) -> None:
        _verify(temporary, share)
        if share.rank is not None:
            manifest = _manifest(source, digest, share, share.rank, temporary.stat().st_size, sums)
            manifest.write(share.file.parent)

    progress = meter.of(share)
    if share.file.suffix == ".ckpt":
        return ckpt_steps(share.file, share.specs, tensors(), progress, verify)
    metadata = {"format": "ms"}
    return safetensors_steps(share.file, share.specs, tensors(), metadata, progress, 1, verify)


def _released(source: Source, rows: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """The rows; now and then the source's pages are taken out of this process's memory."""
    since = 0
    for chunk in rows:
        yield chunk
        since += chunk.nbytes
        if since >= MAPPED_BYTES:
            source.forget()
            since = 0
    source.forget()


def _hashed(
    rows: Iterable[NDArray[Any]], name: str, sums: dict[str, str], hashing: ThreadPoolExecutor
) -> Iterator[NDArray[Any]]:
    """The rows, hashed by another thread while they are written."""
    digest = hashlib.sha256()
    for chunk in rows:
        data = np.ascontiguousarray(chunk)
        pending = hashing.submit(digest.update, data.reshape(-1).view(np.uint8).data)
        yield data
        pending.result()
    sums[name] = digest.hexdigest()


def _verify(temporary: Path, share: Share) -> None:
    """What was written must read as what was planned."""
    reader: Callable[[Path], Shard] = MindSporeFile if share.file.suffix == ".ckpt" else SafetensorsFile
    written = reader(temporary)
    found = [(info.name, info.shape, CODES[info.dtype]) for info in written.infos().values()]
    written.close()
    if sorted(found) != sorted((spec.name, spec.shape, spec.dtype) for spec in share.specs):
        raise CheckpointError(
            f"{share.file}: what was written does not read as it should; the disk may be faulty"
        )


def _manifest(
    source: Source, digest: str, share: Share, rank: int, size: int, sums: dict[str, str]
) -> Manifest:
    parameters = {
        spec.name: Part(
            shape=spec.shape,
            whole_shape=source.parameters[spec.name].shape,
            dtype=source.parameters[spec.name].dtype,
            layout=share.layouts.get(spec.name),
            sha256=sums[spec.name],
        )
        for spec in share.specs
    }
    origin = {"path": str(source.path.absolute()), "digest": digest}
    return Manifest(rank, share.ranks, share.stage, share.file.name, size, origin, parameters)


def _is_whole(share: Share, digest: str) -> bool:
    """Whether an earlier run completed it, from the same source by the same cuts."""
    if share.rank is None or not share.file.is_file() or not (share.file.parent / NAME).is_file():
        return False
    manifest = read_manifest(share.file.parent)
    if manifest is None or manifest.source.get("digest") != digest:
        return False
    parts = {spec.name: spec.shape for spec in share.specs}
    return (
        (manifest.rank, manifest.ranks, manifest.file) == (share.rank, share.ranks, share.file.name)
        and manifest.size == share.file.stat().st_size
        and {name: part.shape for name, part in manifest.parameters.items()} == parts
        and manifest.layouts() == share.layouts
    )


def _check_vacant(share: Share) -> None:
    """A rank's folder may be missing, or hold what an interrupted run left."""
    for file in share.file.parent.iterdir() if share.file.parent.is_dir() else ():
        if file.suffix in (".ckpt", ".safetensors"):
            raise CheckpointError(
                f"{file}: is there, and of something else; choose another folder, or remove it"
            )


def _check_space(shares: Sequence[Share]) -> None:
    if shares:
        total = sum(share.nbytes for share in shares)
        folder = next(p for p in shares[0].file.absolute().parents if p.is_dir())
        with disk_errors(folder / shares[0].file.parent.parent.name, total):
            check_free_space(folder, total)


class _Meter:
    """Adds up the progress of files that are written at the same time."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done: dict[Path, int] = {}
        self._lock = threading.Lock()

    def of(self, share: Share) -> Progress | None:
        if self._progress is None:
            return None

        def report(done: int, total: int) -> None:
            with self._lock:
                self._done[share.file] = min(done, share.nbytes)
                if self._progress:
                    self._progress(sum(self._done.values()), self._total)

        return report
