"""`predict --measure_throughput True`: random prompts of several lengths, in batches of 1 and 4."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from llm_boost import LLM, RequestOutput
    from llm_boost.config.run_config import RunConfig
    from llm_boost.engine.prompts import Prompt

BATCH_SIZES = (1, 4)
PROMPT_LENGTHS = (256, 512, 1024, 2048)
WARM_UP_LENGTH = 512


def decode_speed(outputs: Sequence[RequestOutput]) -> float | None:
    """Tokens/s after each sequence's first token, of all sequences together; None when there was one each."""
    spans = [
        (
            output.metrics.first_token_time,
            output.metrics.last_token_time,
            len(output.outputs[0].token_ids) - 1,
        )
        for output in outputs
    ]
    timed = [(first, last, tokens) for first, last, tokens in spans if first is not None and last is not None]
    tokens = sum(tokens for _, _, tokens in timed)
    seconds = _covered([(first, last) for first, last, _ in timed])
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds that lie in at least one span: those of a batch overlap, batches follow one another."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def print_throughput(llm: LLM, config: RunConfig, *, as_json: bool) -> None:
    """Prompts of 256 to 2048 random tokens, continued by as many (or --max_new_tokens, or what fits).

    The ids are drawn as MindFormers draws them, from 1 to 999; end-of-sequence tokens do not stop a run.
    """
    draw = random.Random(config.seed)
    for batch_size in BATCH_SIZES:
        _measure(llm, config, draw, batch_size, min(WARM_UP_LENGTH, llm.max_model_len // 2))
        for length in PROMPT_LENGTHS:
            if length >= llm.max_model_len:
                click.echo(
                    f"batch {batch_size}, prompt {length}: left out, seq_length is {llm.max_model_len}",
                    err=True,
                )
                continue
            row: dict[str, float] = {"batch_size": batch_size, "prompt_tokens": length}
            row |= _measure(llm, config, draw, batch_size, length)
            click.echo(json.dumps(row) if as_json else _line(row), nl=True)


def _measure(
    llm: LLM, config: RunConfig, draw: random.Random, batch_size: int, length: int
) -> dict[str, float]:
    from llm_boost import SamplingParams

    new_tokens = min(length, llm.max_model_len - length, config.max_new_tokens or length)
    largest = min(1000, llm.model_config.vocab_size)
    prompts: list[Prompt] = [
        {"prompt_token_ids": [draw.randrange(1, largest) for _ in range(length)]} for _ in range(batch_size)
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True))
    start = min(output.metrics.arrival_time for output in outputs)
    first = max(output.metrics.first_token_time or start for output in outputs)
    finished = max(output.metrics.finished_time or start for output in outputs)
    return {
        "new_tokens": new_tokens,
        "prefill_tokens_per_second": round(batch_size * length / max(first - start, 1e-9), 2),
        "decode_tokens_per_second": round(decode_speed(outputs) or 0.0, 2),
        "generate_tokens_per_second": round(batch_size * new_tokens / max(finished - start, 1e-9), 2),
        "seconds": round(finished - start, 3),
    }


def _line(row: dict[str, float]) -> str:
    return (
        f"batch {row['batch_size']}, prompt {row['prompt_tokens']}, new {row['new_tokens']} tokens: "
        f"prefill {row['prefill_tokens_per_second']:.1f} tokens/s, "
        f"decode {row['decode_tokens_per_second']:.1f} tokens/s, "
        f"generate speed {row['generate_tokens_per_second']:.1f} tokens/s, total {row['seconds']:.2f} s"
    )
