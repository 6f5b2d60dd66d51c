"""Rotary position embedding: the frequencies of every scaling type, and the cos and sin of a step's tokens.

Formulas: RoFormer (arXiv:2104.09864), linear and dynamic NTK scaling, Llama 3.1's, YaRN (arXiv:2309.00071).
Computed in float32, step for step as transformers does: at position 30000 the last bit of a frequency shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.fields import Fields

if TYPE_CHECKING:
    from llm_boost.models.config import ModelConfig

FloatArray = NDArray[np.float32]
Int32Array = NDArray[np.int32]

DEFAULT_THETA = 10000.0
MAX_POSITIONS = 1 << 24
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "freq_factors")


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles. Fields beyond `theta` count for the types named beside them only."""

    rope_type: str = "default"
    theta: float = DEFAULT_THETA
    factor: float = 1.0  # linear, dynamic, llama3, yarn
    original_max_position_embeddings: int = 0  # dynamic, llama3, yarn: the length before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    freq_factors: tuple[
        float, ...
    ] = ()  # freq_factors: each frequency's divisor, as GGUF's rope_freqs.weight has it

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str, max_position_embeddings: int) -> RopeConfig:
        """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

        Raises:
            CheckpointError: a type that is not supported, or a value out of its range.
        """
        key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        values = config.get(key) or {}
        if not isinstance(values, Mapping):
            raise Fields(config, source).error(key, "an object or null")
        fields = Fields(values, f"{source}: {key}")
        rope_type = fields.text("rope_type", fields.text("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise fields.error(
                "rope_type" if fields.has("rope_type") else "type", f"one of {', '.join(ROPE_TYPES)}"
            )
        if (
            fields.number("partial_rotary_factor", 0, 1, 1.0) != 1.0
            or config.get("partial_rotary_factor", 1) != 1
        ):
            raise Fields({**config, **values}, source).error("partial_rotary_factor", "1")
        theta = Fields(config, source).number("rope_theta", 1, 1e15, DEFAULT_THETA)
        theta = fields.number("rope_theta", 1, 1e15, theta)
        if rope_type == "default":
            return cls(theta=theta)
        if rope_type == "freq_factors":
            return cls(rope_type, theta, freq_factors=_freq_factors(fields))
        factor = fields.number("factor", 1, 1e6)
        # The dynamic type scales from max_position_embeddings, whatever its own fields say.
        original = max_position_embeddings
        if rope_type in ("llama3", "yarn"):
            original = fields.integer("original_max_position_embeddings", 1, MAX_POSITIONS, original)
        low = fields.number("low_freq_factor", 1e-6, 1e6, 1.0)
        high = fields.number("high_freq_factor", 1e-6, 1e6, 4.0)
        if high <= low:
            raise fields.error("high_freq_factor", f"above low_freq_factor, which is {low:g}")
        return cls(
            rope_type=rope_type,
            theta=theta,
            factor=factor,
            original_max_position_embeddings=original,
            low_freq_factor=low,
            high_freq_factor=high,
            beta_fast=fields.number("beta_fast", 1e-6, 1e6, 32.0),
            beta_slow=fields.number("beta_slow", 1e-6, 1e6, 1.0),
            truncate=fields.flag("truncate", True),
            attention_factor=_attention_factor(fields, factor) if rope_type == "yarn" else 1.0,
        )

    @property
    def length_factor(self) -> float:
        """How many times its original length the model may read."""
        return self.factor if self.rope_type in ("linear", "dynamic", "yarn") else 1.0


def _freq_factors(fields: Fields) -> tuple[float, ...]:
    factors = fields.get("factors")
    if not isinstance(factors, list) or not all(isinstance(f, float) and 0 < f < math.inf for f in factors):
        raise fields.error("factors", "a list of numbers above 0")
    return tuple(factors)


def _attention_factor(fields: Fields, factor: float) -> float:
    """YaRN's attention temperature, equation 22 of the paper, or as the config says."""
    if fields.has("attention_factor"):
        return fields.number("attention_factor", 1e-6, 1e6)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    all_dim = fields.number("mscale_all_dim", 0, 1e6, 0.0)
    weight = fields.number("mscale", 0, 1e6, 0.0)
    return mscale(weight) / mscale(all_dim) if weight and all_dim else mscale(1.0)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> FloatArray:
    """Angle per position of each pair of elements, [head_dim / 2] ("dynamic": up to the original length)."""
    plain: FloatArray = np.float32(1) / _powers(np.float32(rope.theta), head_dim)
    if rope.rope_type == "linear":
        plain /= np.float32(rope.factor)
    if rope.rope_type == "llama3":
        return _llama3(plain, rope)
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim)
    if rope.rope_type == "freq_factors":
        plain /= np.array(rope.freq_factors, dtype=np.float32)
    return plain


