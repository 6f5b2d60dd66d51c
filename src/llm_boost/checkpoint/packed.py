"""The packed cache: a model's weights as the kernels want them, built once, mapped into memory ever after.

A packed model is one safetensors file of byte tensors, each at a multiple of 64 bytes, whose metadata holds a
JSON manifest: what it was made from, and the builder's own words (`meta`) for every entry. A file that is cut
off, or not what the builder would write today, is built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.safetensors_reader import SafetensorsFile
from llm_boost.checkpoint.safetensors_writer import TensorSpec, write_safetensors
from llm_boost.checkpoint.whole_file import Progress
from llm_boost.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST, TENSORS = "llm_boost.packed", "llm_boost.tensors"

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class PackKey:
    """What a packed model is made from; `layout` names the version of the byte layout."""

    source: Path
    fingerprint: str
    dtype: str
    layout: str


class PlannedEntry(NamedTuple):
    """An entry before its data exists; `meta` must be plain JSON (kind, format, rows, cols, ...)."""

    name: str
    nbytes: int
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class PackedEntry:
    """An entry's bytes, flat uint8."""

    name: str
    data: Bytes
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class PackedModel:
    """`entries[name]` is (bytes, meta); the bytes are a read-only slice of the map, 64-byte aligned."""

    path: Path
    entries: Mapping[str, tuple[Bytes, Mapping[str, Any]]]
    built: bool  # whether this call built it, rather than finding it


def default_cache_dir() -> Path:
    """$LLM_BOOST_CACHE, else $XDG_CACHE_HOME/llm-boost, else ~/.cache/llm-boost."""
    if own := os.environ.get("LLM_BOOST_CACHE"):
        return Path(own).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "llm-boost"
    return Path("~/.cache/llm-boost").expanduser()


class PackedStore:
    """The packed models under one cache directory."""

    def __init__(self, cache_dir: str | Path | None = None) -> None:
        self.folder = (Path(cache_dir).expanduser() if cache_dir else default_cache_dir()) / "packed"

    def open_or_build(
        self,
        key: PackKey,
        entries: Callable[[], Iterator[PackedEntry]],
        planned: Sequence[PlannedEntry],
        progress: Progress | None = None,
    ) -> PackedModel:
        """The packed model of `key`: mapped if it is there, else built from `entries()`, in `planned` order.

        One entry at a time is in memory. Of processes that start together one builds, the others wait. A
        build removes what was packed from earlier states of the same source.

        Raises:
            CheckpointError: the directory cannot be written to, or the disk is full; no part of a file stays.
        """
        names = _Names(key)
        path = self.folder / names.file
        if (found := _open(path, key, planned)) is not None:
            return PackedModel(path, found, built=False)
        with _lock(self.folder, names.lock):
            if (found := _open(path, key, planned)) is not None:  # the one we waited for has built it
                return PackedModel(path, found, built=False)
            self._remove_stale(names)
            self._build(path, key, entries, planned, progress)
            found = _open(path, key, planned)
        if found is None:
            raise CheckpointError(f"{path}: damaged or removed as soon as it was written; check the disk")
        return PackedModel(path, found, built=True)

    def _remove_stale(self, names: _Names) -> None:
        """Under the lock nobody else writes for this source: its temporary files are a crashed builder's."""
        for file in self.folder.glob(f"{names.source}-*"):
            current = file.name.endswith(f"-{names.state}.safetensors") and file.name != names.file
            if file.name != names.lock and not current:
                with contextlib.suppress(OSError):
                    file.unlink()

    def _build(
        self,
        path: Path,
        key: PackKey,
        entries: Callable[[], Iterator[PackedEntry]],
        planned: Sequence[PlannedEntry],
        progress: Progress | None,
    ) -> None:
        write_packed(path, key, entries, planned, None, progress)


def write_packed(
    path: Path,
    key: PackKey,
    entries: Callable[[], Iterator[PackedEntry]],
    planned: Sequence[PlannedEntry],
    tensors: Sequence[TensorInfo] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes one packed file; `tensors`, of the checkpoint that is packed, are for who has the file alone."""
    specs = [TensorSpec(entry.name, "U8", (entry.nbytes,)) for entry in planned]
    metas = {entry.name: entry.meta for entry in planned}

    def announced() -> Iterator[tuple[str, Bytes]]:
        for entry in entries():
            if entry.meta != metas.get(entry.name):
                raise ValueError(f"{entry.name}: {metas.get(entry.name)} was announced, {entry.meta} came")
            yield entry.name, entry.data
            del entry  # else it would live on while the next is made

    metadata = {MANIFEST: _manifest(key, planned)}
    if tensors is not None:
        metadata[TENSORS] = json.dumps({info.name: [info.dtype, list(info.shape)] for info in tensors})
    write_safetensors(path, specs, announced(), metadata, progress)


class _Names:
    """File names: those of one source begin alike, those of one state of it end alike."""

    def __init__(self, key: PackKey) -> None:
        source = Path(os.path.abspath(key.source))
        self.source = f"{re.sub(r'[^A-Za-z0-9._-]', '_', source.name)[:80]}-{_digest(str(source))}"
        self.state = _digest(key.fingerprint, key.layout, str(FORMAT_VERSION))
        self.file = f"{self.source}-{key.dtype}-{self.state}.safetensors"
        self.lock = f"{self.source}-build.lock"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _manifest(key: PackKey, planned: Sequence[PlannedEntry]) -> str:
    manifest = {
        "version": FORMAT_VERSION,
        "source": os.path.abspath(key.source),
        "fingerprint": key.fingerprint,
        "dtype": key.dtype,
        "layout": key.layout,
        "entries": {entry.name: dict(entry.meta) for entry in planned},
    }
    return json.dumps(manifest, sort_keys=True)


def _open(
    path: Path, key: PackKey, planned: Sequence[PlannedEntry]
) -> dict[str, tuple[Bytes, Mapping[str, Any]]] | None:
    """The mapped entries, or None where the file is missing, damaged or not what would be written today."""
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return None
    return opened(file, planned) if file.metadata.get(MANIFEST) == _manifest(key, planned) else None


def opened(
    file: SafetensorsFile, planned: Sequence[PlannedEntry]
) -> dict[str, tuple[Bytes, Mapping[str, Any]]] | None:
    """The mapped entries, or None where they are not those that are planned."""
    sizes = {name: info.shape for name, info in file.infos().items()}
    if sizes != {entry.name: (entry.nbytes,) for entry in planned}:
        return None
    return {entry.name: (file.raw(entry.name), entry.meta) for entry in planned}


@contextlib.contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    """Holds an exclusive lock; the kernel lets go of a crashed process's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise _unwritable(folder, error) from None
        yield
    finally:
        os.close(file)


def _unwritable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the cache directory cannot be written to ({error.strerror}); "
        "choose another with --cache_dir or LLM_BOOST_CACHE"
    )
