"""What the benchmarks share: their options, their tables, and what they say of machine and versions."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from llm_boost.benchmark.limits import Limits

GIGA = 1e9


class Counts(click.ParamType[tuple[int, ...]]):
    """`128,512`: whole numbers from `low` to 2^20, each at most once."""

    name = "counts"

    def __init__(self, low: int) -> None:
        self._low = low

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "N,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        texts = value.split(",")
        if not all(
            text.isascii() and text.isdigit() and self._low <= int(text[:8]) <= 1 << 20 for text in texts
        ):
            self.fail(f"got {value!r}, allowed: numbers from {self._low} to {1 << 20}, as 16,128", param, ctx)
        return tuple(dict.fromkeys(int(text) for text in texts))


repetitions_option = click.option(
    "--repetitions",
    type=click.IntRange(1, 10000),
    default=5,
    show_default=True,
    metavar="N",
    help="Samples of each, after a warm-up.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Only the JSON object, which else is the last line."
)


def machine(limits: Limits, isas: Sequence[str]) -> dict[str, Any]:
    from llm_boost.engine.hardware import processor_name

    return {
        "processor": processor_name(),
        "isa": isas[0] if len(isas) == 1 else list(isas),
        "threads": limits.threads,
        "read_bandwidth": limits.bandwidth,
        "dot_rates": limits.dot_rates,
    }


def versions() -> dict[str, str]:
    import numpy as np

    from llm_boost import __version__

    return {"llm-boost": __version__, "python": platform.python_version(), "numpy": np.__version__}


def std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """A Markdown table, padded so that it can be read as it is; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            c.ljust(w) if i in left else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
