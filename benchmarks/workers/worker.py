"""What a worker is: one engine with one model, in its own environment, that does what compare.py asks.

    PYTHON run_ENGINE.py MODEL DTYPE THREADS LONGEST BATCH VOCABULARY

compare.py writes a JSON object a line to its standard input and reads one back. Imports numpy alone, since it
runs in every engine's environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

BATCH_PROMPT, BATCH_NEW = 128, 64
ROWS_AT_ONCE = 16  # of the float64 copies


@dataclass(frozen=True)
class Options:
    model: str
    dtype: str
    threads: int
    longest: int  # tokens of prompt and output of a single sequence
    batch: int  # sequences of BATCH_PROMPT + BATCH_NEW tokens; 0: none
    vocabulary: int  # prompts are random ids below


class Engine(Protocol):
    version: str

    def __init__(self, options: Options) -> None: ...

    def single(self, prompt: list[int], new: int) -> tuple[float, float]:
        """Greedy: seconds to the first token, and for `new` tokens after it."""
        ...

    def many(self, prompts: list[list[int]], new: int) -> float | None:
        """Seconds until each prompt has `new` tokens; None where the engine cannot batch."""
        ...

    def logits(self, tokens: list[int]) -> np.ndarray:
        """[tokens - 1, vocabulary]: row i predicts tokens[i + 1]."""
        ...


def serve(make: Callable[[Options], Engine]) -> None:
    answers = _private_stdout()
    model, dtype, *numbers = sys.argv[1:]
    options = Options(model, dtype, *map(int, numbers))
    start = time.perf_counter()
    engine = make(options)
    rng = np.random.default_rng(0)
    engine.single(_prompt(rng, 32, options.vocabulary), 2)
    hello = {"version": engine.version, "load_seconds": time.perf_counter() - start}
    print(json.dumps(hello), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(engine, options, rng, json.loads(line))), file=answers, flush=True)


def _answer(engine: Engine, options: Options, rng: np.random.Generator, asked: dict[str, Any]) -> Any:
    if asked["ask"] == "single":
        prompt, new = asked["prompt"], asked["new"]
        prefill, decode = engine.single(_prompt(rng, prompt, options.vocabulary), new)
        return {f"pp{prompt}": prompt / prefill} | ({f"tg{new}": new / decode} if new > 1 else {})
    if asked["ask"] == "many":
        prompts = [_prompt(rng, BATCH_PROMPT, options.vocabulary) for _ in range(options.batch)]
        seconds = engine.many(prompts, BATCH_NEW)
        return {} if seconds is None else {f"batch{options.batch}": options.batch * BATCH_NEW / seconds}
    if asked["ask"] == "memory":
        return {"peak_memory": peak_memory()}
    windows = np.load(asked["tokens"])  # [windows, tokens]
    if asked["ask"] == "reference":
        np.save(asked["file"], np.stack([engine.logits(w.tolist()) for w in windows]).astype(np.float32))
        return {}
    return quality(engine, windows, np.load(asked["file"], mmap_mode="r"))


def quality(engine: Engine, windows: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Mean KL(reference || engine) in nats, perplexity, and the share of equal likeliest tokens."""
    divergence, loss, same = [], [], []
    for tokens, reference_logits in zip(windows, reference, strict=True):
        logits = engine.logits(tokens.tolist())
        for i in range(0, len(logits), ROWS_AT_ONCE):
            rows = slice(i, i + ROWS_AT_ONCE)
            log_p, log_q = _log_softmax(reference_logits[rows]), _log_softmax(logits[rows])
            targets = tokens[1:][rows]
            divergence += (np.exp(log_p) * (log_p - log_q)).sum(axis=1).tolist()
            loss += (-log_q[np.arange(len(targets)), targets]).tolist()
            same += (log_p.argmax(axis=1) == log_q.argmax(axis=1)).tolist()
    return {
        "kl": float(np.mean(divergence)),
        "perplexity": float(np.exp(np.mean(loss))),
        "same_top": float(np.mean(same)),
        "scored_tokens": len(loss),
    }


def peak_memory() -> int:
    """Bytes that this process has held at most (Linux)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def _prompt(rng: np.random.Generator, length: int, vocabulary: int) -> list[int]:
    return [int(token) for token in rng.integers(10, vocabulary, length)]


def _private_stdout() -> Any:
    """The answers' own descriptor: what engines print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers
