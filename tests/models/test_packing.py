"""Packing from a checkpoint: what stays in memory while it runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_boost.checkpoint import open_checkpoint
from llm_boost.models.packing import pack_entries, plan_entries
from llm_boost.models.weights import Matrix, Table, Vector

ROWS, COLS = 1024, 512  # 2 MB of float32
SLACK = 256 * 1024  # pages that the kernel maps around those that were asked for
SPECS = [
    Table("embed", "embed"),
    *(Matrix(f"m{i}", (f"m{i}",)) for i in range(8)),
    Vector("norm", ("norm",)),
    Matrix("both", ("m0", "m1"), interleave=True),
]


@pytest.fixture
def checkpoint_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    names = ["embed", *(f"m{i}" for i in range(8))]
    tensors = {name: rng.standard_normal((ROWS, COLS)).astype(np.float32) for name in names}
    save_file({**tensors, "norm": np.ones(COLS, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path / "model.safetensors"


def resident(file: Path) -> int:
    """Bytes of a mapped file in this process's memory."""
    maps = Path("/proc/self/smaps").read_text()
    found = re.findall(rf"{re.escape(str(file))}\n(?:.*\n){{1,5}}?Rss: +(\d+) kB", maps)
    assert found, "the file is not mapped"
    return 1024 * sum(map(int, found))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_one_entry_of_the_checkpoint_is_in_memory_at_a_time(checkpoint_file: Path, dtype: str) -> None:
    checkpoint = open_checkpoint(checkpoint_file.parent)
    sizes = {entry.name: entry.nbytes for entry in plan_entries(checkpoint, SPECS, dtype)}
    for entry in pack_entries(checkpoint, SPECS, dtype, threads=1):
        tensors = 2 if entry.name == "both" else 1
        assert resident(checkpoint_file) <= tensors * ROWS * COLS * 4 + SLACK, entry.name
        assert len(entry.data) == sizes.pop(entry.name)
    assert resident(checkpoint_file) <= SLACK
    assert sizes == {}


def test_what_was_forgotten_can_be_read_again(checkpoint_file: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_file.parent)
    array = checkpoint.read("m3")
    before = array.copy()
    checkpoint.forget()
    np.testing.assert_array_equal(array, before)
    np.testing.assert_array_equal(checkpoint.read("m3"), before)
