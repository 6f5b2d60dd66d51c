"""What the machine can do at most, measured, and how near to it a rate comes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property

from llm_boost import _native
from llm_boost.engine.hardware import available_memory

DOT_KINDS = {"float32": ("fp32",), "bfloat16": ("bf16", "fp32")}  # without bf16 dots float32's are used
PROBE_MEGABYTES = 1024  # larger than any last-level cache


@dataclass(frozen=True)
class Limits:
    """Of `threads` threads; each is measured when first asked for."""

    threads: int

    @cached_property
    def bandwidth(self) -> float:
        """Bytes read from memory a second."""
        megabytes = min(PROBE_MEGABYTES, available_memory() // 4 >> 20)
        return _native.probe_bandwidth(self.threads, max(1, megabytes))

    @cached_property
    def dot_rates(self) -> dict[str, float]:
        """Operations (two for a multiplication and its addition) a second, of the kinds that there are."""
        rates = {kind: _native.probe_dot_rate(kind, self.threads) for kind in ("int8", "bf16", "fp32")}
        return {kind: rate for kind, rate in rates.items() if rate is not None}

    def dot_rate(self, dtype: str) -> float:
        """Of the products that a model, matrix or cache of `dtype` is computed with."""
        if dtype == "int16":  # half as many fit a register
            return self.dot_rate("int8") / 2
        return next(self.dot_rates[k] for k in DOT_KINDS.get(dtype, ("int8", "fp32")) if k in self.dot_rates)


def forget_peak_memory() -> None:
    """The peak starts again at what is in memory now (Linux; where it is forbidden the old peak stays)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_memory() -> int:
    """The most bytes that this process has held in memory, mapped weights included (Linux' VmHWM)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
