"""What many prompts offline are made of: tokens in, and how many may come out."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.errors import RequestError

SHORTEST = 4  # tokens of a ShareGPT prompt or answer; below, a conversation says nothing (as in vLLM)
FIRST_ORDINARY_TOKEN = 10  # the ids before are often special


@dataclass(frozen=True)
class Job:
    prompt_token_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, drawn evenly from `low` to `high`."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


def synthetic(
    count: int,
    prompt: Lengths,
    output: Lengths,
    vocab_size: int,
    *,
    seed: int,
    temperature: float = 0.0,
    ignore_eos: bool = True,
) -> list[Job]:
    """Random tokens; the same seed gives the same jobs."""
    rng = random.Random(seed)
    first = min(FIRST_ORDINARY_TOKEN, vocab_size - 1)
    jobs = []
    for _ in range(count):
        ids = [rng.randrange(first, vocab_size) for _ in range(prompt.draw(rng))]
        new_tokens = output.draw(rng)
        jobs.append(
            Job(ids, SamplingParams(temperature=temperature, max_tokens=new_tokens, ignore_eos=ignore_eos))
        )
    return jobs


def sharegpt(
    path: Path,
    encode: Callable[[str], list[int]],
    *,
    count: int | None,
    output: Lengths | None,
    max_model_len: int,
    seed: int,
    temperature: float = 0.0,
    ignore_eos: bool = True,
) -> list[Job]:
    """The first question of each conversation, for as many tokens as its answer has (or `output` says).

    Conversations are taken in an order that the seed decides, until `count` are found; those too short, or
    longer than the model, are passed over.

    Raises:
        RequestError: the file is not ShareGPT's JSON, or no conversation in it will do.
    """
    rng = random.Random(seed)
    conversations = _first_turns(path)
    rng.shuffle(conversations)
    jobs: list[Job] = []
    for question, answer in conversations:
        if len(jobs) == count:
            break
        ids = encode(question)
        new_tokens = output.draw(rng) if output else len(encode(answer))
        if min(len(ids), new_tokens) >= SHORTEST and len(ids) + new_tokens <= max_model_len:
            params = SamplingParams(temperature=temperature, max_tokens=new_tokens, ignore_eos=ignore_eos)
            jobs.append(Job(ids, params))
    if not jobs:
        raise RequestError(
            f"{path}: no conversation of {SHORTEST} tokens or more that fits the model's {max_model_len}"
        )
    return jobs


def _first_turns(path: Path) -> list[tuple[str, str]]:
    """(question, answer) of each conversation that begins with these."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: cannot read the file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, list):
        raise RequestError(f'{path}: got {type(content).__name__}, allowed: a list of {{"conversations"}}')
    return list(_turns(content))


def _turns(entries: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for entry in entries:
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or len(turns) < 2:
            continue
        values = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
        if isinstance(values[0], str) and isinstance(values[1], str) and turns[0].get("from") != "gpt":
            yield values[0], values[1]
