"""What several verbs share: types and flags of the command line, and lines on stderr."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from llm_boost import LLM
    from llm_boost.config.run_config import RunConfig

F = TypeVar("F", bound=Callable[..., Any])


class _BoolText(click.ParamType[bool]):
    """`True` or `False` in any case, as MindFormers' flags take it."""

    name = "boolean text"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "True|False"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        if isinstance(value, bool):
            return value
        if value.lower() not in ("true", "false"):
            self.fail(f"got {value!r}, allowed: True or False", param, ctx)
        return bool(value.lower() == "true")


BOOL_TEXT = _BoolText()


_MODEL = click.option(
    "--model", metavar="DIR|GGUF|NAME", help="Model: a directory, a .gguf file, or a pulled name."
)
_DTYPE = click.option(
    "--dtype", metavar="TYPE", help="float32 (fp32), bfloat16 (bf16), int8, int4, or auto (the default)."
)
_DTYPES = click.option(
    "--dtype",
    "dtypes",
    metavar="TYPE,...",
    multiple=True,
    help="float32 (fp32), bfloat16 (bf16), int8, int4, or auto (the default); several take turns.",
)
_KV_CACHE_DTYPE = click.option(
    "--kv_cache_dtype",
    type=click.Choice(["auto", "float32", "int16", "int8"]),
    help="Of the KV cache (default: int16; float32 for float32 weights).",
)
_THREADS = click.option("--threads", type=int, metavar="N", help="Threads (default: the processor's cores).")
_CACHE_DIR = click.option(
    "--cache_dir", metavar="DIR", help="Packed and pulled models (default: ~/.cache/llm-boost)."
)


def model_options(function: F) -> F:
    """Flags of every verb that loads a model."""
    return _MODEL(_DTYPE(_KV_CACHE_DTYPE(_THREADS(_CACHE_DIR(function)))))


def models_options(function: F) -> F:
    """Flags of a verb that compares a model's dtypes; split_dtypes reads `dtypes`."""
    return _MODEL(_DTYPES(_KV_CACHE_DTYPE(_THREADS(_CACHE_DIR(function)))))


def split_dtypes(dtypes: Sequence[str]) -> list[str | None]:
    """`--dtype int8,int4`, or the flag repeated: each once, in order; [None] where nobody said."""
    return list(dict.fromkeys(name for given in dtypes for name in given.split(","))) or [None]


def cache_options(function: F) -> F:
    """Flags of the verbs that answer prompts."""
    return click.option(
        "--kv_cache_memory",
        metavar="SIZE",
        help="Memory for keys and values, as 2GB (default: what is needed and can be spared).",
    )(function)


def speculative_options(function: F) -> F:
    """Flags that guess tokens ahead; no text changes by them."""
    for decorate in reversed(
        [
            click.option(
                "--speculative_method",
                metavar="METHOD",
                help="Guess tokens ahead: ngram (text that repeats its prompt), or draft_model.",
            ),
            click.option(
                "--speculative_model",
                metavar="DIR|GGUF|NAME",
                help="A smaller model that guesses (draft_model).",
            ),
            click.option(
                "--speculative_tokens", type=int, metavar="N", help="At most N guesses a step (default 10)."
            ),
            click.option(
                "--speculative_lookup_min", type=int, metavar="N", help="ngram: tokens that must match (2)."
            ),
            click.option(
                "--speculative_lookup_max", type=int, metavar="N", help="ngram: tokens that are compared (4)."
            ),
        ]
    ):
        function = decorate(function)
    return function


def sampling_options(function: F) -> F:
    """Flags that choose tokens."""
    for decorate in reversed(
        [
            click.option("--do_sample", type=BOOL_TEXT, help="Sample, or take the likeliest token."),
            click.option(
                "--temperature",
                type=float,
                metavar="X",
                help="0 is greedy; a sampling flag turns sampling on.",
            ),
            click.option(
                "--top_k", type=int, metavar="N", help="Sample from the N likeliest tokens; 0: from all."
            ),
            click.option(
                "--top_p",
                type=float,
                metavar="X",
                help="Sample from the likeliest tokens that hold this probability.",
            ),
            click.option(
                "--min_p",
                type=float,
                metavar="X",
                help="Sample from tokens this likely, relative to the likeliest.",
            ),
            click.option("--repetition_penalty", type=float, metavar="X", help="Above 1 repeats less."),
            click.option("--seed", type=int, metavar="N", help="Of sampling (default 0)."),
        ]
    ):
        function = decorate(function)
    return function


def sampling(llm: LLM, config: RunConfig) -> dict[str, Any]:
    """What flags and files say of sampling, over the model's generation_config.json; else greedy."""
    from llm_boost import SamplingParams

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    model = llm.default_sampling_params()
    if model == SamplingParams():
        model = SamplingParams(temperature=0.0)
    asked = {**{name: getattr(model, name) for name in names}, **config.sampling()}
    if config.do_sample and config.temperature is None and asked["temperature"] == 0:
        asked["temperature"] = 1.0
    return asked


def note(line: str) -> None:
    """One line for the user, on stderr."""
    click.echo(f"llm-boost: {line}", err=True)
