"""`llm-boost quantize`: a model in int4 or int8, rounded to nearest or calibrated, ready to be mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_boost.cli.options import note
from llm_boost.cli.progress import ProgressBar

if TYPE_CHECKING:
    from llm_boost.convert.source import Source
    from llm_boost.quantize.calibration import Tokens
    from llm_boost.quantize.quantize import Options

_EXAMPLES = """\b
Examples:
  llm-boost quantize path/to/model --dtype int4 --output model-int4
  llm-boost quantize path/to/model --dtype int4 --output model-int4 --resume
  llm-boost quantize path/to/model --dtype int8 --method rtn --output model-int8 --no-report
  llm-boost quantize path/to/model --calibration texts.txt --num_samples 64 --output model-int4
Then: llm-boost predict --model model-int4 "The capital of France is"
"""


@click.command("quantize", epilog=_EXAMPLES)
@click.argument("model", metavar="MODEL")
@click.option("--output", required=True, metavar="DIR", help="The folder that the quantised model will be.")
@click.option(
    "--dtype", type=click.Choice(["int4", "int8"]), default="int4", show_default=True, help="Of the weights."
)
@click.option(
    "--method",
    type=click.Choice(["gptq", "rtn"]),
    default="gptq",
    show_default=True,
    help="Calibrated on a text, or each weight rounded to nearest.",
)
@click.option(
    "--calibration",
    metavar="FILE",
    help="A text in UTF-8 (default: Python's standard library on this machine).",
)
@click.option(
    "--num_samples",
    type=click.IntRange(1, 1 << 16),
    default=32,
    show_default=True,
    metavar="N",
    help="Sequences of the text to calibrate on.",
)
@click.option(
    "--context",
    type=click.IntRange(8, 1 << 16),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of a sequence.",
)
@click.option(
    "--damping",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    metavar="X",
    help="Of GPTQ: more trusts the calibration text less.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run where its last layer ended.")
@click.option(
    "--report/--no-report", default=True, help="Measure KL divergence and perplexity before and after."
)
@click.option(
    "--reference_dtype",
    default="bfloat16",
    show_default=True,
    metavar="TYPE",
    help="Of the model that the report compares with.",
)
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Default: the processor's cores.")
@click.option(
    "--cache_dir", metavar="DIR", help="Where packed models are kept (default: ~/.cache/llm-boost)."
)
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object on stdout.")
def quantize_command(
    model: str,
    output: str,
    dtype: str,
    method: str,
    calibration: str | None,
    num_samples: int,
    context: int,
    damping: float,
    resume: bool,
    report: bool,
    reference_dtype: str,
    threads: int | None,
    cache_dir: str | None,
    as_json: bool,
) -> None:
    """Quantise MODEL into a folder that loads wherever a model is taken, at the speed of its dtype.

    gptq lets the rounding of each weight be made up for by the others, for inputs like those of a text. It
    goes layer by layer; interrupted work is kept in DIR.unfinished, which --resume continues.
    """
    if threads is not None:  # before numpy reads them
        for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(variable, str(threads))
    from llm_boost.config.locations import cache_folder, find_model
    from llm_boost.config.run_config import check_dtype
    from llm_boost.convert.source import open_source
    from llm_boost.engine.hardware import default_threads
    from llm_boost.quantize.calibration import (
        HELD_OUT,
        file_text,
        sequences,
        standard_library_text,
        tokenizer_of,
    )
    from llm_boost.quantize.quantize import Options, quantize

    reference_dtype = check_dtype("--reference_dtype", reference_dtype)
    source = open_source(find_model(model, cache_folder(cache_dir)))
    text = None if calibration is None else Path(calibration).expanduser()
    options = Options(
        dtype,
        method,
        "standard library" if text is None else str(text.resolve()),
        num_samples,
        context,
        damping,
    )

    def tokens() -> Tokens:
        texts = standard_library_text() if text is None else file_text(text)
        found = sequences(tokenizer_of(source.checkpoint), texts, num_samples, context)
        if method == "gptq" and len(found) - HELD_OUT < num_samples:
            note(f"the text is enough for {len(found) - HELD_OUT} sequences of {context} tokens only")
        return found

    with ProgressBar("quantising", unit="M weights") as bar:
        known = quantize(
            source,
            Path(output).expanduser(),
            options,
            tokens,
            threads=threads or default_threads(),
            resume=resume,
            report=_Report(source, options, reference_dtype, threads, cache_dir) if report else None,
            progress=lambda done, total: bar(done // 1_000_000, max(total // 1_000_000, 1)),
        )
    click.echo(json.dumps(known) if as_json else _lines(output, known))


class _Report:
    """Measures the quantised model, and round-to-nearest beside it, on text that it was not calibrated on."""

    def __init__(
        self,
        source: Source,
        options: Options,
        reference_dtype: str,
        threads: int | None,
        cache_dir: str | None,
    ) -> None:
        self._source, self._options, self._reference_dtype = source, options, reference_dtype
        self._threads, self._cache_dir = threads, cache_dir

    def __call__(self, folder: Path, text: Tokens) -> Mapping[str, Any]:
        from llm_boost.checkpoint import open_checkpoint
        from llm_boost.evaluation import Protocol, evaluate

        options, source = self._options, self._source.checkpoint
        candidates = {options.method: (open_checkpoint(folder), options.dtype)}
        if options.method != "rtn":
            candidates = {"rtn": (source, options.dtype), **candidates}
        reference = self._runner(source, self._reference_dtype)
        protocol = Protocol(options.context, options.context)
        measured: dict[str, Any] = {}
        for name, (checkpoint, dtype) in candidates.items():
            with ProgressBar(f"measuring {name}", unit="windows") as bar:
                quality = evaluate(
                    self._runner(checkpoint, dtype), text.reshape(-1).tolist(), protocol, reference, bar
                )
            measured["reference_perplexity"] = quality.reference_perplexity
            measured[name] = {
                "mean_kl": quality.mean_kl,
                "mean_kl_error": quality.mean_kl_error,
                "perplexity": quality.perplexity,
                "same_top": quality.same_top,
            }
        return {
            "reference_dtype": self._reference_dtype,
            "measured_tokens": quality.scored_tokens,
            **measured,
        }

    def _runner(self, checkpoint: Any, dtype: str) -> Any:
        from llm_boost.engine.native_runner import NativeRunner

        blocks = -(-self._options.context // 32)
        with ProgressBar("packing weights") as bar:
            return NativeRunner.load(
                checkpoint,
                self._source.model,
                dtype=dtype,
                threads=self._threads,
                cache_dir=self._cache_dir,
                max_model_len=self._options.context,
                block_size=32,
                num_blocks=blocks,
                progress=bar,
            )


def _lines(output: str, known: Mapping[str, Any]) -> str:
    lines = [f"{output}: {known['dtype']} by {known['method']}, {known['bytes'] / 1e6:.1f} MB"]
    if "measured_tokens" in known:
        lines.append(
            f"on {known['measured_tokens']} tokens that it was not calibrated on, beside "
            f"{known['reference_dtype']} (perplexity {known['reference_perplexity']:.4f}):"
        )
        for name in ("rtn", "gptq"):
            if name in known:
                m = known[name]
                lines.append(
                    f"  {name + ':':5} mean KL {m['mean_kl']:.6f} +- {m['mean_kl_error']:.6f} nats, "
                    f"perplexity {m['perplexity']:.4f}, same top token {100 * m['same_top']:.2f} %"
                )
    if "rtn" in known and "gptq" in known:
        lines.append(
            f"  gptq leaves {known['gptq']['mean_kl'] / known['rtn']['mean_kl']:.2f} of rtn's divergence"
        )
    return "\n".join(lines)