def _powers(theta: np.float32 | FloatArray, head_dim: int) -> FloatArray:
    """theta ** (2i / head_dim): [..., head_dim / 2] for thetas [..., 1].

    Taken in float64 and rounded: a float32 power differs in its last bit from processor to processor.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.asarray(np.power(theta, exponents, dtype=np.float64), dtype=np.float32)


def _llama3(plain: FloatArray, rope: RopeConfig) -> FloatArray:
    """Long waves are divided by the factor, short ones kept, those between blended."""
    length, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    factor = np.float32(rope.factor)
    wavelength = np.float32(1) / plain * np.float32(2 * math.pi)
    scaled = np.where(wavelength > np.float32(length / low), plain / factor, plain)
    smooth = (np.float32(1) / wavelength * np.float32(length) - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1) - smooth) * scaled / factor + smooth * scaled
    between = (wavelength >= np.float32(length / high)) & (wavelength <= np.float32(length / low))
    return np.where(between, blended, scaled).astype(np.float32)


def _yarn(rope: RopeConfig, head_dim: int) -> FloatArray:
    """Interpolates slow dimensions, keeps fast ones, with a linear ramp between (YaRN, section 3.2)."""

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times within the original length."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0  # a ramp of no length would divide by zero
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = np.float32(1) - np.clip(ramp, 0, 1)
    powers = _powers(np.float32(rope.theta), head_dim)
    interpolated = np.float32(1) / (np.float32(rope.factor) * powers)
    blended: FloatArray = interpolated * (np.float32(1) - keep) + np.float32(1) / powers * keep
    return blended


class RopeTable:
    """cos and sin rows for the tokens of a step; the table grows with the positions it is asked for."""

    def __init__(self, config: ModelConfig, max_model_len: int) -> None:
        self._rope, self._head_dim, self._max = config.rope, config.head_dim, max_model_len
        self._inv_freq = inverse_frequencies(config.rope, config.head_dim)
        self._cos = self._sin = np.empty((0, config.head_dim // 2), dtype=np.float32)

    def mean_rotation(self, vectors: FloatArray, positions: int) -> FloatArray:
        """The mean of `vectors` [n, head_dim], rotated to each of the first `positions`."""
        every = np.arange(positions, dtype=np.int32)
        cos, sin = (table.mean(0) for table in self.rows(every, np.zeros_like(every)))
        a, b = np.split(vectors, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(np.float32)

    def rows(self, positions: Int32Array, prompt_len: Int32Array) -> tuple[FloatArray, FloatArray]:
        """cos and sin, each [T, head_dim / 2] float32, of `positions` [T] in sequences of `prompt_len` [T].

        The prompt's length counts for "dynamic" scaling alone: all rows of a prompt longer than the original
        length use the base of that length, and a token decoded at position p beyond it the base of p + 1.
        """
        if len(positions) == 0:
            return self._cos[:0], self._sin[:0]
        last = int(positions.max())
        if last >= len(self._cos):
            self._grow(last + 1)
        cos, sin = self._cos[positions], self._sin[positions]
        if self._rope.rope_type == "dynamic":
            self._stretch(positions, prompt_len, cos, sin)
        return cos, sin

    def salt(self, prompt_len: int) -> int:
        """Prompt lengths of equal salt turn the same positions by the same angles."""
        dynamic = self._rope.rope_type == "dynamic"
        return max(prompt_len, self._rope.original_max_position_embeddings) if dynamic else 0

    def _grow(self, needed: int) -> None:
        if needed > self._max:
            raise ValueError(f"position {needed - 1} with max_model_len {self._max}")
        length = min(self._max, max(1024, 2 * needed))
        self._cos, self._sin = self._angles(np.arange(length, dtype=np.float32), self._inv_freq)

    def _angles(self, positions: FloatArray, inv_freq: FloatArray) -> tuple[FloatArray, FloatArray]:
        angles = positions[:, None] * inv_freq
        scale = np.float32(self._rope.attention_factor)
        return np.cos(angles) * scale, np.sin(angles) * scale

    def _stretch(
        self, positions: Int32Array, prompt_len: Int32Array, cos: FloatArray, sin: FloatArray
    ) -> None:
        """Rewrites the rows of sequences longer than the original length (dynamic NTK)."""
        rope, dim = self._rope, self._head_dim
        lengths = np.maximum(prompt_len, positions + 1)
        long = np.flatnonzero(lengths > rope.original_max_position_embeddings)
        if len(long) == 0:
            return
        distinct, which = np.unique(lengths[long], return_inverse=True)
        stretch = np.float32(rope.factor) * distinct.astype(np.float32)
        stretch = stretch / np.float32(rope.original_max_position_embeddings) - np.float32(rope.factor - 1)
        power = np.power(stretch, dim / (dim - 2), dtype=np.float64).astype(np.float32)
        theta = np.float32(rope.theta) * power
        inv_freq = (np.float32(1) / _powers(theta[:, None], dim))[which.reshape(-1)]
        cos[long], sin[long] = self._angles(positions[long].astype(np.float32), inv_freq)


def check_rope(rope: RopeConfig, head_dim: int, source: str) -> None:
    """Raises CheckpointError where `rope` does not fit heads of `head_dim`."""
    fields = Fields({"head_dim": head_dim, "factors": rope.freq_factors}, source)
    if head_dim % 2 or head_dim < 4:
        raise fields.error("head_dim", "even and at least 4, for rotary embedding")
    if rope.rope_type == "freq_factors" and len(rope.freq_factors) != head_dim // 2:
        raise fields.error(
            "factors", f"{head_dim // 2} numbers, half of head_dim; there are {len(rope.freq_factors)}"
        )
