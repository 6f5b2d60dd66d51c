"""`llm-boost bench latency`: prefill and decode of the engine's step beside the machine's limits."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_boost.cli.bench_report import (
    GIGA,
    Counts,
    json_option,
    machine,
    percent,
    repetitions_option,
    std,
    table,
    versions,
)
from llm_boost.cli.options import models_options, note, split_dtypes
from llm_boost.cli.progress import ProgressBar
from llm_boost.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_boost.benchmark.latency import Result
    from llm_boost.benchmark.limits import Limits
    from llm_boost.benchmark.subject import Subject
    from llm_boost.evaluation import Quality

_EXAMPLES = """\b
Examples:
  llm-boost bench latency --model smollm2-135m-instruct
  llm-boost bench latency --model DIR --dtype int8,int4 --text text.txt --plot roofline.png
  llm-boost bench latency --model DIR --pp 512 --tg 64 --depth 0,4096 --batch 1 --json
  llm-boost bench latency --model benchmarks/shapes/qwen2-7b --load_format dummy --dtype int4
"""


@click.command("latency", epilog=_EXAMPLES)
@models_options
@click.option(
    "--load_format",
    type=click.Choice(["auto", "dummy"]),
    default="auto",
    show_default=True,
    help="dummy makes up the weights: config.json is enough.",
)
@click.option(
    "--pp", type=Counts(1), default="128,512,2048", show_default=True, help="Prompts to prefill, in tokens."
)
@click.option("--pp_depth", type=Counts(0), default="0", show_default=True, help="Tokens before a prompt.")
@click.option("--tg", type=Counts(1), default="64", show_default=True, help="Steps of decode.")
@click.option(
    "--depth", type=Counts(0), default="0,1024,4096", show_default=True, help="Tokens before decode."
)
@click.option("--batch", type=Counts(1), default="1,4,16", show_default=True, help="Sequences that decode.")
@repetitions_option
@click.option(
    "--max_minutes",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=10.0,
    show_default=True,
    metavar="M",
    help="Leave out tests that would end later; the deepest and widest come last.",
)
@click.option("--text", metavar="FILE", help="Measure perplexity on this text, too, and divergence from:")
@click.option("--reference_dtype", default="float32", show_default=True, metavar="TYPE", help="see --text.")
@click.option(
    "--text_tokens",
    type=click.IntRange(2, 1 << 20),
    default=1024,
    show_default=True,
    metavar="N",
    help="Tokens of --text.",
)
@click.option("--plot", metavar="FILE.png", help='Draw roofline and speeds (needs "llm-boost[plot]").')
@json_option
def latency_command(
    dtypes: tuple[str, ...],
    load_format: str,
    pp: tuple[int, ...],
    pp_depth: tuple[int, ...],
    tg: tuple[int, ...],
    depth: tuple[int, ...],
    batch: tuple[int, ...],
    repetitions: int,
    max_minutes: float,
    text: str | None,
    reference_dtype: str,
    text_tokens: int,
    plot: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Prefill and decode of the engine's step, in llama-bench's rows; `--dtype int8,int4` takes turns.

    pp512 prefills 512 tokens, tg64 decodes 64; `x4`: four sequences at once; `@ d1024`: after 1024 tokens.
    """
    from llm_boost.cli.eval import qualities_of, read_text
    from llm_boost.config.locations import find_model
    from llm_boost.config.run_config import check_dtype, resolve

    configs = [resolve({**flags, "dtype": name}).config for name in split_dtypes(dtypes)]
    path = find_model(configs[0].model, configs[0].cache_dir)
    picture = _check_plot(plot)
    if text is not None and load_format == "dummy":
        raise ConfigError("--text: made weights (--load_format dummy) have no quality to measure")
    content = None if text is None else read_text(text)
    reference_dtype = check_dtype("--reference_dtype", reference_dtype)

    from llm_boost.benchmark.latency import fitting_cases, make_cases, measure, room_for
    from llm_boost.benchmark.limits import Limits, forget_peak_memory, peak_memory
    from llm_boost.benchmark.subject import load_subject, read_config

    dummy = load_format == "dummy"
    config = read_config(path, dummy=dummy)
    cases, without_room = fitting_cases(
        make_cases(pp, pp_depth, tg, depth, batch),
        config,
        [c.dtype for c in configs],
        configs[0].kv_cache_dtype,
    )
    for case, reason in without_room.items():
        note(f"left out: {case.name}: {reason}")
    with ProgressBar("packing weights") as progress:
        subjects = [
            load_subject(
                path,
                config,
                room_for(cases),
                dtype=run.dtype,
                kv_cache_dtype=run.kv_cache_dtype,
                dummy=dummy,
                threads=run.threads,
                cache_dir=run.cache_dir,
                progress=progress,
            )
            for run in configs
        ]
    forget_peak_memory()  # of packing
    with ProgressBar("measuring", unit="tests") as progress:
        results, left_out = measure(subjects, cases, repetitions, seconds=60 * max_minutes, progress=progress)
    memory = peak_memory()  # before the probe of the bandwidth and the reference take their own
    for case, seconds in left_out.items():
        note(f"left out: {case.name}: about {seconds / 60:.1f} min; raise --max_minutes {max_minutes:g}")
    limits = Limits(subjects[0].runner.threads)
    qualities = (
        {}
        if content is None
        else qualities_of(flags, [s.dtype for s in subjects], reference_dtype, content, text_tokens)
    )
    name = path.absolute().name
    report = {
        "model": name,
        "load_format": load_format,
        "machine": machine(limits, [subjects[0].runner.isa]),
        "versions": versions(),
        "models": [_model(subject, qualities) for subject in subjects],
        "tests": [_test(result, limits) for result in results],
        "left_out": [case.name for case in (*without_room, *left_out)],
        "peak_memory": memory,
    }
    if picture:
        from llm_boost.benchmark.plot import draw

        draw(picture, name, results, limits)
    if not as_json:
        click.echo(_table(name, results, limits, qualities))
        click.echo(f"\n{_notes(subjects, limits, memory, qualities, reference_dtype)}\n")
    click.echo(json.dumps(report))


