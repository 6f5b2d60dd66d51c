"""The words of plans, spoken by a model that is being quantised: a linear is rounded before it computes.

An architecture's `build` runs once, over all calibration tokens. Every linear meets the inputs that the
rounded weights before it produce, takes its Hessian from them, and goes on as what it has become. One matrix
of the checkpoint is in memory at a time, beside the activations of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import Checkpoint
from llm_boost.errors import CheckpointError
from llm_boost.models.config import ModelConfig
from llm_boost.models.packing import BLOCK_ROWS, matrix_format, read_vector
from llm_boost.models.plan_builder import Buffer, Epilogue, Normed
from llm_boost.models.rope import RopeTable
from llm_boost.models.weights import Matrix, Table, Vector, WeightSpec
from llm_boost.quantize.arithmetic import attention, rms_norm, rotary, silu_mul
from llm_boost.quantize.gptq import GROUP, Rounder, pack, pad_columns, rotate, rotate_hessian

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

CHUNK_TOKENS = 2048  # computed at a time
CHUNK_ROWS = 4096  # of a matrix, rounded at a time


class Resume(NamedTuple):
    """Where an interrupted run goes on: after so many operations, with this residual stream."""

    operations: int
    residual: Floats  # [tokens, hidden]


class Events(NamedTuple):
    """What the calibrator tells of its work."""

    packed: Callable[[str, Bytes], None]  # a matrix's name and packed bytes
    layer: Callable[[Resume], None]  # at the start of each layer
    progress: Callable[[int], None]  # weights rounded since the last call


class Calibrator:
    """Runs tokens [sequences, length] through a model, rounding its linears to `dtype` on the way.

    Only the residual stream lives from layer to layer; so says every architecture's `build` that can resume.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        specs: Mapping[str, WeightSpec],
        tokens: NDArray[np.int32],
        dtype: str,
        events: Events,
        *,
        damping: float,
        threads: int,
        resume: Resume | None = None,
    ) -> None:
        self._checkpoint, self._config, self._specs = checkpoint, config, specs
        self._tokens, self._dtype, self._events = tokens, dtype, events
        self._damping, self._threads, self._resume = damping, threads, resume
        self._operations, self._layer = 0, ""
        self._buffers: list[Floats] = []
        length = tokens.shape[1]
        self._cos, self._sin = RopeTable(config, length).rows(
            np.arange(length, dtype=np.int32), np.full(length, length, np.int32)
        )

    def buffer(self, width: int) -> Buffer:
        """[tokens, width]."""
        self._buffers.append(np.empty((self._tokens.size, width), np.float32))
        return Buffer(len(self._buffers) - 1)

    def embed(self, table: str, out: Buffer) -> None:
        """out = table[token]."""
        if self._done_before():
            return
        spec = self._specs[table]
        assert isinstance(spec, Table)
        self._buffers[out][:] = self._checkpoint.read(spec.part)[self._tokens.reshape(-1)]
        self._checkpoint.forget()

    def rms_norm(self, x: Buffer, weight: str, eps: float) -> Normed:
        return Normed(x, weight, eps)

    def linear(self, x: Buffer | Normed, *weights: str, out: Buffer, epilogue: Epilogue = "store") -> None:
        """Rounds `weights` for their inputs x, then computes as PlanBuilder's linear says."""
        self._enter_layer(x, weights[0])
        if self._done_before():
            return
        rounder = Rounder(self._hessian(x), self._damping, self._threads)
        column = 0
        for name in weights:
            matrix = self._round(name, rounder)
            bias = self.vector(f"{name}.bias")
            for rows, inputs in self._inputs(x):
                product = inputs @ matrix.T
                if bias is not None:
                    product += np.pad(bias, (0, product.shape[1] - len(bias)))
                target = self._buffers[out][rows]
                if epilogue == "add":
                    target += product
                elif epilogue == "silu_mul":
                    target[:] = silu_mul(product)[:, : target.shape[1]]
                else:
                    target[:, column : column + len(matrix)] = product
            column += len(matrix)

    def attention(
        self,
        qkv: Buffer,
        layer: int,
        out: Buffer,
        *,
        head_dim: int,
        eps: float,
        q_norm: str,
        k_norm: str,
        k_centre: Floats | None = None,
    ) -> None:
        """Rotary embedding, then attention within each sequence; k_centre changes no softmax in float32."""
        if self._done_before():
            return
        heads, kv_heads, length = self._config.num_heads, self._config.num_kv_heads, self._tokens.shape[1]
        norms = self.vector(q_norm), self.vector(k_norm)
        for rows in (slice(i, i + length) for i in range(0, self._tokens.size, length)):
            by_head = self._buffers[qkv][rows].reshape(length, -1, head_dim).swapaxes(0, 1)
            q, k, v = np.split(by_head, [heads, heads + kv_heads])
            q, k = (
                rotary(x if norm is None else rms_norm(x, norm, eps), self._cos, self._sin)
                for x, norm in zip((q, k), norms, strict=True)
            )
            self._buffers[out][rows] = attention(q, k, v, head_dim**-0.5)

    def logits(self, x: Normed, head: str) -> None:
        """The end: the head is rounded, and nothing more computed."""
        self._enter_layer(x, head)
        if not self._done_before():
            self._round(head, Rounder(self._hessian(x), self._damping, self._threads), keep=False)

    def _done_before(self) -> bool:
        """Counts an operation; whether an earlier run has done it."""
        self._operations += 1
        return self._resume is not None and self._operations <= self._resume.operations

    def _enter_layer(self, x: Buffer | Normed, weight: str) -> None:
        """At the beginning of a layer, which its weights' names tell, its input can be saved or restored."""
        layer = weight.rpartition(".")[0]
        if layer == self._layer or not isinstance(x, Normed):
            return
        self._layer = layer
        if self._resume is None or self._operations > self._resume.operations:
            self._events.layer(Resume(self._operations, self._buffers[x.input]))
        elif self._operations == self._resume.operations:
            self._buffers[x.input][:] = self._resume.residual

    def _inputs(self, x: Buffer | Normed) -> Iterator[tuple[slice, Floats]]:
        """Inputs of a linear, some tokens at a time."""
        source = self._buffers[x.input if isinstance(x, Normed) else x]
        norm = self.vector(x.weight) if isinstance(x, Normed) else None
        for rows in (slice(i, i + CHUNK_TOKENS) for i in range(0, len(source), CHUNK_TOKENS)):
            if norm is None or not isinstance(x, Normed):
                yield rows, source[rows]
            else:
                yield rows, rms_norm(source[rows], norm, x.eps)

    def _hessian(self, x: Buffer | Normed) -> Floats:
        """Mean outer product of the rotated inputs, [columns, columns] padded to whole groups."""
        hessian: Floats | None = None
        for _, inputs in self._inputs(x):
            padded = pad_columns(inputs)
            outer = padded.T @ padded
            hessian = outer if hessian is None else np.add(hessian, outer, out=hessian)
        assert hessian is not None
        hessian /= self._tokens.size
        return rotate_hessian(hessian)

    def _round(self, name: str, rounder: Rounder, keep: bool = True) -> Floats:
        """Rounds a matrix and reports its bytes; if `keep`, what it has become, float32 [rows, cols]."""
        spec = self._specs[name]
        assert isinstance(spec, Matrix)
        fmt = matrix_format(spec, self._dtype)
        parts, became = [], []
        for weights in read_stacked(self._checkpoint, spec, CHUNK_ROWS):
            rounded = rounder.round(rotate(pad_columns(weights)) / np.float32(GROUP), fmt)
            parts.append(pack(rounded, fmt))
            if keep:
                became.append(rotate(rounded.weights)[: len(weights), : weights.shape[1]])
            self._events.progress(weights.size)
            self._checkpoint.forget()
        self._events.packed(name, np.concatenate(parts))
        return np.concatenate(became) if keep else np.empty((0, 0), np.float32)

    def vector(self, name: str) -> Floats | None:
        """The vector of that name, where there is one."""
        spec = self._specs.get(name)
        return read_vector(self._checkpoint, spec) if isinstance(spec, Vector) else None


