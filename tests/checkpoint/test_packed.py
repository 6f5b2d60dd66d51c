"""The packed cache: built once, found again, rebuilt when it should be, and never half-written."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from llm_boost.checkpoint.packed import (
    PackedEntry,
    PackedModel,
    PackedStore,
    PackKey,
    PlannedEntry,
    default_cache_dir,
)
from llm_boost.errors import CheckpointError

PLAN = [
    PlannedEntry("layers.0.qkv", 1000, {"kind": "matrix", "format": "int4", "rows": 10, "cols": 200}),
    PlannedEntry("norm", 64, {"kind": "vector", "format": "f32", "rows": 1, "cols": 16}),
    PlannedEntry("empty", 0, {}),
]


def key(**changes: object) -> PackKey:
    return PackKey(
        **{"source": Path("/models/m"), "fingerprint": "f1", "dtype": "int4", "layout": "v1", **changes}
    )


def entries():
    for index, (name, size, meta) in enumerate(PLAN):
        yield PackedEntry(name, np.full(size, index + 1, dtype=np.uint8), meta)


def not_called():
    raise AssertionError("built again")
    yield


def build(cache: Path, source: PackKey | None = None, make=entries) -> PackedModel:
    return PackedStore(cache).open_or_build(source or key(), make, PLAN)


def packed_files(cache: Path) -> list[str]:
    return sorted(file.name for file in (cache / "packed").iterdir() if file.suffix != ".lock")


def test_built_once_and_mapped(tmp_path):
    steps: list[tuple[int, int]] = []
    model = PackedStore(tmp_path).open_or_build(key(), entries, PLAN, lambda *step: steps.append(step))
    assert model.built
    assert steps[-1] == (model.path.stat().st_size, model.path.stat().st_size)
    again = build(tmp_path, make=not_called)
    assert not again.built
    for found in (model, again):
        assert list(found.entries) == [name for name, _, _ in PLAN]
        for index, (name, size, meta) in enumerate(PLAN):
            data, words = found.entries[name]
            assert words == meta
            assert data.tobytes() == bytes([index + 1]) * size
            assert data.dtype == np.uint8
            assert not data.flags.writeable
            assert size == 0 or data.ctypes.data % 64 == 0
    assert packed_files(tmp_path) == [model.path.name]


def test_a_changed_source_replaces_the_stale_file(tmp_path):
    old = build(tmp_path)
    other_dtype = build(tmp_path, key(dtype="int8"))
    other_source = build(tmp_path, key(source=Path("/models/n")))
    assert old.path.exists()
    assert other_dtype.path.exists()
    new = build(tmp_path, key(fingerprint="f2"))
    assert new.built
    assert packed_files(tmp_path) == sorted([new.path.name, other_source.path.name])  # both stale dtypes went
    assert old.entries["norm"][0].tobytes() == b"\2" * 64  # whoever had it mapped keeps it
    assert build(tmp_path, key(fingerprint="f2", layout="v2")).built


def test_another_plan_is_built_again(tmp_path):
    build(tmp_path)
    plan = [*PLAN[:1], PlannedEntry("norm", 64, {"kind": "other"}), *PLAN[2:]]
    made = [PackedEntry(name, np.zeros(size, dtype=np.uint8), meta) for name, size, meta in plan]
    store = PackedStore(tmp_path)
    assert store.open_or_build(key(), lambda: iter(made), plan).built
    assert store.open_or_build(key(), not_called, plan).entries["norm"][1] == {"kind": "other"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content.replace(b'"shape":[1000]', b'"shape":[9999]'),
        lambda content: content.replace(b"f1", b"f9"),
        lambda content: bytes(len(content)),
    ],
)
def test_a_damaged_file_is_built_again(tmp_path, damage):
    path = build(tmp_path).path
    content = path.read_bytes()
    assert damage(content) != content
    path.write_bytes(damage(content))
    assert build(tmp_path).built
    assert path.read_bytes() == content


def test_a_failing_builder_leaves_nothing(tmp_path):
    def fails():
        yield next(entries())
        raise CheckpointError("source: damaged")

    with pytest.raises(CheckpointError, match=r"^source: damaged$"):
        build(tmp_path, make=fails)
    assert packed_files(tmp_path) == []
    with pytest.raises(ValueError, match="was announced"):
        build(tmp_path, make=lambda: iter([PackedEntry("layers.0.qkv", np.zeros(1000, dtype=np.uint8), {})]))
    assert packed_files(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    real, room = os.write, 1200

    def write(file: int, data: bytes) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= (written := real(file, data[:room]))
        return written

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(
        CheckpointError, match=r"packed: no space for m-.* it takes 0.0 MB, .* MB are available"
    ):
        build(tmp_path)
    assert packed_files(tmp_path) == []


def test_one_entry_at_a_time_is_in_memory(tmp_path):
    size = 8 << 20
    plan = [PlannedEntry(f"e{i}", size, {}) for i in range(4)]
    tracemalloc.start()
    try:
        PackedStore(tmp_path).open_or_build(
            key(),
            lambda: (PackedEntry(name, np.ones(size, dtype=np.uint8), meta) for name, _, meta in plan),
            plan,
        )
        assert tracemalloc.get_traced_memory()[1] < 1.5 * size
    finally:
        tracemalloc.stop()


def test_a_cache_that_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(CheckpointError) as caught:
            build(cache)
        assert "the cache directory cannot be written to (" in str(caught.value)
        assert str(caught.value).endswith("choose another with --cache_dir or LLM_BOOST_CACHE")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_cache(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"cannot be written to \(Permission denied\)"):
        build(tmp_path)


def test_a_read_only_cache_that_has_the_model_is_enough(tmp_path, monkeypatch):
    build(tmp_path)
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("something was written"))
    assert not build(tmp_path, make=not_called).built


def test_the_default_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.delenv("LLM_BOOST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache_dir() == Path("/home/u/.cache/llm-boost")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_dir() == Path("/x/llm-boost")
    monkeypatch.setenv("LLM_BOOST_CACHE", "~/c")
    assert default_cache_dir() == Path("/home/u/c")
    assert PackedStore().folder == Path("/home/u/c/packed")


def racer(cache: str, start, builds, results) -> None:
    def slow_entries():
        with builds.get_lock():
            builds.value += 1
        time.sleep(0.3)
        yield from entries()

    start.wait()
    model = build(Path(cache), make=slow_entries)
    results.put((model.built, model.entries["norm"][0].tobytes()))


def test_two_processes_at_once_build_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, builds, results = context.Barrier(2), context.Value("i", 0), context.Queue()
    processes = [
        context.Process(target=racer, args=(str(tmp_path), start, builds, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    outcomes = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert builds.value == 1
    assert outcomes == [(False, b"\2" * 64), (True, b"\2" * 64)]


def test_a_killed_builder_is_cleaned_up_after(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
from test_packed import PLAN, PackedEntry, Path, build
def hangs():
    yield PackedEntry(PLAN[0].name, np.zeros(PLAN[0].nbytes, dtype=np.uint8), PLAN[0].meta)
    print("half", flush=True)
    time.sleep(600)
build(Path({str(tmp_path)!r}), make=hangs)
"""
    builder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "half\n"
    finally:
        builder.send_signal(signal.SIGKILL)
        builder.communicate()
    left = packed_files(tmp_path)
    assert len(left) == 1
    assert left[0].endswith(".tmp")
    model = build(tmp_path)
    assert model.built
    assert packed_files(tmp_path) == [model.path.name]
