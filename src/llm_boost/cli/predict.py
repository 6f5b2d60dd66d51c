"""`llm-boost predict`: prompts in, completions out, with the flags of MindFormers' run_llm_boost.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from llm_boost.cli.load import build_llm, naming_origins
from llm_boost.cli.options import (
    BOOL_TEXT,
    cache_options,
    model_options,
    note,
    sampling,
    sampling_options,
    speculative_options,
)
from llm_boost.cli.prompts import Prompt, argument_prompts, check_not_empty, read_prompt_file
from llm_boost.cli.strategy import save_strategy_of_run, wants_strategy
from llm_boost.cli.throughput import decode_speed, print_throughput
from llm_boost.errors import ConfigError, EngineError, RequestError

if TYPE_CHECKING:
    from llm_boost import LLM, RequestOutput, SamplingParams
    from llm_boost.config.llm_boost_yaml import LlmBoostYaml
    from llm_boost.config.run_config import Resolved, RunConfig
    from llm_boost.engine.prompts import Prompt as EnginePrompt

DEFAULT_NEW_TOKENS = 256  # when neither a flag nor a file bounds the length
DEFAULT_SAVE_FILE = "results.txt"
_EXAMPLES = """\b
Examples:
  llm-boost predict --model smollm2-135m-instruct "The capital of France is"
  llm-boost predict --model DIR --chat --temperature 0.7 "Write a haiku about rain"
  llm-boost predict --model model.gguf --predict_file prompts.jsonl --json > answers.jsonl
  llm-boost predict --config_path configs/predict_qwen2_7b_instruct_llm_boost.yaml \\
      --load_checkpoint DIR --predict_data "I love Beijing, because" --batch_size 4
