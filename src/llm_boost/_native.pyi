"""Kernels, threads, the plan executor, the packer, the sampler and the probes (csrc/)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Bytes = NDArray[np.uint8]
_Floats = NDArray[np.float32]
_Ints = NDArray[np.int32]

GROUP: int
INT4_CODEBOOK: list[int]

def available_isas() -> list[str]: ...
def cache_block_bytes(
    cache_format: str, layers: int, kv_heads: int, head_dim: int, block_size: int
) -> int: ...

class Plan:
    def __init__(
        self,
        threads: int,
        isa: str,
        max_tokens: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        cache_format: str,
        layers: int,
        num_blocks: int,
        block_size: int,
    ) -> None: ...
    def buffer(self, width: int) -> int: ...
    def embed(self, table: _Bytes, format: str, rows: int, width: int, out: int) -> None: ...
    def linear(
        self,
        input: int,
        norm: _Floats | None,
        eps: float,
        parts: Sequence[tuple[_Bytes, str, int, int, _Floats | None]],
        epilogue: str,
        out: int,
    ) -> None: ...
    def attention(
        self,
        qkv: int,
        layer: int,
        q_norm: _Floats | None,
        k_norm: _Floats | None,
        eps: float,
        head_dim: int,
        scale: float,
        out: int,
        k_centre: _Floats | None = None,
    ) -> None: ...
    def logits(
        self, input: int, norm: _Floats | None, eps: float, weight: _Bytes, format: str, rows: int, cols: int
    ) -> None: ...
    def run(
        self,
        token_ids: _Ints,
        seq_starts: _Ints,
        context_lens: _Ints,
        block_tables: _Ints,
        logit_rows: _Ints,
        cos: _Floats,
        sin: _Floats,
    ) -> _Floats: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...

def pack_matrix(
    parts: Sequence[NDArray[Any]], format: str, interleave: bool = False, threads: int = 1
) -> _Bytes: ...
def unpack_rows(packed: _Bytes, format: str, rows: int, cols: int) -> _Floats: ...
def packed_bytes(format: str, rows: int, cols: int) -> int: ...
def round_columns(
    format: str,
    weights: _Floats,
    carried: _Floats,
    factor: _Floats,
    row_scale: _Floats,
    values: _Bytes,
    codes: NDArray[np.int8],
    error: _Floats,
    threads: int = 1,
) -> None: ...
def probe_bandwidth(threads: int, megabytes: int) -> float: ...
def probe_dot_rate(kind: str, threads: int) -> float | None: ...

class SamplingRow:
    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        stream: int = 0,
        prompt_len: int = 0,
        min_tokens: int = 0,
        num_logprobs: int = -1,
        stop_ids: Sequence[int] = ...,
        logit_bias: Sequence[tuple[int, float]] = ...,
        typical_p: float = 1.0,
        allowed: Sequence[int] = ...,
        bad_words: Sequence[Sequence[int]] = ...,
    ) -> None: ...

_Logprobs = tuple[_Floats, _Ints, _Ints, _Floats]

class Sampler:
    def __init__(self, vocab_size: int, threads: int = 1) -> None: ...
    def sample(
        self,
        logits: _Floats,
        rows: list[SamplingRow],
        tokens: list[_Ints],
        masks: _Ints | None = None,
        masked: Sequence[int] = ...,
    ) -> tuple[_Ints, _Bytes, _Logprobs | None]: ...
    def score(self, logits: _Floats, tokens: _Ints, num_logprobs: int) -> tuple[_Bytes, _Logprobs]: ...

def philox(counter: Sequence[int], key: int) -> list[int]: ...
