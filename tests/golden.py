"""Golden checkpoints: where they are, what transformers computed, and a way to feed a runner by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm_boost.engine.batch import Batch, ModelRunner

HERE = Path(__file__).parent
GOLDEN_MODELS = ("llama", "llama3", "qwen2", "qwen3", "mistral")
PROMPT_LENGTHS = (1, 17, 300)
NEW_TOKENS = 32

Logits = NDArray[np.float32]
LoadRunner = Callable[[str, str], ModelRunner]  # of a golden checkpoint and a dtype; a fixture in conftest.py


def model_dir(name: str) -> Path:
    return HERE / "golden_models" / name


@dataclass(frozen=True)
class Golden:
    """A prompt and what transformers makes of it in float32."""

    prompt: list[int]
    greedy: list[int]  # the next 32 tokens
    logits: Logits  # [rows, vocab] of the prompt's last rows; all of them for a short prompt


def load_golden(name: str, length: int) -> Golden:
    with np.load(HERE / "goldens" / f"{name}.npz") as arrays:
        return Golden(
            arrays[f"prompt_{length}"].tolist(),
            arrays[f"greedy_{length}"].tolist(),
            arrays[f"logits_{length}"],
        )


class Sequences:
    """Sequences in a runner's cache without a scheduler: each owns its blocks, scattered over the cache."""

    def __init__(self, runner: ModelRunner, prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS):
        self.runner = runner
        self.prompt_lens = [len(prompt) for prompt in prompts]
        self.lengths = [0] * len(prompts)
        needs = [-(-(length + new_tokens) // runner.block_size) for length in self.prompt_lens]
        assert sum(needs) <= runner.num_blocks, f"{sum(needs)} blocks wanted of {runner.num_blocks}"
        order = np.random.default_rng(0).permutation(runner.num_blocks)[: sum(needs)]
        self.tables = np.full((len(prompts), max(needs)), -1, np.int32)
        for table, blocks in zip(self.tables, np.split(order, np.cumsum(needs)[:-1]), strict=True):
            table[: len(blocks)] = blocks

    def forward(self, new_tokens: Mapping[int, Sequence[int]]) -> dict[int, Logits]:
        """Appends tokens to some sequences in one step; the logits of the new tokens, [n, vocab] each."""
        chosen = list(new_tokens)
        counts = [len(new_tokens[i]) for i in chosen]
        for i, count in zip(chosen, counts, strict=True):
            self.lengths[i] += count
        starts = np.cumsum([0, *counts])
        logits = self.runner.run(
            Batch(
                token_ids=np.concatenate([np.asarray(new_tokens[i], np.int32) for i in chosen]),
                seq_starts=starts.astype(np.int32),
                context_lens=np.array([self.lengths[i] for i in chosen], np.int32),
                prompt_lens=np.array([self.prompt_lens[i] for i in chosen], np.int32),
                block_tables=np.ascontiguousarray(self.tables[chosen]),
                logit_rows=np.arange(starts[-1], dtype=np.int32),
            )
        )
        return dict(zip(chosen, np.split(logits.copy(), starts[1:-1]), strict=True))

    def greedy(self, logits: Mapping[int, Logits], count: int = NEW_TOKENS) -> dict[int, list[int]]:
        """The likeliest continuations, all sequences decoding together; `logits` end where the prompts do."""
        tokens = {i: [int(rows[-1].argmax())] for i, rows in logits.items()}
        for _ in range(count - 1):
            logits = self.forward({i: chosen[-1:] for i, chosen in tokens.items()})
            for i, rows in logits.items():
                tokens[i].append(int(rows[-1].argmax()))
        return tokens


def relative_error(got: Logits, want: Logits) -> float:
    """The largest difference in a row over the row's largest logit, worst row."""
    assert got.shape == want.shape
    return float((np.abs(got - want).max(-1) / np.abs(want).max(-1)).max())


def mean_kl(got: Logits, want: Logits) -> float:
    """Mean KL divergence of softmax(got) from softmax(want), in nats a row."""

    def log_softmax(logits: Logits) -> NDArray[np.float64]:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    p, q = log_softmax(want), log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(-1).mean())
