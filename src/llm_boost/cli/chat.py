"""`llm-boost chat`: a conversation in the terminal, or one message a line from a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_boost.cli.conversation import Conversation
from llm_boost.cli.load import build_llm, naming_origins
from llm_boost.cli.options import cache_options, model_options, note, sampling, sampling_options
from llm_boost.errors import ConfigError, InputError
from llm_boost.suggest import did_you_mean

if TYPE_CHECKING:
    from llm_boost import LLM, RequestOutput
    from llm_boost.config.run_config import RunConfig

ROOM_FOR_ANSWER = 4  # the history gives way before less than this part of the context is left
_PROMPT, _CONTINUED = "> ", ". "
_EXAMPLES = """\b
Examples:
  llm-boost chat smollm2-135m-instruct
  llm-boost chat path/to/model --dtype int8 --system "Answer in one sentence." --stats
  echo "What is a prime number?" | llm-boost chat model.gguf --temperature 0
In the chat, /help lists the commands, and Ctrl-C stops an answer.
"""
_COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation; the system message stays",
    "/system": "show the system message; /system TEXT sets it, /system - removes it",
    "/save": "/save FILE writes the conversation as a line of JSON that predict --predict_file takes",
    "/stats": "figures of the last answer, and how full the context is",
    "/exit": "leave (so does Ctrl-D)",
}
_HELP = (
    *(f"  {name:<8} {text}" for name, text in _COMMANDS.items()),
    "  A line that ends with \\ goes on in the next. A message that begins with a slash: //text.",
    "  Ctrl-C stops an answer; what there is of it stays in the conversation.",
)


@click.command("chat", epilog=_EXAMPLES)
@click.argument("model_name", required=False, metavar="[MODEL]")
@model_options
@cache_options
@click.option("--system", metavar="TEXT", help="A system message, before the first of yours.")
@click.option("--max_new_tokens", type=int, metavar="N", help="Longest answer (default: what fits).")
@click.option("--seq_length", type=int, metavar="N", help="Tokens of the context: history and answer.")
@sampling_options
@click.option("--stats", is_flag=True, help="Figures after each answer, on stderr.")
def chat_command(model_name: str | None, system: str | None, stats: bool, **flags: Any) -> None:
    """Talk with MODEL (a directory, a .gguf file, a pulled name). Reads standard input when it is piped."""
    from llm_boost.config.run_config import resolve

    if model_name is not None and flags["model"] is not None:
        raise ConfigError("--model: the model is given twice; leave one out")
    resolved = resolve({**flags, "model": model_name or flags["model"]})
    llm = build_llm(resolved)
    if llm.tokenizer.chat_template is None:
        raise ConfigError("this model has no chat template: complete texts with `llm-boost predict` instead")
    for line in resolved.notes:
        note(f"note: {line}")
    with naming_origins(resolved):
        _Chat(llm, resolved.config, Conversation(system), always_stats=stats).run()


class _Chat:
    """Reads, answers, obeys commands, until the input ends."""

    def __init__(
        self, llm: LLM, config: RunConfig, conversation: Conversation, *, always_stats: bool
    ) -> None:
        self._llm = llm
        self._config = config
        self._sampling = sampling(llm, config)
        self._conversation = conversation
        self._always_stats = always_stats
        self._last: RequestOutput | None = None
        self._is_terminal = sys.stdin.isatty()

    def run(self) -> None:
        if self._is_terminal:
            llm = self._llm
            note(f"{llm.dtype}, context of {llm.max_model_len} tokens; /help lists the commands")
        for line in self._lines():
            if not self._take(line):
                return

    def _take(self, line: str) -> bool:
        """Obeys a command or answers a message; False for the command that leaves."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                return self._obey(line)
            if line.strip():
                self._answer(line[1:] if line.startswith("//") else line)
        except InputError as error:  # wrong input ends a pipe; a person is told, and tries again
            if not self._is_terminal:
                raise
            note(str(error))
        return True

    def _lines(self) -> Iterator[str]:
        """The user's messages and commands; one that ends with a backslash goes on in the next line."""
        if self._is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - editing and recall of lines, for input()
        parts: list[str] = []
        while True:
            try:
                line = self._read(_CONTINUED if parts else _PROMPT)
            except EOFError:
                if parts:
                    yield "\n".join(parts)
                if self._is_terminal:
                    click.echo()
                return
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                click.echo()
                note("/exit or Ctrl-D leaves")
                parts.clear()
                continue
            if line.endswith("\\"):
                parts.append(line[:-1])
                continue
            yield "\n".join([*parts, line])
            parts.clear()

    def _read(self, prompt: str) -> str:
        if self._is_terminal:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def _answer(self, question: str) -> None:
        limit = self._llm.max_model_len - 1
        room = max(self._llm.max_model_len // ROOM_FOR_ANSWER, 1)
        if self._config.max_new_tokens is not None:
            room = min(room, self._config.max_new_tokens)
        left_out = self._conversation.num_left_out
        ids = self._conversation.prompt(question, self._llm.tokenizer.encode_chat, max(limit - room, 1))
        if self._conversation.num_left_out > left_out:
            note(
                f"the context is full: the model no longer sees the first {self._conversation.num_left_out} "
                f"of {len(self._conversation)} exchanges"
            )
        answer = self._stream(ids)
        self._conversation.add(question, answer)
        if self._always_stats:
            self._show_stats()

    def _stream(self, ids: list[int]) -> str:
        """Prints an answer as it is made, until it ends or Ctrl-C ends it; the answer."""
        from llm_boost import SamplingParams

        params = SamplingParams(max_tokens=self._config.max_new_tokens, **self._sampling)
        answer = ""
        with (
            _interruptible(self._is_terminal) as interrupted,
            contextlib.closing(self._llm.stream([{"prompt_token_ids": ids}], params)) as outputs,
        ):
            try:
                for output in outputs:
                    self._last = output
                    answer = output.outputs[0].text
                    click.echo(output.outputs[0].delta, nl=False)
                    sys.stdout.flush()
                    if interrupted:
                        break
            finally:
                click.echo()
        if interrupted:
            note("stopped")
        elif self._is_terminal and self._last is not None and self._last.outputs[0].finish_reason == "length":
            note("the answer has reached its longest length (--max_new_tokens, or the context)")
        return answer

    def _obey(self, line: str) -> bool:
        """Carries out a command; False for the one that leaves."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit", "/bye"):
            return False
        if name == "/help":
            for text in _HELP:
                click.echo(text, err=True)
        elif name == "/reset":
            self._conversation.reset()
            note("the conversation is forgotten")
        elif name == "/system":
            if rest:
                self._conversation.system = None if rest == "-" else rest
            note(f"system message: {self._conversation.system or 'none'}")
        elif name == "/save":
            if not rest:
                raise ConfigError("/save: needs the name of a file")
            self._conversation.save(Path(rest).expanduser())
            note(f"saved {len(self._conversation)} exchanges to {rest}")
        elif name == "/stats":
            self._show_stats()
        else:
            raise ConfigError(f"no command {name}{did_you_mean(name, _COMMANDS)} (/help lists them)")
        return True

    def _show_stats(self) -> None:
        if self._last is None:
            note("no answer yet")
            return
        prompt, new = len(self._last.prompt_token_ids), len(self._last.outputs[0].token_ids)
        cached = self._last.num_cached_tokens
        parts = [f"{prompt} prompt tokens ({cached} of them cached)", f"{new} new tokens"]
        metrics = self._last.metrics
        if metrics.time_to_first_token is not None:
            parts.append(f"first token after {1000 * metrics.time_to_first_token:.0f} ms")
        if metrics.decode_tokens_per_second is not None:
            parts.append(f"{metrics.decode_tokens_per_second:.1f} tokens/s")
        limit = self._llm.max_model_len
        parts.append(f"context {prompt + new} of {limit} tokens ({100 * (prompt + new) / limit:.0f} %)")
        note(", ".join(parts))


@contextlib.contextmanager
def _interruptible(is_terminal: bool) -> Iterator[list[bool]]:
    """In a terminal the first Ctrl-C only fills the list, and no step of the engine is torn."""
    seen: list[bool] = []
    if not is_terminal:
        yield seen
        return

    def stop(*_: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(True)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