Flags outrank LLM_BOOST_* variables, these the YAML file, and this the model's generation_config.json.
Dashes do as well as underscores: --max-new-tokens.
"""


@click.command("predict", epilog=_EXAMPLES)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@model_options
@cache_options
@speculative_options
@click.option(
    "--predict_data", multiple=True, metavar="TEXT", help="A prompt whose output repeats it. Repeatable."
)
@click.option(
    "--predict_file", metavar="FILE", help="Prompts, one a line, or one JSON object a line (.jsonl)."
)
@click.option(
    "--chat", is_flag=True, help="Answer the prompts as a user's messages, with the model's template."
)
@click.option("--system", metavar="TEXT", help="A system message before the user's, with --chat.")
@click.option(
    "--max_new_tokens", type=int, metavar="N", help=f"Longest continuation (default {DEFAULT_NEW_TOKENS})."
)
@click.option("--max_decode_length", type=int, metavar="N", help="Longest prompt and continuation together.")
@click.option("--seq_length", type=int, metavar="N", help="Tokens that a sequence can hold.")
@click.option(
    "--batch_size", type=int, metavar="N", help="Repeat one prompt N times; run several N at a time."
)
@sampling_options
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End the continuation before this text. Repeatable."
)
@click.option("--ignore_eos", is_flag=True, help="Do not stop at the end-of-sequence token.")
@click.option(
    "--stream/--no-stream", default=None, help="Print text as it is made (default: if one sequence runs)."
)
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object a sequence on stdout, and nothing else."
)
@click.option(
    "--save_file",
    metavar="FILE",
    help=f"One output a line ({DEFAULT_SAVE_FILE} with YAML or --predict_data).",
)
@click.option("--config_path", "--config", metavar="FILE", help="An llm_boost YAML file.")
@click.option("--load_checkpoint", metavar="DIR|GGUF|NAME", help="The same as --model.")
@click.option(
    "--vocab_file", metavar="FILE", help="vocab.json, or tokenizer.model, instead of the model's own."
)
@click.option("--merges_file", metavar="FILE", help="merges.txt, instead of the model's own.")
@click.option("--use_parallel", type=BOOL_TEXT, help="Run on the ranks of the YAML file (one, so far).")
@click.option("--device_num", type=int, metavar="N", help="Ranks (1, so far; any with --only_save_strategy).")
@click.option("--device_id", type=int, metavar="N", help="0 or -1: the processor.")
@click.option(
    "--only_save_strategy",
    type=BOOL_TEXT,
    help="Write output/strategy for the ranks, and end (see llm-boost strategy).",
)
@click.option(
    "--src_strategy_path_or_dir",
    "--src_strategy",
    "src_strategy",
    metavar="PATH",
    help="The strategy of a checkpoint in rank folders (default: its manifests, or strategy/ beside it).",
)
@click.option(
    "--auto_trans_ckpt", type=BOOL_TEXT, help="Merge a checkpoint in rank folders as it is read (default)."
)
@click.option(
    "--measure_throughput", type=BOOL_TEXT, default=False, help="Measure batches of 1 and 4 instead."
)
def predict_command(
    prompts: tuple[str, ...],
    predict_data: tuple[str, ...],
    predict_file: str | None,
    chat: bool,
    system: str | None,
    stream: bool | None,
    as_json: bool,
    save_file: str | None,
    config_path: str | None,
    measure_throughput: bool,
    **flags: Any,
) -> None:
    """Complete each PROMPT, or answer it with --chat."""
    yaml_config = _read_yaml(config_path) if config_path else None
    if wants_strategy(flags, yaml_config):
        save_strategy_of_run(flags, yaml_config)
        return
    resolved = _resolve(yaml_config, flags)
    if measure_throughput:
        if prompts or predict_data or predict_file:
            raise ConfigError("--measure_throughput True runs random tokens: leave the prompts out")
        llm = build_llm(resolved)
        _show_notes(resolved)
        print_throughput(llm, resolved.config, as_json=as_json)
        return
    wanted = _wanted_prompts(prompts, predict_data, predict_file, chat, system)
    batch_size, stream = _batching(resolved.config.batch_size, len(wanted), stream, as_json)
    if save_file is None and (config_path or predict_data):
        save_file = DEFAULT_SAVE_FILE
    if save_file is not None:
        _check_writable(Path(save_file))
    if len(wanted) == 1:
        wanted *= resolved.config.batch_size or 1
    llm = build_llm(resolved)
    _show_notes(resolved)
    with naming_origins(resolved):
        requests = [_request(llm, resolved.config, prompt) for prompt in wanted]
    outputs: list[RequestOutput] = []
    for batch in (requests[i : i + batch_size] for i in range(0, len(requests), batch_size)):
        for request, output in zip(batch, _run(llm, batch, stream), strict=True):
            _print(request, output, len(outputs), stream, as_json)
            outputs.append(output)
    if save_file is not None:
        _save(Path(save_file), [r.echo + o.outputs[0].text for r, o in zip(requests, outputs, strict=True)])
    note(_figures(llm, outputs))


class _Request(NamedTuple):
    prompt: Prompt
    token_ids: list[int]
    echo: str  # what the output starts with: the prompt, or nothing
    params: SamplingParams


def _resolve(yaml_config: LlmBoostYaml | None, flags: dict[str, Any]) -> Resolved:
    from llm_boost.config.run_config import resolve

    flags["stop"] = flags["stop"] or None
    flags["ignore_eos"] = flags["ignore_eos"] or None
    return resolve(flags, yaml_config)


def _show_notes(resolved: Resolved) -> None:
    """Once the model is loaded: an input that is refused ends in its one line alone."""
    for line in resolved.notes:
        note(f"note: {line}")


def _read_yaml(path: str) -> LlmBoostYaml:
    from llm_boost.config.llm_boost_yaml import read_llm_boost_yaml

    return read_llm_boost_yaml(path)


def _wanted_prompts(
    positional: Sequence[str],
    predict_data: Sequence[str],
    predict_file: str | None,
    chat: bool,
    system: str | None,
) -> list[Prompt]:
    wanted = argument_prompts(predict_data, positional)
    if predict_file is not None:
        wanted += read_prompt_file(predict_file)
    if not wanted:
        raise RequestError("no prompt: give one, or --predict_data TEXT, or --predict_file FILE")
    check_not_empty(wanted)
    if system is not None and not chat and not any(prompt.messages for prompt in wanted):
        raise ConfigError("--system: needs --chat, since a plain prompt has no system message")
    return [prompt.as_chat(system) if chat or prompt.messages else prompt for prompt in wanted]


def _batching(batch_size: int | None, prompts: int, stream: bool | None, as_json: bool) -> tuple[int, bool]:
    """(sequences at a time, whether to stream). Streaming shows one sequence at a time."""
    if stream and as_json:
        raise ConfigError("--stream and --json: give one; JSON objects are written when they are complete")
    if stream and (batch_size or 1) > 1:
        raise ConfigError(
            f"--stream: shows one sequence at a time, and batch_size is {batch_size}; set it to 1"
        )
    at_a_time = batch_size or (1 if stream else prompts)
    if stream is None:
        stream = at_a_time == 1 and not as_json
    return at_a_time, stream


def _request(llm: LLM, config: RunConfig, prompt: Prompt) -> _Request:
    """Checked here, all of them before the first one runs."""
    try:
        if prompt.messages is not None:
            token_ids = llm.tokenizer.encode_chat(prompt.messages)
        else:
            token_ids = llm.tokenizer.encode(prompt.text or "")
        _check_length(len(token_ids), llm.max_model_len)
        params = _params(llm, config, prompt, len(token_ids))
    except RequestError as error:
        reason = str(error).replace("max_tokens:", "max_new_tokens:")  # its name here
        raise RequestError(f"{prompt.where}: {reason}") from None
    return _Request(prompt, token_ids, (prompt.text or "") if prompt.echo else "", params)


def _check_length(prompt_tokens: int, seq_length: int) -> None:
    if prompt_tokens == 0:
        raise RequestError("no tokens: the tokenizer or the chat template makes nothing of it")
    if prompt_tokens >= seq_length:
        raise RequestError(
            f"{prompt_tokens} tokens, and seq_length (prompt and continuation) is {seq_length}: "
            "no token can follow; shorten the prompt or raise --seq_length, as far as the model allows"
        )


def _params(llm: LLM, config: RunConfig, prompt: Prompt, prompt_tokens: int) -> SamplingParams:
    from llm_boost import SamplingParams

    asked = {
        "ignore_eos": config.ignore_eos,
        "stop": config.stop,
        **sampling(llm, config),
        **prompt.sampling,
    }
    if not asked["ignore_eos"]:
        asked["stop_token_ids"] = config.eos_token_ids
    own = asked.pop("max_new_tokens", config.max_new_tokens)
    return SamplingParams(max_tokens=_tokens_left(config, prompt_tokens) if own is None else own, **asked)


def _tokens_left(config: RunConfig, prompt_tokens: int) -> int:
    """Tokens that may follow a prompt when nobody gave their number; the engine bounds them by seq_length."""
    if config.max_decode_length is None:
        return DEFAULT_NEW_TOKENS
    if prompt_tokens >= config.max_decode_length:
        raise RequestError(
            f"{prompt_tokens} tokens, and max_decode_length (prompt and continuation) is "
            f"{config.max_decode_length}: no token can follow; raise it or give --max_new_tokens"
        )
    return config.max_decode_length - prompt_tokens


def _run(llm: LLM, batch: Sequence[_Request], stream: bool) -> Iterator[RequestOutput]:
    if not stream:
        prompts: list[EnginePrompt] = [{"prompt_token_ids": request.token_ids} for request in batch]
        yield from llm.generate(prompts, [request.params for request in batch])
        return
    for request in batch:
        last = None
        try:
            click.echo(request.echo, nl=False)
            for last in llm.stream([{"prompt_token_ids": request.token_ids}], [request.params]):
                click.echo(last.outputs[0].delta, nl=False)
        finally:
            click.echo()  # the text's line ends, and what stderr says of an end before time gets its own
        if last is None:
            raise EngineError("the engine gave no output for a prompt")
        yield last


def _print(request: _Request, output: RequestOutput, index: int, stream: bool, as_json: bool) -> None:
    if output.error is not None:
        raise EngineError(f"prompt {index + 1}: {output.error}")
    completion = output.outputs[0]
    if as_json:
        prompt = request.prompt
        entry = {
            "index": index,
            **({"messages": list(prompt.messages)} if prompt.messages else {"prompt": prompt.text}),
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(request.token_ids),
            "new_tokens": len(completion.token_ids),
        }
        click.echo(json.dumps(entry, ensure_ascii=False))
    elif not stream:
        click.echo(request.echo + completion.text)


def _check_writable(path: Path) -> None:
    """Before the model is loaded, rather than after its work; a run that is refused leaves no file."""
    is_new = not path.exists()
    try:
        with path.open("a"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"--save_file: cannot write {path}: {error.strerror}") from None


def _save(path: Path, texts: Sequence[str]) -> None:
    r"""One output a line: a backslash is written `\\`, a newline `\n`, a carriage return `\r`."""
    lines = (text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") for text in texts)
    try:
        path.touch(0o600)
        path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    except OSError as error:
        raise ConfigError(f"--save_file: cannot write {path}: {error.strerror}") from None


def _figures(llm: LLM, outputs: Sequence[RequestOutput]) -> str:
    """One line: what went in and out, how fast, and on what."""
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    new_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    parts = [f"{prompt_tokens} prompt tokens", f"{new_tokens} new tokens"]
    first = [t for output in outputs if (t := output.metrics.time_to_first_token) is not None]
    if first:
        parts.append(f"first token after {1000 * sum(first) / len(first):.0f} ms")
    speed = decode_speed(outputs)
    if speed is not None:
        parts.append(f"{speed:.1f} tokens/s")
    threads = f"{llm.threads} thread{'' if llm.threads == 1 else 's'}"
    parts.append(f"model {_megabytes(llm.weight_bytes)} ({llm.dtype})")
    parts.append(f"KV cache {llm.kv_cache_tokens} tokens ({llm.kv_cache_bytes / 1e9:.2f} GB)")
    parts += [threads, llm.isa]
    return ", ".join(parts)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e6:.2f} MB"
