"""`llm-boost eval`: perplexity of a text file and, given a reference dtype, the divergence from it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_boost.cli.load import build_llm
from llm_boost.cli.options import cache_options, model_options
from llm_boost.cli.progress import ProgressBar
from llm_boost.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_boost.evaluation import Protocol, Quality

QUALITY_CONTEXT = 512  # tokens of a window where nobody chooses
_EXAMPLES = """\b
Examples:
  llm-boost eval --model DIR --file wiki.test.txt
  llm-boost eval --model DIR --file wiki.test.txt --dtype int8 --reference_dtype float32
  llm-boost eval --model DIR-int4 --file wiki.test.txt --reference_model DIR --reference_dtype float32
  llm-boost eval --model DIR --file wiki.test.txt --context 2048 --stride 1024 --json
"""


@click.command("eval", epilog=_EXAMPLES)
@model_options
@cache_options
@click.option("--file", "text_file", required=True, metavar="TEXT", help="The text, in UTF-8.")
@click.option("--reference_dtype", metavar="TYPE", help="Compare with the model at this dtype.")
@click.option("--reference_model", metavar="MODEL", help="Compare with this model rather than the same.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=QUALITY_CONTEXT,
    show_default=True,
    metavar="N",
    help="Tokens of a window.",
)
@click.option("--stride", type=int, metavar="N", help="Tokens from window to window (default: no overlap).")
@click.option(
    "--max_tokens", type=click.IntRange(min=1), metavar="N", help="Use the text's first N tokens only."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def eval_command(
    text_file: str,
    reference_dtype: str | None,
    reference_model: str | None,
    context: int,
    stride: int | None,
    max_tokens: int | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Perplexity of a text; with a reference also mean KL divergence and share of equal top tokens."""
    from llm_boost.config.run_config import check_dtype, resolve
    from llm_boost.evaluation import Protocol, evaluate

    text = read_text(text_file)
    flags["seq_length"] = context
    resolved = resolve(flags)
    if reference_dtype is not None:
        reference_dtype = check_dtype("--reference_dtype", reference_dtype)
    llm = build_llm(resolved)
    reference = None
    if reference_dtype or reference_model:
        other = {"model": reference_model} if reference_model else {}
        reference = build_llm(resolve({**flags, **other, "dtype": reference_dtype, "kv_cache_dtype": None}))
    token_ids, bos = _tokens(llm.tokenizer, text)
    span = context - (bos is not None)
    protocol = Protocol(context=context, stride=span if stride is None else stride, bos=bos)
    with ProgressBar("evaluating", unit="windows") as progress:
        quality = evaluate(
            llm.engine.runner,
            token_ids[:max_tokens],
            protocol,
            reference.engine.runner if reference else None,
            progress,
        )
    report = _report(text_file, llm.dtype, reference.dtype if reference else None, protocol, quality)
    click.echo(json.dumps(report) if as_json else _lines(report))


def qualities_of(
    flags: dict[str, Any], dtypes: Sequence[str], reference_dtype: str, text: str, max_tokens: int
) -> dict[str, Quality]:
    """The model of `flags` at each dtype beside the reference, on the first tokens of a text."""
    from llm_boost.config.run_config import resolve
    from llm_boost.evaluation import Protocol, evaluate

    flags = {**flags, "seq_length": QUALITY_CONTEXT}
    reference = build_llm(resolve({**flags, "dtype": reference_dtype, "kv_cache_dtype": None}))
    token_ids, bos = _tokens(reference.tokenizer, text)
    protocol = Protocol(QUALITY_CONTEXT, QUALITY_CONTEXT - (bos is not None), bos)
    found = {}
    for dtype in dtypes:
        with ProgressBar(f"evaluating {dtype}", unit="windows") as progress:
            runner = build_llm(resolve({**flags, "dtype": dtype})).engine.runner
            found[dtype] = evaluate(
                runner, token_ids[:max_tokens], protocol, reference.engine.runner, progress
            )
    return found


def read_text(name: str) -> str:
    try:
        return Path(name).expanduser().read_text("utf-8")
    except OSError as error:
        raise RequestError(f"{name}: cannot read the text: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{name}: not UTF-8 text (byte {error.start})") from None


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], int | None]:
    """The text's tokens, and the beginning-of-sequence token if the model wants one before a text."""
    with_bos = tokenizer.encode(text[:1] or " ")
    bos = tokenizer.bos_token_id if with_bos[:1] == [tokenizer.bos_token_id] else None
    return tokenizer.encode(text, add_special_tokens=False), bos


def _report(
    text_file: str, dtype: str, reference_dtype: str | None, protocol: Protocol, quality: Quality
) -> dict[str, Any]:
    report = {
        "file": text_file,
        "dtype": dtype,
        "reference_dtype": reference_dtype,
        "context": protocol.context,
        "stride": protocol.stride,
        "bos": protocol.bos,
        **asdict(quality),
    }
    return {name: value for name, value in report.items() if value is not None or name == "bos"}


def _lines(report: dict[str, Any]) -> str:
    lines = [
        f"text: {report['file']}, {report['scored_tokens']} tokens scored",
        f"protocol: context {report['context']}, stride {report['stride']}, {report['windows']} windows, "
        + ("no BOS" if report["bos"] is None else f"BOS (token {report['bos']}) before each window"),
        f"perplexity ({report['dtype']}): {report['perplexity']:.4f} +- {report['perplexity_error']:.4f}",
    ]
    if "mean_kl" in report:
        name, kl, error = report["reference_dtype"], report["mean_kl"], report["mean_kl_error"]
        lines += [
            f"perplexity ({name}): {report['reference_perplexity']:.4f}",
            f"mean KL({name} || {report['dtype']}): {kl:.6f} +- {error:.6f} nats",
            f"same top token: {100 * report['same_top']:.2f} %",
        ]
    return "\n".join(lines)
