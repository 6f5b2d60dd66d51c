"""`llm-boost bench throughput`: many prompts at once, through the whole engine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_boost.cli.bench_report import GIGA, json_option, machine, table, versions
from llm_boost.cli.options import BOOL_TEXT, model_options
from llm_boost.cli.progress import ProgressBar
from llm_boost.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from llm_boost import LLM
    from llm_boost.benchmark.throughput import Spread, Throughput
    from llm_boost.benchmark.workload import Job, Lengths
    from llm_boost.cli.prompts import Prompt

DEFAULT_INPUT, DEFAULT_OUTPUT, DEFAULT_PROMPTS = "128", "64", 64
_EXAMPLES = """\b
Examples:
  llm-boost bench throughput --model DIR --input_len 128 --output_len 64 --num_prompts 16
  llm-boost bench throughput --model DIR --dtype int8 --input_len 16:512 --output_len 16:128 --seed 1
  llm-boost bench throughput --model DIR --prompt_file prompts.jsonl --output_len 100
  llm-boost bench throughput --model DIR --sharegpt ShareGPT_V3.json --num_prompts 100 --json
"""


class _LengthsType(click.ParamType["Lengths"]):
    """`128`, or `16:512`: evenly from the one to the other."""

    name = "lengths"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "N[:N]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Lengths:
        from llm_boost.benchmark.workload import Lengths

        texts = value.split(":")
        numbers = [int(text[:8]) for text in texts if text.isascii() and text.isdigit()]
        if not 1 <= len(texts) == len(numbers) <= 2 or not 1 <= numbers[0] <= numbers[-1] <= 1 << 20:
            self.fail(f"got {value!r}, allowed: tokens from 1 to {1 << 20}, as 128 or 16:512", param, ctx)
        return Lengths(numbers[0], numbers[-1])


@click.command("throughput", epilog=_EXAMPLES)
@model_options
@click.option("--prompt_file", metavar="FILE", help="Prompts, one a line; .jsonl: an object a line.")
@click.option("--sharegpt", metavar="FILE.json", help="The first question of ShareGPT's conversations.")
@click.option(
    "--num_prompts",
    type=click.IntRange(1, 1 << 20),
    metavar="N",
    help=f"How many (default: all of --prompt_file, else {DEFAULT_PROMPTS}).",
)
@click.option("--input_len", type=_LengthsType(), help=f"Tokens of made prompts (default: {DEFAULT_INPUT}).")
@click.option(
    "--output_len",
    type=_LengthsType(),
    help=f"Tokens to generate (default: {DEFAULT_OUTPUT}; with --sharegpt: as its answers have).",
)
@click.option("--ignore_eos", type=BOOL_TEXT, default=True, show_default=True, help="Generate all of them.")
@click.option("--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, metavar="N")
@click.option("--max_num_seqs", type=click.IntRange(1, 1 << 16), metavar="N", help="Sequences at once.")
@click.option("--max_num_batched_tokens", type=click.IntRange(1, 1 << 20), metavar="N", help="Of a step.")
@click.option("--seq_length", type=int, metavar="N", help="Tokens of prompt and output, at most.")
@json_option
def throughput_command(
    prompt_file: str | None,
    sharegpt: str | None,
    num_prompts: int | None,
    input_len: Lengths | None,
    output_len: Lengths | None,
    ignore_eos: bool,
    temperature: float,
    seed: int,
    max_num_seqs: int | None,
    max_num_batched_tokens: int | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Requests and tokens a second of many prompts that all are there at the start, and their latencies.

    Prompts are random tokens of --input_len unless a file is given.
    """
    sources = [name for name, given in (("--prompt_file", prompt_file), ("--sharegpt", sharegpt)) if given]
    if len(sources) == 2 or (sources and input_len):
        raise ConfigError(
            f"{' and '.join([*sources, *(['--input_len'] if input_len else [])])}: give one source of prompts"
        )
    from llm_boost.cli.load import build_llm
    from llm_boost.cli.prompts import read_prompt_file
    from llm_boost.config.run_config import resolve

    prompts = read_prompt_file(prompt_file)[:num_prompts] if prompt_file else []
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    resolved = resolve({**flags, "seed": seed})
    llm = build_llm(resolved, **{k: v for k, v in limits.items() if v is not None})

    from llm_boost.benchmark import workload
    from llm_boost.benchmark.limits import Limits, forget_peak_memory, peak_memory
    from llm_boost.benchmark.throughput import measure_throughput

    fixed = workload.Lengths(int(DEFAULT_OUTPUT), int(DEFAULT_OUTPUT))
    if sharegpt:
        jobs = workload.sharegpt(
            Path(sharegpt).expanduser(),
            llm.tokenizer.encode,
            count=num_prompts or DEFAULT_PROMPTS,
            output=output_len,
            max_model_len=llm.max_model_len,
            seed=seed,
            temperature=temperature,
            ignore_eos=ignore_eos,
        )
    elif prompt_file:
        jobs = _file_jobs(llm, prompts, output_len or fixed, seed, temperature, ignore_eos)
    else:
        jobs = workload.synthetic(
            num_prompts or DEFAULT_PROMPTS,
            input_len or workload.Lengths(int(DEFAULT_INPUT), int(DEFAULT_INPUT)),
            output_len or fixed,
            llm.model_config.vocab_size,
            seed=seed,
            temperature=temperature,
            ignore_eos=ignore_eos,
        )
    _check_lengths(jobs, llm.max_model_len)
    forget_peak_memory()
    with ProgressBar("generating", unit="tokens") as progress:
        result = measure_throughput(llm.engine, jobs, progress)
    memory = peak_memory()
    report = {
        "model": Path(resolved.config.model).name,
        "dtype": llm.dtype,
        "source": Path(prompt_file or sharegpt or "synthetic").name,
        "machine": machine(Limits(llm.threads), [llm.isa]),
        "versions": versions(),
        "seed": seed,
        "peak_memory": memory,
        **result.report(),
    }
    if not as_json:
        click.echo(_lines(result, memory))
    click.echo(json.dumps(report))


