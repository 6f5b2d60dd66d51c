"""`llm-boost convert`: a checkpoint in another format, with MindFormers' flags and a few more."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_boost.cli.options import BOOL_TEXT, note
from llm_boost.cli.progress import ProgressBar
from llm_boost.errors import ConfigError

if TYPE_CHECKING:
    from llm_boost.convert.convert import Result
    from llm_boost.convert.source import Source

FORMATS = ("hf", "mindspore-ckpt", "mindspore-safetensors", "gguf", "packed")
SOURCES = ("hf", "mindspore-ckpt", "mindspore-safetensors", "gguf", "meta")
GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
LAYOUTS = ("grouped", "grouped_plain_bias", "plain")
_BY_SUFFIX = {".gguf": "gguf", ".safetensors": "mindspore-safetensors"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_EXAMPLES = """\b
Examples:
  llm-boost convert --model llama --input_path llama-2-7b --output_path ms/llama2_7b.ckpt --dtype bf16
  llm-boost convert --model llama --reversed --input_path ms/llama2_7b.ckpt --output_path llama-2-7b-hf
  llm-boost convert --input_path qwen2.5-0.5b --output_path qwen2.5-0.5b.gguf --gguf_type Q8_0
  llm-boost convert --input_path model.gguf --to hf --output_path model-hf --dtype bf16
  llm-boost convert --input_path qwen2.5-0.5b --to packed --output_path qwen-int4 --dtype int4
"""


@click.command("convert", epilog=_EXAMPLES)
@click.option(
    "--model", metavar="NAME", help="llama, mistral, qwen2, qwen2_5, qwen3, ...; checked (default: found)."
)
@click.option(
    "--input_path",
    required=True,
    metavar="PATH",
    help="The checkpoint: a folder or a file. It stays as it is.",
)
@click.option(
    "--output_path",
    required=True,
    metavar="PATH",
    help="Where the result goes: a file, or for hf and packed a folder.",
)
@click.option(
    "--dtype", metavar="TYPE", help="fp32, bf16 or fp16; packed: fp32, bf16, int8, int4 (default: as stored)."
)
@click.option("--from", "from_", type=click.Choice(SOURCES), help="What the input must be (default: found).")
@click.option(
    "--to",
    type=click.Choice(FORMATS),
    help="The output's format (default: by --reversed or its suffix, else mindspore-ckpt).",
)
@click.option("--reversed", "reversed_", is_flag=True, help="To Hugging Face, as --to hf.")
@click.option(
    "--gguf_type",
    type=click.Choice(GGUF_TYPES, case_sensitive=False),
    metavar="|".join(GGUF_TYPES),
    help="Type of GGUF's matrices.",
)
@click.option(
    "--qkv_concat",
    type=BOOL_TEXT,
    is_flag=False,
    flag_value=True,
    default=False,
    help="MindSpore: q, k, v and gate, up are one.",
)
@click.option(
    "--qkv_layout",
    type=click.Choice(LAYOUTS),
    metavar="|".join(LAYOUTS),
    help="The order of their rows (default: as MindFormers writes the model's).",
)
@click.option(
    "--config_path", metavar="FILE", help="An llm_boost YAML or a config.json, for weights without one."
)
@click.option(
    "--is_lora",
    type=BOOL_TEXT,
    is_flag=False,
    flag_value=True,
    default=False,
    help="The input is a LoRA adapter.",
)
@click.option("--max_shard_size", metavar="SIZE", help="Of Hugging Face's files (default: 5GB).")
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="For packing (default: the processor's cores).",
)
@click.option("--json", "as_json", is_flag=True, help="The result as a JSON object on stdout.")
def convert_command(
    model: str | None,
    input_path: str,
    output_path: str,
    dtype: str | None,
    from_: str | None,
    to: str | None,
    reversed_: bool,
    gguf_type: str | None,
    qkv_concat: bool,
    qkv_layout: str | None,
    config_path: str | None,
    is_lora: bool,
    max_shard_size: str | None,
    threads: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Convert a checkpoint between Hugging Face, MindSpore, GGUF and packed weights.

    Memory stays bounded whatever the model's size. The output appears under its name when it is complete, on
    the disk, and has been read back and compared.
    """
    source, output = Path(input_path).expanduser(), Path(output_path).expanduser()
    to = _target(to, reversed_, output)
    _refuse_idle(
        to,
        {
            "gguf": ("gguf_type", gguf_type),
            "packed": ("threads", threads),
            "hf": ("max_shard_size", max_shard_size),
        },
    )
    hf_config = read_hf_config(config_path)
    from llm_boost.checkpoint.parallel.split_weights import rank_folders
    from llm_boost.convert.convert import Options, convert, convert_ranks

    with ProgressBar("converting") as bar:
        if is_lora:
            from llm_boost.convert.lora import convert_adapter

            if from_ or qkv_concat or qkv_layout or config_path or max_shard_size:
                raise ConfigError("--is_lora: of an adapter --model, --dtype and --reversed or --to say all")
            result = convert_adapter(source, output, to, dtype, model)
        elif qkv_concat and to == "mindspore-ckpt" and len(rank_folders(source)) > 1:
            if from_ not in (None, "mindspore-ckpt"):
                raise ConfigError(f"--from: got {from_}, but {source} holds rank folders of MindSpore's")
            result = convert_ranks(source, output, hf_config, qkv_layout, dtype, bar)
        else:
            opened, layout = _open(source, from_, model, hf_config, qkv_concat, qkv_layout, to)
            options = Options(
                to,
                dtype,
                gguf_type and gguf_type.upper(),
                layout,
                _bytes(max_shard_size or "5GB"),
                threads or _cores(),
            )
            result = convert(opened, output, options, bar)
    _show(result, as_json)


