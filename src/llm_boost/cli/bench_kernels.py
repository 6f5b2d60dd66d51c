"""`llm-boost bench kernels`: each kernel beside its limit, for every instruction set."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from llm_boost.cli.bench_report import (
    GIGA,
    Counts,
    json_option,
    machine,
    percent,
    repetitions_option,
    table,
    versions,
)
from llm_boost.cli.options import F
from llm_boost.cli.progress import ProgressBar
from llm_boost.errors import ConfigError

if TYPE_CHECKING:
    from llm_boost.benchmark.kernels import Measured
    from llm_boost.benchmark.limits import Limits

_EXAMPLES = """\b
Examples:
  llm-boost bench kernels
  llm-boost bench kernels --isa all --rows 4864 --cols 896 --tokens 1,512
  llm-boost bench kernels --heads 14 --kv_heads 2 --head_dim 64 --context 4096
"""


def _size(name: str, default: int, what: str) -> Callable[[F], F]:
    return click.option(
        name, type=click.IntRange(1, 1 << 20), default=default, show_default=True, metavar="N", help=what
    )


@click.command("kernels", epilog=_EXAMPLES)
@click.option(
    "--isa", metavar="NAME,...|all", help="Instruction sets (default: the one that the engine uses)."
)
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="(default: the processor's cores)")
@_size("--rows", 8192, "Of the linear's weight: values out.")
@_size("--cols", 4096, "Of the linear's weight: values in.")
@click.option("--tokens", type=Counts(1), default="1,16,512", show_default=True, help="Of the linear.")
@_size("--heads", 32, "Of attention.")
@_size("--kv_heads", 8, "Of attention; they divide its heads.")
@_size("--head_dim", 128, "Of attention: a multiple of 16.")
@click.option(
    "--context", type=Counts(1), default="512,2048", show_default=True, help="Tokens under attention."
)
@repetitions_option
@json_option
def kernels_command(
    isa: str | None,
    threads: int | None,
    rows: int,
    cols: int,
    tokens: tuple[int, ...],
    heads: int,
    kv_heads: int,
    head_dim: int,
    context: tuple[int, ...],
    repetitions: int,
    as_json: bool,
) -> None:
    """The linear of every format, attention and the conversion of activations, as the plan runs them.

    `roofline` is the time that the machine's limits alone would take, over the time that it took.
    """
    if heads % kv_heads or head_dim % 16:
        raise ConfigError(
            f"--heads {heads}, --kv_heads {kv_heads}, --head_dim {head_dim}: "
            "allowed: kv_heads divides heads, 16 divides head_dim"
        )
    from llm_boost.benchmark.kernels import Shape, measure_kernels
    from llm_boost.benchmark.limits import Limits
    from llm_boost.engine.hardware import default_threads

    isas, limits = _isas(isa), Limits(threads or default_threads())
    shape = Shape(rows, cols, heads, kv_heads, head_dim)
    done = []
    with ProgressBar("measuring", unit="kernels") as progress:
        for measured in measure_kernels(isas, shape, tokens, context, limits.threads, repetitions):
            done.append(measured)
            progress(len(done), len(isas) * (5 * len(tokens) + 3 + 4 * len(context)))
    if not as_json:
        click.echo(_table(done, limits) + "\n")
    report = {
        "machine": machine(limits, isas),
        "versions": versions(),
        "rows": rows,
        "cols": cols,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "kernels": [_report(measured, limits) for measured in done],
    }
    click.echo(json.dumps(report))


def _isas(wanted: str | None) -> list[str]:
    from llm_boost import _native
    from llm_boost.engine.native_runner import choose_isa

    available = _native.available_isas()
    if wanted is None:
        return [choose_isa()]
    names = available if wanted == "all" else list(dict.fromkeys(wanted.split(",")))
    for name in names:
        if name not in available:
            raise ConfigError(f"--isa: got {name!r}, allowed here: all, {', '.join(available)}")
    return names


def _report(measured: Measured, limits: Limits) -> dict[str, Any]:
    return {
        "kernel": measured.kernel,
        "isa": measured.isa,
        "format": measured.format,
        "size": measured.size,
        "tokens": measured.tokens,
        "seconds": measured.seconds,
        "bytes_per_second": measured.bytes_per_second,
        "operations_per_second": measured.operations_per_second,
        "roofline": measured.roofline(limits),
    }


def _table(measured: Sequence[Measured], limits: Limits) -> str:
    rows = [
        [
            m.kernel,
            m.format,
            m.isa,
            m.size,
            str(m.tokens),
            f"{1e3 * statistics.median(m.seconds):.3f} ± {1e3 * statistics.pstdev(m.seconds):.3f}",
            f"{m.bytes_per_second / GIGA:.1f}",
            f"{m.operations_per_second / GIGA:.0f}" if m.num_operations else "",
            percent(m.roofline(limits)),
        ]
        for m in measured
    ]
    header = ["kernel", "format", "isa", "size", "tokens", "ms", "GB/s", "GOP/s", "roofline"]
    return table(header, rows, left=(0, 1, 2, 3))