def _file_jobs(
    llm: LLM, prompts: list[Prompt], output: Lengths, seed: int, temperature: float, ignore_eos: bool
) -> list[Job]:
    """What a line of a .jsonl file says of its request outranks the flags."""
    import random

    from llm_boost import SamplingParams
    from llm_boost.benchmark.workload import Job

    rng, jobs = random.Random(seed), []
    for prompt in prompts:
        asked = {"temperature": temperature, "ignore_eos": ignore_eos, **prompt.sampling}
        max_tokens = asked.pop("max_new_tokens", output.draw(rng))
        try:
            ids = (
                llm.tokenizer.encode(prompt.text or "")
                if prompt.messages is None
                else llm.tokenizer.encode_chat(prompt.messages)
            )
            jobs.append(Job(ids, SamplingParams(max_tokens=max_tokens, **asked)))
        except RequestError as error:
            raise RequestError(f"{prompt.where}: {error}") from None
    return jobs


def _check_lengths(jobs: list[Job], longest: int) -> None:
    for number, job in enumerate(jobs, 1):
        wanted = len(job.prompt_token_ids) + (job.params.max_tokens or 0)
        if wanted > longest:
            raise RequestError(
                f"prompt {number}: {len(job.prompt_token_ids)} tokens and {job.params.max_tokens} to generate"
                f", allowed: {longest} together (--seq_length, or what the model was made for)"
            )


def _lines(result: Throughput, memory: int) -> str:
    rates = result.rates
    lines = [
        f"{result.requests} requests, {result.prompt_tokens} tokens in, {result.output_tokens} tokens out, "
        f"in {result.seconds:.2f} s ({result.steps} steps, {result.preemptions} preemptions)",
        f"requests: {rates['requests_per_second']:.2f} /s",
        f"tokens: in {rates['prompt_tokens_per_second']:.1f} /s, "
        f"out {rates['output_tokens_per_second']:.1f} /s, total {rates['total_tokens_per_second']:.1f} /s",
        f"peak memory: {memory / GIGA:.2f} GB",
        "",
    ]
    times = {
        "time to first token": result.time_to_first_token,
        "time per output token": result.time_per_output_token,
        "latency": result.latency,
    }
    rows = [_row(name, spread) for name, spread in times.items() if spread is not None]
    return "\n".join(lines) + table(["ms", "mean", "p50", "p90", "p99"], rows, left=(0,)) + "\n"


def _row(name: str, spread: Spread) -> list[str]:
    return [name, *(f"{1e3 * value:.1f}" for value in asdict(spread).values())]