def _open(
    path: Path,
    from_: str | None,
    model: str | None,
    hf_config: dict[str, Any] | None,
    concat: bool,
    layout: str | None,
    to: str,
) -> tuple[Source, str | None]:
    """The source, and the layout of the concatenated weights to be written (None: apart).

    With --qkv_concat and a MindSpore target the layout is the output's, else that of a MindSpore input.
    """
    from llm_boost.convert.convert import default_layout
    from llm_boost.convert.source import MODELS, open_source

    if concat and to.startswith("mindspore"):
        source = open_source(path, from_=from_, model=model, hf_config=hf_config)
        return source, layout or default_layout(source.model_type)
    if concat and layout is None:
        if model is None:
            raise ConfigError("--qkv_concat: to take weights apart, give --model or --qkv_layout too")
        layout = default_layout(MODELS.get(model, ("",))[0])
    return open_source(path, from_=from_, model=model, hf_config=hf_config, qkv_layout=layout), None


def _refuse_idle(to: str, flags: dict[str, tuple[str, object]]) -> None:
    """A flag of another target would have no effect."""
    for target, (flag, value) in flags.items():
        if value is not None and to != target:
            raise ConfigError(f"--{flag}: is for --to {target}, the target is {to}")


def _target(to: str | None, reversed_: bool, output: Path) -> str:
    if reversed_ and to not in (None, "hf"):
        raise ConfigError(f"--reversed: means --to hf, and --to is {to}; give one")
    return to or ("hf" if reversed_ else _BY_SUFFIX.get(output.suffix, "mindspore-ckpt"))


def read_hf_config(path: str | None) -> dict[str, Any] | None:
    """config.json's keys, from one or from an llm_boost YAML."""
    if path is None:
        return None
    if path.endswith(".json"):
        from llm_boost.checkpoint.fields import read_json_object

        return read_json_object(Path(path).expanduser())
    from llm_boost.config.llm_boost_yaml import read_llm_boost_yaml
    from llm_boost.config.shapes import to_hf_config

    return to_hf_config(read_llm_boost_yaml(path))


def _bytes(size: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", size.strip().upper())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--max_shard_size: got {size!r}, allowed: a size as 5GB, 500MB or 2GiB")
    return max(1, int(float(match[1]) * _UNITS[match[2] or ""]))


def _cores() -> int:
    from llm_boost.engine.hardware import default_threads

    return default_threads()


def _show(result: Result, as_json: bool) -> None:
    rate = result.nbytes / 1e6 / max(result.seconds, 1e-9)
    if as_json:
        figures = {**dataclasses.asdict(result), "path": str(result.path), "bytes": result.nbytes}
        del figures["nbytes"]
        click.echo(json.dumps(figures | {"mb_per_second": round(rate, 1)}))
        return
    note(
        f"{result.format}: {result.tensors} tensors, {result.nbytes / 1e6:.1f} MB in {result.dtype}, "
        f"written and verified in {result.seconds:.1f} s ({rate:.0f} MB/s)"
    )
    click.echo(result.path)
