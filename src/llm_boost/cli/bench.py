"""`llm-boost bench`: what a model and the kernels reach of what the machine can do."""

from __future__ import annotations

import json
import platform
import statistics
from typing import TYPE_CHECKING, Any

import click

from llm_boost.cli.options import model_options
from llm_boost.cli.progress import ProgressBar
from llm_boost.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_boost.benchmark.kernels import Product
    from llm_boost.benchmark.latency import Result, Subject
    from llm_boost.benchmark.limits import Limits

GIGA = 1e9
_EXAMPLES = """\b
Examples:
  llm-boost bench latency --model DIR --dtype int8,int4
  llm-boost bench kernels --isa all
"""
_LATENCY_EXAMPLES = """\b
Examples:
  llm-boost bench latency --model smollm2-135m-instruct
  llm-boost bench latency --model DIR --dtype int8,int4 --pp 512,2048 --depth 0,4096 --json
  llm-boost bench latency --model benchmarks/shapes/qwen2-7b --load_format dummy --dtype int4
"""
_KERNEL_EXAMPLES = """\b
Examples:
  llm-boost bench kernels
  llm-boost bench kernels --isa all --rows 4864 --cols 896 --tokens 1,512
"""


class _Counts(click.ParamType[tuple[int, ...]]):
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


_REPETITIONS = click.option(
    "--repetitions",
    type=click.IntRange(1, 10000),
    default=5,
    show_default=True,
    metavar="N",
    help="Samples of each, after a warm-up.",
)
_JSON = click.option(
    "--json", "as_json", is_flag=True, help="Only the JSON object, which else is the last line."
)


