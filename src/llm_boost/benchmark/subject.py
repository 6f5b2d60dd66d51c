"""What is measured: a model at one dtype, loaded, and how long it took to start."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from llm_boost.benchmark.dummy import dummy_model
from llm_boost.checkpoint import open_checkpoint
from llm_boost.checkpoint.fields import read_json_object
from llm_boost.engine.batch import Batch
from llm_boost.engine.hardware import default_threads
from llm_boost.engine.native_runner import (
    DEFAULT_BLOCK_SIZE,
    NativeRunner,
    Progress,
    cache_block_bytes,
    choose_isa,
    resolve_kv_cache_dtype,
)
from llm_boost.errors import ConfigError
from llm_boost.models.config import ModelConfig, expected_tensors

MADE_DTYPE = "bfloat16"  # what auto means for weights that are made up


class Room(TypedDict):
    """The sizes of a runner that holds what is measured, and no more."""

    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_batched_tokens: int


@dataclass(frozen=True)
class Start:
    """Seconds from a path to the logits of one token, within a process that has imported everything.

    first: packing included, where this run packed. cold: packed weights on disk, none of them in memory;
    None where the system would not let go of them. warm: packed weights in memory.
    """

    first: float | None
    cold: float | None
    warm: float


@dataclass
class Subject:
    runner: NativeRunner
    start: Start | None  # None for made weights

    @property
    def dtype(self) -> str:
        return self.runner.dtype

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in expected_tensors(self.runner.config).values())

    @property
    def layer_operations(self) -> int:
        """Of one token in the layers: 2 for each element of their matrices."""
        shapes = expected_tensors(self.runner.config)
        return 2 * sum(math.prod(s) for name, s in shapes.items() if ".layers." in name and len(s) == 2)

    @property
    def head_operations(self) -> int:
        return 2 * self.runner.config.vocab_size * self.runner.config.hidden_size

    @property
    def layer_bytes(self) -> int:
        """What a step reads of weights, but for the head; of the embedding table it reads single rows."""
        return self.runner.weight_bytes - self.runner.embedding_bytes - self.head_bytes

    @property
    def head_bytes(self) -> int:
        return len(self.runner.packed.entries["head"][0])

    @property
    def token_bytes(self) -> int:
        """Keys and values of one position."""
        return self.runner.cache_bytes // (self.runner.num_blocks * self.runner.block_size)


def read_config(path: Path, *, dummy: bool) -> ModelConfig:
    """Of a model, or (with `dummy`) of a config.json alone; raises CheckpointError or ConfigError."""
    if dummy:
        if not path.is_dir():
            raise ConfigError(f"load_format: got dummy with {path}, allowed a directory with a config.json")
        source = path / "config.json"
        return ModelConfig.from_hf(read_json_object(source), str(source))
    checkpoint = open_checkpoint(path)
    source = path / "config.json" if path.is_dir() else path
    return ModelConfig.from_hf(checkpoint.config, str(source), checkpoint.tensors)


def load_subject(
    path: Path,
    config: ModelConfig,
    room: Room,
    *,
    dtype: str,
    kv_cache_dtype: str = "auto",
    dummy: bool,
    threads: int | None,
    cache_dir: Path,
    progress: Progress | None = None,
) -> Subject:
    """Loads the model of `config` from `path`, or makes it up.

    Raises:
        CheckpointError: the model cannot be read. ConfigError: it does not fit the memory.
    """
    if dummy:
        return Subject(_make(config, room, dtype, kv_cache_dtype, threads), None)

    def load() -> NativeRunner:
        runner = NativeRunner.load(
            open_checkpoint(path),
            config,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            threads=threads,
            cache_dir=cache_dir,
            progress=progress,
            **room,
        )
        runner.run(_one_token())
        return runner

    runner, first = _timed(load)
    packed, built = runner.packed.path, runner.packed.built
    del runner  # else its map holds the file in memory
    is_cold = forget(packed)
    runner, cold = _timed(load)
    del runner
    runner, warm = _timed(load)
    return Subject(runner, Start(first if built else None, cold if is_cold else None, warm))


def forget(path: Path) -> bool:
    """Asks the system to drop a file's pages from memory; whether it did (another process may map them)."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = path.stat().st_size
        return not any(_is_in_memory(file.fileno(), size * part // 8) for part in range(1, 8))


def _is_in_memory(file: int, offset: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        return os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    return False


def _timed(load: Callable[[], NativeRunner]) -> tuple[NativeRunner, float]:
    start = time.perf_counter()
    runner = load()
    return runner, time.perf_counter() - start


def _one_token() -> Batch:
    one, zero = np.ones(1, np.int32), np.zeros(1, np.int32)
    return Batch(zero, np.array([0, 1], np.int32), one, one, zero[None], zero)


def _make(
    config: ModelConfig, room: Room, dtype: str, kv_cache_dtype: str, threads: int | None
) -> NativeRunner:
    dtype = MADE_DTYPE if dtype == "auto" else dtype
    kv_cache_dtype = resolve_kv_cache_dtype(kv_cache_dtype, dtype)
    cache_bytes = room["num_blocks"] * cache_block_bytes(config, kv_cache_dtype, DEFAULT_BLOCK_SIZE)
    return NativeRunner(
        config,
        dummy_model(config, dtype, cache_bytes),
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        threads=threads or default_threads(),
        isa=choose_isa(),
        **room,
    )
