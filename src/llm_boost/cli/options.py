"""What several verbs share: types and flags of the command line, and lines on stderr."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

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
_THREADS = click.option("--threads", type=int, metavar="N", help="Threads (default: the processor's cores).")
_CACHE_DIR = click.option(
    "--cache_dir", metavar="DIR", help="Packed and pulled models (default: ~/.cache/llm-boost)."
)


def model_options(function: F) -> F:
    """Flags of every verb that loads a model."""
    return _MODEL(_DTYPE(_THREADS(_CACHE_DIR(function))))


def models_options(function: F) -> F:
    """Flags of a verb that compares a model's dtypes; split_dtypes reads `dtypes`."""
    return _MODEL(_DTYPES(_THREADS(_CACHE_DIR(function))))


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


def note(line: str) -> None:
    """One line for the user, on stderr."""
    click.echo(f"llm-boost: {line}", err=True)
