"""The built-in engine's ModelRunner: a checkpoint, packed and mapped, behind the native plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm_boost import _native
from llm_boost.checkpoint.checkpoint import Checkpoint
from llm_boost.checkpoint.packed import PackedModel, PackedStore, PackKey
from llm_boost.checkpoint.packed_checkpoint import PackedCheckpoint
from llm_boost.engine.batch import Batch, FloatArray
from llm_boost.engine.hardware import available_memory, default_threads
from llm_boost.errors import ConfigError
from llm_boost.models import decoder
from llm_boost.models.config import ModelConfig, check_tensors
from llm_boost.models.packing import LAYOUT_VERSION, pack_entries, plan_entries
from llm_boost.models.plan_builder import PackedTensor, PlanBuilder
from llm_boost.models.rope import RopeTable

Progress = Callable[[int, int], None]  # bytes done, bytes in all

DTYPES = ("float32", "bfloat16", "int8", "int4")
KV_CACHE_DTYPES = ("float32", "int16", "int8")
ALIASES = {"fp32": "float32", "bf16": "bfloat16"}
DEFAULT_BLOCK_SIZE = 32
DEFAULT_MAX_MODEL_LEN = 32768  # of models that were made for more: their cache would rarely fit
MEMORY_SHARE_OF_CACHE = 0.5
MAX_THREADS = 1024


class NativeRunner:
    """See `ModelRunner`. Weights stay mapped from the packed cache; the KV cache is lazily touched memory."""

    def __init__(
        self,
        config: ModelConfig,
        packed: PackedModel,
        *,
        dtype: str,
        kv_cache_dtype: str = "auto",
        threads: int,
        isa: str,
        max_model_len: int,
        block_size: int,
        num_blocks: int,
        max_num_batched_tokens: int,
    ) -> None:
        self.dtype = dtype
        self.kv_cache_dtype = resolve_kv_cache_dtype(kv_cache_dtype, dtype)
        self.config = config
        self.packed = packed
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._plan = _native.Plan(
            threads=threads,
            isa=isa,
            max_tokens=max_num_batched_tokens,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            cache_format=self.kv_cache_dtype,
            layers=config.num_layers,
            num_blocks=num_blocks,
            block_size=block_size,
        )
        weights = _Entries(packed)
        decoder.build(PlanBuilder(self._plan, weights), config)
        self.weight_bytes = weights.nbytes
        self.embedding_bytes = len(weights["embed"].data)  # of which a step reads its tokens' rows only
        self._rope = RopeTable(config, max_model_len)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        *,
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        threads: int | None = None,
        cache_dir: str | Path | None = None,
        max_model_len: int | None = None,
        block_size: int | None = None,
        num_blocks: int | None = None,
        kv_cache_memory: int | None = None,
        max_num_batched_tokens: int = 512,
        max_num_seqs: int = 16,
        progress: Progress | None = None,
    ) -> NativeRunner:
        """Packs the checkpoint if the cache lacks it, maps it, and sizes the KV cache.

        Args:
            dtype: of the weights; auto keeps a float checkpoint as bfloat16 and a quantised one as int8.
            kv_cache_dtype: of cached keys and values; auto is float32 for float32 weights, else int16.
            num_blocks, kv_cache_memory: the KV cache in blocks or bytes; by default what max_num_seqs
                sequences of max_model_len need, at most half of the memory that the weights leave free.

        Raises:
            ConfigError: a setting out of range. CheckpointError: weights missing, damaged or not finite.
        """
        dtype = resolve_dtype(dtype, checkpoint)
        kv_cache_dtype = resolve_kv_cache_dtype(kv_cache_dtype, dtype)
        threads = _check("threads", default_threads() if threads is None else threads, 1, MAX_THREADS)
        max_model_len = _max_model_len(config, max_model_len)
        block_size = _check_block_size(DEFAULT_BLOCK_SIZE if block_size is None else block_size)
        block_bytes = cache_block_bytes(config, kv_cache_dtype, block_size)
        num_blocks = _asked_blocks(num_blocks, kv_cache_memory, block_size, block_bytes)
        isa = choose_isa()
        check_tensors(config, checkpoint)
        specs = list(decoder.weights(config))
        planned = plan_entries(checkpoint, specs, dtype)
        if num_blocks is None:
            spare = available_memory() - sum(entry.nbytes for entry in planned)
            wanted = -(-max_model_len // block_size) * max_num_seqs
            num_blocks = max(1, min(wanted, int(spare * MEMORY_SHARE_OF_CACHE) // block_bytes))
        key = PackKey(checkpoint.path, checkpoint.fingerprint(), dtype, LAYOUT_VERSION)

        def entries() -> Iterator[Any]:
            return pack_entries(checkpoint, specs, dtype, threads)

        if isinstance(checkpoint, PackedCheckpoint):
            packed = checkpoint.packed(planned, LAYOUT_VERSION)
        else:
            packed = PackedStore(cache_dir).open_or_build(key, entries, planned, progress)
        return cls(
            config,
            packed,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            threads=threads,
            isa=isa,
            max_model_len=max_model_len,
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_batched_tokens=max_num_batched_tokens,
        )

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def threads(self) -> int:
        return int(self._plan.threads)

    @property
    def isa(self) -> str:
        return str(self._plan.isa)

    @property
    def cache_bytes(self) -> int:
        return int(self._plan.cache_bytes)

    def position_salt(self, num_prompt_tokens: int) -> int:
        return self._rope.salt(num_prompt_tokens)

    def run(self, batch: Batch) -> FloatArray:
        counts = np.diff(batch.seq_starts)
        first = batch.context_lens - counts - batch.seq_starts[:-1]
        positions = np.arange(len(batch.token_ids), dtype=np.int32) + np.repeat(first, counts)
        cos, sin = self._rope.rows(positions, np.repeat(batch.prompt_lens, counts))
        logits: FloatArray = self._plan.run(
            batch.token_ids,
            batch.seq_starts,
            batch.context_lens,
            batch.block_tables,
            batch.logit_rows,
            cos,
            sin,
        )
        return logits


class _Entries:
    """A packed model's entries as the plan wants them."""

    def __init__(self, packed: PackedModel) -> None:
        self._entries = packed.entries
        self.nbytes = sum(len(data) for data, _ in packed.entries.values())

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> PackedTensor:
        data, meta = self._entries[name]
        return PackedTensor(data, meta["format"], meta["rows"], meta["cols"])


