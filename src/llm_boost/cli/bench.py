"""`llm-boost bench`: what a model and the kernels reach of what the machine can do."""

from __future__ import annotations

from importlib import import_module

import click

_COMMANDS = {  # name: what it measures; each has a module cli/bench_NAME.py with a command NAME_command
    "latency": "Prefill and decode of the engine's step, in llama-bench's rows.",
    "throughput": "Many prompts at once, through the whole engine.",
    "kernels": "Each kernel beside its limit, for every instruction set.",
}
_EXAMPLES = """\b
Examples:
  llm-boost bench latency --model DIR --dtype int8,int4
  llm-boost bench throughput --model DIR --input_len 128 --output_len 64 --num_prompts 16
  llm-boost bench kernels --isa all
"""


class _Benches(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(
            import_module(f"llm_boost.cli.bench_{cmd_name}"), f"{cmd_name}_command"
        )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group("bench", cls=_Benches, epilog=_EXAMPLES, invoke_without_command=True)
@click.pass_context
def bench_command(context: click.Context) -> None:
    """Measure speed beside what this machine could do at most."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