@click.group("bench", epilog=_EXAMPLES, invoke_without_command=True)
@click.pass_context
def bench_command(context: click.Context) -> None:
    """Measure speed beside what this machine could do at most."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@bench_command.command("latency", epilog=_LATENCY_EXAMPLES)
@model_options
@click.option(
    "--load_format",
    type=click.Choice(["auto", "dummy"]),
    default="auto",
    show_default=True,
    help="dummy makes up the weights: config.json is enough.",
)
@click.option(
    "--pp", type=_Counts(1), default="128,512", show_default=True, help="Prompts to prefill, in tokens."
)
@click.option("--tg", type=_Counts(1), default="64", show_default=True, help="Steps of decode.")
@click.option(
    "--depth", type=_Counts(0), default="0,1024", show_default=True, help="Tokens in the cache before."
)
@click.option("--batch", type=_Counts(1), default="1,4,16", show_default=True, help="Sequences that decode.")
@_REPETITIONS
@_JSON
def latency_command(
    dtype: str | None,
    load_format: str,
    pp: tuple[int, ...],
    tg: tuple[int, ...],
    depth: tuple[int, ...],
    batch: tuple[int, ...],
    repetitions: int,
    as_json: bool,
    **flags: Any,
) -> None:
    """Prefill and decode of the engine's step, in llama-bench's rows; `--dtype int8,int4` takes turns.

    pp512 prefills 512 tokens, tg64 decodes 64; `x4`: four sequences at once; `@ d1024`: after 1024 tokens.
    """
    from llm_boost.config.locations import find_model
    from llm_boost.config.run_config import resolve

    configs = [resolve({**flags, "dtype": name}).config for name in (dtype.split(",") if dtype else [None])]
    path = find_model(configs[0].model, configs[0].cache_dir)

    from llm_boost.benchmark.latency import load_subject, make_cases, measure
    from llm_boost.benchmark.limits import Limits, peak_memory

    cases = make_cases(pp, tg, depth, batch)
    with ProgressBar("packing weights") as progress:
        subjects = [
            load_subject(
                path,
                cases,
                dtype=config.dtype,
                kv_cache_dtype=config.kv_cache_dtype,
                dummy=load_format == "dummy",
                threads=config.threads,
                cache_dir=config.cache_dir,
                progress=progress,
            )
            for config in configs
        ]
    with ProgressBar("measuring", unit="tests") as progress:
        results = measure(subjects, cases, repetitions, progress)
    memory = peak_memory()  # before the probe of the bandwidth takes its own
    limits = Limits(subjects[0].runner.threads)
    name = path.absolute().name
    report = {
        "model": name,
        "load_format": load_format,
        "machine": _machine(limits, [subjects[0].runner.isa]),
        "versions": _versions(),
        "models": [_model(subject) for subject in subjects],
        "tests": [_test(result, limits) for result in results],
        "peak_memory": memory,
    }
    if not as_json:
        click.echo(_latency_table(name, results, limits))
        loads = [f"{s.load_seconds:.2f} s {s.runner.dtype}" for s in subjects if s.load_seconds is not None]
        click.echo(
            f"\nload, warm: {', '.join(loads) or 'made weights'}; peak memory: {memory / GIGA:.2f} GB\n"
        )
    click.echo(json.dumps(report))


@bench_command.command("kernels", epilog=_KERNEL_EXAMPLES)
@click.option(
    "--isa", metavar="NAME,...|all", help="Instruction sets (default: the one that the engine uses)."
)
@click.option("--threads", type=click.IntRange(1, 1024), default=1, show_default=True, metavar="N")
@click.option(
    "--rows", type=click.IntRange(1, 1 << 20), default=8192, show_default=True, metavar="N", help="Out."
)
@click.option(
    "--cols", type=click.IntRange(1, 1 << 20), default=4096, show_default=True, metavar="N", help="In."
)
@click.option("--tokens", type=_Counts(1), default="1,6,16,128,512", show_default=True, help="Batches.")
@_REPETITIONS
@_JSON
def kernels_command(
    isa: str | None,
    threads: int,
    rows: int,
    cols: int,
    tokens: tuple[int, ...],
    repetitions: int,
    as_json: bool,
) -> None:
    """One matrix product of every format, as the plan runs it, beside the read bandwidth and the dot rate."""
    from llm_boost.benchmark.kernels import measure_kernels
    from llm_boost.benchmark.limits import Limits

    isas, limits = _isas(isa), Limits(threads)
    products = list(measure_kernels(isas, rows, cols, tokens, threads, repetitions))
    if not as_json:
        click.echo(_kernel_table(products, limits) + "\n")
    report = {
        "machine": _machine(limits, isas),
        "versions": _versions(),
        "rows": rows,
        "cols": cols,
        "products": [_product(product) for product in products],
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


# ---- what is said of the measurements


def _machine(limits: Limits, isas: Sequence[str]) -> dict[str, Any]:
    from llm_boost.engine.hardware import processor_name

    return {
        "processor": processor_name(),
        "isa": isas[0] if len(isas) == 1 else list(isas),
        "threads": limits.threads,
        "read_bandwidth": limits.bandwidth,
        "dot_rates": limits.dot_rates,
    }


def _versions() -> dict[str, str]:
    import numpy as np

    from llm_boost import __version__

    return {"llm-boost": __version__, "python": platform.python_version(), "numpy": np.__version__}


def _model(subject: Subject) -> dict[str, Any]:
    runner = subject.runner
    return {
        "dtype": runner.dtype,
        "parameters": subject.parameters,
        "weight_bytes": runner.weight_bytes,
        "cache_bytes": runner.cache_bytes,
        "load_seconds": subject.load_seconds,
    }


def _test(result: Result, limits: Limits) -> dict[str, Any]:
    case, decode = result.case, result.case.kind == "tg"
    return {
        "dtype": result.subject.runner.dtype,
        "test": case.name,
        "tokens": case.tokens,
        "depth": case.depth,
        "batch": case.batch,
        "seconds": result.seconds,
        "tokens_per_second": statistics.mean(result.tokens_per_second),
        "tokens_per_second_std": _std(result.tokens_per_second),
        "bytes_per_second" if decode else "operations_per_second": result.rate,
        "share_of_limit": result.rate / _limit(result, limits),
    }


def _product(product: Product) -> dict[str, Any]:
    return {
        "isa": product.isa,
        "format": product.format,
        "tokens": product.tokens,
        "seconds": product.seconds,
        "bytes_per_second": product.bytes_per_second,
        "operations_per_second": product.operations_per_second,
    }


def _limit(result: Result, limits: Limits) -> float:
    return limits.bandwidth if result.case.kind == "tg" else limits.dot_rate(result.subject.runner.dtype)


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _latency_table(name: str, results: Sequence[Result], limits: Limits) -> str:
    rows = []
    for result in results:
        runner, speeds = result.subject.runner, result.tokens_per_second
        unit = "GB/s" if result.case.kind == "tg" else "GOP/s"
        rows.append(
            [
                f"{name} {runner.dtype}",
                f"{runner.weight_bytes / 2**20:.2f} MiB",
                f"{result.subject.parameters / 1e6:.2f} M",
                runner.isa,
                str(runner.threads),
                result.case.name,
                f"{statistics.mean(speeds):.2f} ± {_std(speeds):.2f}",
                f"{result.rate / GIGA:.1f} {unit}",
                f"{100 * result.rate / _limit(result, limits):.0f} %",
            ]
        )
    header = ["model", "size", "params", "backend", "threads", "test", "t/s", "rate", "of limit"]
    return _table(header, rows, left=(0, 3))


def _kernel_table(products: Sequence[Product], limits: Limits) -> str:
    rows = [
        [
            p.format,
            p.isa,
            f"{p.rows} x {p.cols}",
            str(p.tokens),
            f"{1e3 * statistics.median(p.seconds):.3f}",
            f"{p.bytes_per_second / GIGA:.1f}",
            f"{100 * p.bytes_per_second / limits.bandwidth:.0f} %",
            f"{p.operations_per_second / GIGA:.0f}",
            f"{100 * p.operations_per_second / limits.dot_rate(p.format):.0f} %",
        ]
        for p in products
    ]
    header = ["format", "isa", "weight", "tokens", "ms", "GB/s", "of limit", "GOP/s", "of limit"]
    return _table(header, rows, left=(0, 1))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
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