def resolve_dtype(dtype: str, checkpoint: Checkpoint) -> str:
    """One of DTYPES; raises ConfigError. auto: bfloat16, int8 for a quantised one; packed is what it is."""
    if isinstance(checkpoint, PackedCheckpoint):
        if ALIASES.get(dtype, dtype) not in ("auto", checkpoint.dtype):
            raise ConfigError(f"dtype: got {dtype!r}, but the weights are packed as {checkpoint.dtype}")
        return checkpoint.dtype
    if dtype == "auto":
        floats = {"float32", "float16", "bfloat16"}
        quantised = any(
            info.dtype not in floats and len(info.shape) == 2 for info in checkpoint.tensors.values()
        )
        return "int8" if quantised else "bfloat16"
    name = ALIASES.get(dtype, dtype)
    if name not in DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, allowed auto, {', '.join((*DTYPES, *ALIASES))}")
    return name


def choose_isa() -> str:
    """The best instruction set of this processor, or the one that LLM_BOOST_ISA names; raises ConfigError."""
    available = _native.available_isas()
    wanted = os.environ.get("LLM_BOOST_ISA") or available[0]
    if wanted not in available:
        raise ConfigError(f"LLM_BOOST_ISA: got {wanted!r}, allowed here: {', '.join(available)}")
    return wanted


def resolve_kv_cache_dtype(kv_cache_dtype: str, dtype: str) -> str:
    """One of KV_CACHE_DTYPES for weights of `dtype`; raises ConfigError."""
    if kv_cache_dtype == "auto":
        return "float32" if dtype == "float32" else "int16"
    name = ALIASES.get(kv_cache_dtype, kv_cache_dtype)
    if name not in KV_CACHE_DTYPES:
        allowed = ", ".join(KV_CACHE_DTYPES)
        raise ConfigError(
            f"kv_cache_dtype: got {kv_cache_dtype!r}, allowed auto, {allowed} "
            "(int16 is as exact as float16 and takes the place of 16-bit floats)"
        )
    return name


def cache_block_bytes(config: ModelConfig, kv_cache_dtype: str, block_size: int) -> int:
    """Keys and values of `block_size` positions in all layers."""
    return int(
        _native.cache_block_bytes(
            kv_cache_dtype, config.num_layers, config.num_kv_heads, config.head_dim, block_size
        )
    )


def _check(name: str, value: int, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name}: got {value!r}, allowed {low} to {high}")
    return value


def _check_block_size(value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value % 16 or not 16 <= value <= 4096:
        raise ConfigError(f"block_size: got {value!r}, allowed multiples of 16 from 16 to 4096")
    return value


def _max_model_len(config: ModelConfig, wanted: int | None) -> int:
    if wanted is None:
        return min(config.max_model_len, DEFAULT_MAX_MODEL_LEN)
    if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= config.max_model_len:
        raise ConfigError(
            f"max_model_len: got {wanted!r}, allowed 1 to {config.max_model_len}, "
            "the length that the model was made for"
        )
    return wanted


def _asked_blocks(blocks: int | None, memory: int | None, block_size: int, block_bytes: int) -> int | None:
    """The KV cache that was asked for, in blocks. Memory that is not there must not be promised: the system
    would end the process as it fills it."""
    if blocks is not None and memory is not None:
        raise ConfigError(f"kv_cache_memory: got {memory}, and num_blocks {blocks}: give one of them")
    free = available_memory()
    if memory is not None:
        _check("kv_cache_memory", memory, 1, 1 << 60)
        if memory < block_bytes:
            raise ConfigError(
                f"kv_cache_memory: got {memory} bytes, allowed at least {block_bytes}, "
                f"a block of {block_size} tokens"
            )
        if memory > max(free, block_bytes):
            raise ConfigError(
                f"kv_cache_memory: got {memory / 1e9:.1f} GB, allowed at most {free / 1e9:.1f} GB, "
                "the memory that is free"
            )
        return memory // block_bytes
    if blocks is not None and _check("num_blocks", blocks, 1, 1 << 31) * block_bytes > max(free, block_bytes):
        raise ConfigError(
            f"num_blocks: got {blocks}, which take {blocks * block_bytes / 1e9:.1f} GB, allowed at most "
            f"{free // block_bytes}: {free / 1e9:.1f} GB of memory are free"
        )
    return blocks
