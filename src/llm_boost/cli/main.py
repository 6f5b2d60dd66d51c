"""The console entry: verbs imported when called, and errors that end in one line and an exit code."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from llm_boost.cli.options import note
from llm_boost.errors import LLMBoostError
from llm_boost.suggest import did_you_mean

_VERBS = {  # verb: (module with a click command of the verb's name and suffix _command, one line of help)
    "predict": ("llm_boost.cli.predict", "Complete prompts, or answer them with --chat."),
    "chat": ("llm_boost.cli.chat", "Talk with a model in the terminal."),
    "serve": (
        "llm_boost.cli.serve",
        "A model behind HTTP: MindIE's, TGI's, OpenAI's and Triton's endpoints.",
    ),
    "pull": ("llm_boost.cli.pull", "Fetch a model into the cache."),
    "convert": ("llm_boost.cli.convert", "A checkpoint in another format: Hugging Face, MindSpore, GGUF."),
    "quantize": ("llm_boost.cli.quantize", "A model in int4 or int8, calibrated on a text."),
    "inspect": ("llm_boost.cli.inspect", "What a checkpoint is; whether two hold the same."),
    "strategy": ("llm_boost.cli.strategy", "How a model lies on N ranks, as MindSpore's strategy files."),
    "transform": ("llm_boost.cli.transform", "Split, merge or re-split a checkpoint among ranks."),
    "eval": ("llm_boost.cli.eval", "Perplexity of a text, and KL divergence from a reference dtype."),
    "bench": ("llm_boost.cli.bench", "Speed of a model, of many prompts, or of the kernels."),
    "doctor": ("llm_boost.cli.doctor", "What this machine can do, and what that means for speed."),
}
_EPILOG = """\b
Examples:
  llm-boost pull smollm2-135m-instruct
  llm-boost predict --model smollm2-135m-instruct --chat "What is a prime number?"
  llm-boost VERB --help
"""


class _LazyGroup(click.Group):
    """Imports a verb's module when the verb is called; help is listed from the table above."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        command: click.Command = getattr(import_module(_VERBS[cmd_name][0]), f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in _VERBS:
            raise click.UsageError(
                f"no verb {args[0]!r}{did_you_mean(args[0], _VERBS)} (verbs: {', '.join(_VERBS)})"
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, line) for verb, (_, line) in _VERBS.items()])


def _show_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from llm_boost import __version__

        click.echo(f"llm-boost {__version__}")
        context.exit()


@click.group(
    cls=_LazyGroup,
    epilog=_EPILOG,
    subcommand_metavar="VERB [ARGS]...",
    context_settings={
        "help_option_names": ["-h", "--help"],
        # --predict_data and --predict-data are the same flag
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "max_content_width": 110,
    },
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show it."
)
@click.option(
    "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error (works anywhere)."
)
def cli() -> None:
    """LLM Boost: fast LLM inference on CPUs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 failed, 2 wrong input, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = _take_debug(args)
    _prepare_streams()
    with warnings.catch_warnings():
        warnings.showwarning = _note_warning
        return _run(args, debug)


def _run(args: list[str], debug: bool) -> int:
    try:
        with cli.make_context("llm-boost", args or ["--help"]) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _report("interrupted", 130, debug)
    except BrokenPipeError:
        # The reader has gone; neither a message nor the interpreter's own flush at exit may follow.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except click.ClickException as error:
        return _report(error.format_message(), error.exit_code, debug)
    except LLMBoostError as error:
        return _report(str(error), error.exit_code, debug)
    except OSError as error:
        where = error.filename or "input or output"
        return _report(f"{where}: {error.strerror or error}", 1, debug)
    except Exception as error:
        hint = "" if debug else " (run again with --debug for the traceback)"
        return _report(f"{type(error).__name__}: {error}{hint}", 1, debug)


def _prepare_streams() -> None:
    """A closed stream is one that nobody reads; a character that a terminal lacks is shown as `?`."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - it lives as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _note_warning(message: Warning | str, *where: Any, **line: Any) -> None:
    """A warning is for the user, who has no use for the line of code that it came from."""
    note(f"warning: {' '.join(str(message).split())}")


def _take_debug(args: list[str]) -> bool:
    """Removes --debug, wherever it stands before a `--`, and says whether it was there."""
    end = args.index("--") if "--" in args else len(args)
    kept = [arg for arg in args[:end] if arg != "--debug"]
    found = len(kept) < end
    args[:end] = kept
    return found


def _report(message: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    click.echo(f"llm-boost: error: {' '.join(message.split())}", err=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