# ---- before the measurements


def _check_plot(plot: str | None) -> Path | None:
    """Refuses at once what could not be drawn after minutes of measuring."""
    if plot is None:
        return None
    path = Path(plot).expanduser()
    if path.suffix != ".png":
        raise ConfigError(f"--plot: got {plot!r}, allowed a name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot: got {plot!r}, allowed a file in a directory that exists")
    try:
        import llm_boost.benchmark.plot  # noqa: F401
    except ImportError:
        raise ConfigError('--plot needs matplotlib: pip install "llm-boost[plot]"') from None
    return path


# ---- what is said of them


def _model(subject: Subject, qualities: Mapping[str, Quality]) -> dict[str, Any]:
    runner = subject.runner
    return {
        "dtype": runner.dtype,
        "parameters": subject.parameters,
        "weight_bytes": runner.weight_bytes,
        "cache_bytes": runner.cache_bytes,
        "start_seconds": asdict(subject.start) if subject.start else None,
        "quality": asdict(qualities[runner.dtype]) if qualities else None,
    }


def _test(result: Result, limits: Limits) -> dict[str, Any]:
    case = result.case
    return {
        "dtype": result.subject.dtype,
        "test": case.name,
        "tokens": case.tokens,
        "depth": case.depth,
        "batch": case.batch,
        "seconds": result.seconds,
        "tokens_per_second": statistics.mean(result.tokens_per_second),
        "tokens_per_second_std": std(result.tokens_per_second),
        "time_to_first_token": statistics.mean(result.seconds) if case.kind == "pp" else None,
        "bytes_per_second": result.bytes_per_second,
        "share_of_bandwidth": result.bytes_per_second / limits.bandwidth,
        "operations_per_second": result.operations_per_second,
        "share_of_dot_rate": result.operations_per_second / limits.dot_rate(result.subject.dtype),
    }


def _table(name: str, results: Sequence[Result], limits: Limits, qualities: Mapping[str, Quality]) -> str:
    rows = []
    for result in results:
        runner, test = result.subject.runner, _test(result, limits)
        first = test["time_to_first_token"]
        row = [
            f"{name} {runner.dtype}",
            f"{runner.weight_bytes / 2**20:.2f} MiB",
            f"{result.subject.parameters / 1e6:.2f} M",
            runner.isa,
            str(runner.threads),
            test["test"],
            f"{test['tokens_per_second']:.2f} ± {test['tokens_per_second_std']:.2f}",
            "" if first is None else f"{1e3 * first:.1f} ms",
            f"{test['bytes_per_second'] / GIGA:.1f}",
            percent(test["share_of_bandwidth"]),
            f"{test['operations_per_second'] / GIGA:.0f}",
            percent(test["share_of_dot_rate"]),
        ]
        if qualities:
            quality = qualities[runner.dtype]
            row += [f"{quality.mean_kl:.5f}", f"{quality.perplexity:.3f}"]
        rows.append(row)
    header = [
        "model", "size", "params", "backend", "threads", "test", "t/s", "first token",
        "GB/s", "of limit", "GOP/s", "of limit",
    ]  # fmt: skip
    return table(header + (["KL, nats", "perplexity"] if qualities else []), rows, left=(0, 3))


def _notes(
    subjects: Sequence[Subject],
    limits: Limits,
    memory: int,
    qualities: Mapping[str, Quality],
    reference_dtype: str,
) -> str:
    lines = [
        f"limits of {limits.threads} threads: {limits.bandwidth / GIGA:.1f} GB/s read, "
        + ", ".join(f"{kind} {rate / GIGA:.0f} GOP/s" for kind, rate in limits.dot_rates.items())
    ]
    for subject in subjects:
        if (start := subject.start) is None:
            lines.append(f"load {subject.dtype}: made weights")
            continue
        times = [("first start, packing", start.first), ("cold", start.cold), ("warm", start.warm)]
        shown = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in times if seconds is not None)
        lines.append(f"load {subject.dtype}, to the first token: {shown}")
    weights = sum(subject.runner.weight_bytes for subject in subjects)
    cache = sum(subject.runner.cache_bytes for subject in subjects)
    lines.append(
        f"peak memory: {memory / GIGA:.2f} GB (weights {weights / GIGA:.2f}, cache {cache / GIGA:.2f})"
    )
    if qualities:
        tokens = next(iter(qualities.values())).scored_tokens
        lines.append(f"KL: mean KL({reference_dtype} || row's dtype) of {tokens} tokens of the text")
    return "\n".join(lines)
