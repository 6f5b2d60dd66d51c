"""Perplexity of a text, and how far a quantised model is from its reference.

Perplexity is exp of the mean negative log-likelihood of the scored tokens. The divergence is
KL(reference || model) in nats, the mean over the same positions. Both depend on the protocol: windows of
`context` tokens that start `stride` tokens apart, each scoring what no window before it has scored, with or
without a beginning-of-sequence token in front of each. Figures of different protocols cannot be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm_boost.engine.batch import Batch, FloatArray, ModelRunner
from llm_boost.errors import ConfigError, EngineError, RequestError

PIECE_TOKENS = 64  # tokens of a step: bounds the logits in memory to this many rows
_ROWS_AT_ONCE = 8  # of the float64 copies


@dataclass(frozen=True)
class Protocol:
    """`context` counts the beginning-of-sequence token `bos` (None: there is none)."""

    context: int = 512
    stride: int = 512
    bos: int | None = None

    def __post_init__(self) -> None:
        smallest = 2 if self.bos is None else 3
        if self.context < smallest:
            raise ConfigError(f"context: got {self.context}, allowed: at least {smallest}")
        if not 1 <= self.stride <= self.text_tokens:
            raise ConfigError(f"stride: got {self.stride}, allowed: 1 to {self.text_tokens}")

    @property
    def text_tokens(self) -> int:
        """Tokens of the text in a window."""
        return self.context - (self.bos is not None)


@dataclass(frozen=True)
class Quality:
    """Figures with their standard errors; those against a reference are None without one."""

    windows: int
    scored_tokens: int
    perplexity: float
    perplexity_error: float
    reference_perplexity: float | None = None
    mean_kl: float | None = None  # nats
    mean_kl_error: float | None = None
    same_top: float | None = None  # share of positions whose likeliest token is the reference's


class _Mean:
    """A running mean and its standard error."""

    def __init__(self) -> None:
        self.count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        self.count += values.size
        self._sum += float(values.sum())
        self._squares += float(np.square(values).sum())

    @property
    def value(self) -> float:
        return self._sum / self.count

    @property
    def error(self) -> float:
        variance = max(self._squares / self.count - self.value**2, 0.0)
        return math.sqrt(variance / max(self.count - 1, 1))


def evaluate(
    runner: ModelRunner,
    token_ids: Sequence[int],
    protocol: Protocol,
    reference: ModelRunner | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Scores `token_ids` on `runner` and, step by step beside it, on `reference`.

    The runners must be idle: blocks 0, 1, ... of their caches are overwritten. `progress` gets (windows done,
    windows, what). Raises ConfigError when a window does not fit a runner, RequestError for a text too short.
    """
    runners = [runner] if reference is None else [runner, reference]
    for each in runners:
        _check_fits(each, protocol)
    if reference is not None and reference.vocab_size != runner.vocab_size:
        raise ConfigError(
            f"vocabulary: got {runner.vocab_size} tokens, the reference has {reference.vocab_size}"
        )
    spans = list(windows(len(token_ids), protocol))
    loss, reference_loss, divergence, same = _Mean(), _Mean(), _Mean(), _Mean()
    for done, (start, end, scored_from) in enumerate(spans):
        if progress is not None:
            progress(done, len(spans))
        ids, first_target = list(token_ids[start:end]), scored_from - start
        if protocol.bos is not None:
            ids, first_target = [protocol.bos, *ids], first_target + 1
        steps = zip(*(_score_window(each, ids, first_target) for each in runners), strict=True)
        for step in steps:
            targets, logits = step[0]
            for rows in (slice(i, i + _ROWS_AT_ONCE) for i in range(0, len(targets), _ROWS_AT_ONCE)):
                log_q = _log_softmax(logits[rows])
                loss.add(_losses(log_q, targets[rows]))
                if reference is not None:
                    log_p = _log_softmax(step[1][1][rows])
                    reference_loss.add(_losses(log_p, targets[rows]))
                    divergence.add((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
                    same.add((log_p.argmax(axis=1) == log_q.argmax(axis=1)).astype(np.float64))
    perplexity = math.exp(loss.value)
    quality = Quality(len(spans), loss.count, perplexity, perplexity * loss.error)
    if reference is None:
        return quality
    return Quality(
        quality.windows,
        quality.scored_tokens,
        quality.perplexity,
        quality.perplexity_error,
        reference_perplexity=math.exp(reference_loss.value),
        mean_kl=divergence.value,
        mean_kl_error=divergence.error,
        same_top=same.value,
    )


def windows(num_tokens: int, protocol: Protocol) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored token) of each window over the text; a token is scored once.

    Without a beginning-of-sequence token nothing predicts a window's first token, so it is not scored there.
    """
    unpredicted = 1 if protocol.bos is None else 0
    scored_to = 0
    for start in range(0, num_tokens, protocol.stride):
        end = min(start + protocol.text_tokens, num_tokens)
        scored_from = max(scored_to, start + unpredicted)
        if scored_from < end:
            yield start, end, scored_from
        scored_to = end
        if end == num_tokens:
            break
    if num_tokens < 1 + unpredicted:
        raise RequestError(f"the text has {num_tokens} tokens, and at least {1 + unpredicted} are needed")


def _check_fits(runner: ModelRunner, protocol: Protocol) -> None:
    room = min(runner.max_model_len, runner.num_blocks * runner.block_size)
    if protocol.context > room:
        raise ConfigError(
            f"context: got {protocol.context}, allowed: at most {room} (the model's length or its cache)"
        )


def _score_window(
    runner: ModelRunner, token_ids: list[int], first_target: int
) -> Iterator[tuple[NDArray[np.int64], FloatArray]]:
    """(targets [R], logits [R, vocab_size]) piece by piece: row r predicts targets[r].

    token_ids[i] is predicted by row i - 1; the last token predicts nothing of this window and is not run.
    """
    blocks = np.arange(-(-len(token_ids) // runner.block_size), dtype=np.int32)[None, :]
    inputs = len(token_ids) - 1
    for start in range(0, inputs, PIECE_TOKENS):
        end = min(start + PIECE_TOKENS, inputs)
        rows = np.arange(max(start, first_target - 1), end, dtype=np.int32)
        logits = runner.run(
            Batch(
                token_ids=np.array(token_ids[start:end], np.int32),
                seq_starts=np.array([0, end - start], np.int32),
                context_lens=np.array([end], np.int32),
                prompt_lens=np.array([len(token_ids)], np.int32),
                block_tables=blocks,
                logit_rows=rows - start,
            )
        )
        yield np.array([token_ids[row + 1] for row in rows], np.int64), logits


def _log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    if not np.isfinite(wide).all():
        raise EngineError("the model's logits are not finite; no quality can be measured")
    return wide


def _losses(log_probabilities: NDArray[np.float64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    chosen: NDArray[np.float64] = -log_probabilities[np.arange(len(targets)), targets]
    return chosen