def read_stacked(checkpoint: Checkpoint, spec: Matrix, chunk_rows: int) -> Iterator[Floats]:
    """The rows of a matrix's parts in the order of packing, float32 [at most chunk_rows, cols].

    `chunk_rows` is a multiple of the rows of a block from each part.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    sizes = [checkpoint.tensors[part].shape[0] for part in spec.parts]
    if spec.interleave:
        step = chunk_rows // len(spec.parts)
        for start in range(0, sizes[0], step):
            parts = [_read(checkpoint, p, start, min(start + step, sizes[0])) for p in spec.parts]
            blocks = [np.pad(x, ((0, -len(x) % BLOCK_ROWS), (0, 0))) for x in parts]
            stack = np.stack([x.reshape(-1, BLOCK_ROWS, x.shape[1]) for x in blocks], axis=1)
            yield stack.reshape(-1, stack.shape[-1])
        return
    starts = np.cumsum([0, *sizes])
    for start in range(0, int(starts[-1]), chunk_rows):
        stop = min(start + chunk_rows, int(starts[-1]))
        yield np.concatenate(
            [
                _read(checkpoint, part, max(start - first, 0), min(stop - first, size))
                for part, first, size in zip(spec.parts, starts.tolist(), sizes, strict=False)
                if first < stop and start < first + size
            ]
        )


def _read(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Floats:
    rows = checkpoint.read_rows(name, start, stop).astype(np.float32)
    if not np.isfinite(rows).all():
        raise CheckpointError(f"{checkpoint.path}: {name}: holds values that are not finite numbers")
    return rows
