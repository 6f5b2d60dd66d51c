"""The words in which an architecture writes its plan: each adds one fused operation to the native list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NewType, Protocol

import numpy as np
from numpy.typing import NDArray

Buffer = NewType("Buffer", int)  # max_tokens rows of floats
Epilogue = Literal["store", "add", "silu_mul"]


@dataclass(frozen=True)
class PackedTensor:
    """A packed weight as it lies in memory."""

    data: NDArray[np.uint8]
    format: str  # float32 | bfloat16 | int8 | int4
    rows: int
    cols: int


class PackedWeights(Protocol):
    def __getitem__(self, name: str) -> PackedTensor: ...

    def __contains__(self, name: str) -> bool: ...


@dataclass(frozen=True)
class Normed:
    """RMSNorm of a buffer; computed inside the linear that reads it."""

    input: Buffer
    weight: str
    eps: float


class PlanWords(Protocol):
    """What an architecture's `build` may say; PlanBuilder tells what each word means."""

    def buffer(self, width: int) -> Buffer: ...

    def embed(self, table: str, out: Buffer) -> None: ...

    def rms_norm(self, x: Buffer, weight: str, eps: float) -> Normed: ...

    def linear(
        self, x: Buffer | Normed, *weights: str, out: Buffer, epilogue: Epilogue = "store"
    ) -> None: ...

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
        k_centre: NDArray[np.float32] | None = None,
    ) -> None: ...

    def logits(self, x: Normed, head: str) -> None: ...

    def vector(self, name: str) -> NDArray[np.float32] | None: ...


class PlanBuilder:
    """The words that write a plan."""

    def __init__(self, plan: Any, weights: PackedWeights) -> None:
        self._plan = plan
        self._weights = weights

    def buffer(self, width: int) -> Buffer:
        """[tokens, width] floats that operations write and read."""
        return Buffer(self._plan.buffer(width))

    def embed(self, table: str, out: Buffer) -> None:
        """out = table[token]."""
        w = self._weights[table]
        self._plan.embed(w.data, w.format, w.rows, w.cols, out)

    def rms_norm(self, x: Buffer, weight: str, eps: float) -> Normed:
        return Normed(x, weight, eps)

    def linear(self, x: Buffer | Normed, *weights: str, out: Buffer, epilogue: Epilogue = "store") -> None:
        """out (=, +=, or silu(gate) * up =) x @ weight.T + bias, where there is a `weight`.bias.

        Several weights stand side by side in the columns of `out`.
        """
        source, norm, eps = self._input(x)
        parts = [self._part(name) for name in weights]
        self._plan.linear(source, norm, eps, parts, epilogue, out)

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
        k_centre: NDArray[np.float32] | None = None,
    ) -> None:
        """Rotary embedding, the write of k and v into the paged cache, and attention, causal and grouped.

        k_centre [kv_heads, head_dim] is taken from every rotated key: it moves all scores of a query alike,
        so the softmax does not see it, and a cache of integers holds what is left more exactly.
        """
        scale = head_dim**-0.5
        centre = None if k_centre is None else np.ascontiguousarray(k_centre).ravel()
        self._plan.attention(
            qkv, layer, self.vector(q_norm), self.vector(k_norm), eps, head_dim, scale, out, centre
        )

    def logits(self, x: Normed, head: str) -> None:
        """The end of the plan: logits of the rows that a step asks for."""
        source, norm, eps = self._input(x)
        w = self._weights[head]
        self._plan.logits(source, norm, eps, w.data, w.format, w.rows, w.cols)

    def _input(self, x: Buffer | Normed) -> tuple[Buffer, NDArray[np.float32] | None, float]:
        if isinstance(x, Normed):
            return x.input, self.vector(x.weight), x.eps
        return x, None, 0.0

    def _part(self, name: str) -> tuple[Any, str, int, int, NDArray[np.float32] | None]:
        w, bias = self._weights[name], self.vector(f"{name}.bias")
        if bias is not None:
            bias = np.pad(bias, (0, -len(bias) % 16))
        return w.data, w.format, w.rows, w.cols, bias

    def vector(self, name: str) -> NDArray[np.float32] | None:
        """The packed vector of that name, where there is one."""
        if name not in self._weights:
            return None
        return self._weights[name].data.view(np.float32)
