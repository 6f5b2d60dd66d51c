"""The arithmetic of perplexity and divergence, against a plain computation over a model that is a table."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from llm_boost.errors import ConfigError, EngineError, RequestError
from llm_boost.evaluation import PIECE_TOKENS, Protocol, evaluate, windows


class TableRunner:
    """Logits depend on the last token alone; checks that the cache is used as a real runner would need it."""

    num_blocks, block_size = 64, 4

    def __init__(self, seed: int, vocab_size: int = 50, max_model_len: int = 256) -> None:
        self.vocab_size, self.max_model_len = vocab_size, max_model_len
        self.table = np.random.default_rng(seed).normal(0, 2, (vocab_size, vocab_size)).astype(np.float32)
        self.cached = 0

    def run(self, batch):
        start = int(batch.context_lens[0]) - len(batch.token_ids)
        assert start in (0, self.cached)  # a new window, or the next piece of this one
        self.cached = int(batch.context_lens[0])
        assert list(batch.seq_starts) == [0, len(batch.token_ids)]
        assert batch.block_tables.shape[1] * self.block_size >= self.cached
        assert len(batch.token_ids) <= PIECE_TOKENS
        return self.table[batch.token_ids[batch.logit_rows]]

    def log_probabilities(self, token: int) -> np.ndarray:
        row = self.table[token].astype(np.float64)
        return row - row.max() - math.log(np.exp(row - row.max()).sum())


def plain(runner, reference, ids, protocol):
    """Every scored position, one by one."""
    losses, divergences, same = [], [], []
    for start, end, scored_from in windows(len(ids), protocol):
        for position in range(scored_from, end):
            previous = ids[position - 1] if position > start else protocol.bos
            log_q = runner.log_probabilities(previous)
            log_p = reference.log_probabilities(previous)
            losses.append(-log_q[ids[position]])
            divergences.append(float(np.sum(np.exp(log_p) * (log_p - log_q))))
            same.append(log_p.argmax() == log_q.argmax())
    return len(losses), math.exp(np.mean(losses)), np.mean(divergences), np.mean(same)


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(context=10, stride=10),
        Protocol(context=200, stride=100),
        Protocol(context=130, stride=129, bos=3),
        Protocol(context=16, stride=5, bos=3),
        Protocol(context=2, stride=1),
    ],
)
def test_figures_equal_a_plain_computation(protocol):
    ids = np.random.default_rng(0).integers(0, 50, 333).tolist()
    runner, reference = TableRunner(1), TableRunner(2)
    quality = evaluate(runner, ids, protocol, reference)
    tokens, perplexity, divergence, same = plain(runner, reference, ids, protocol)
    assert quality.scored_tokens == tokens
    assert quality.perplexity == pytest.approx(perplexity, rel=1e-12)
    assert quality.mean_kl == pytest.approx(divergence, rel=1e-12)
    assert quality.same_top == pytest.approx(same, rel=1e-12)
    assert quality.reference_perplexity == pytest.approx(
        plain(reference, runner, ids, protocol)[1], rel=1e-12
    )
    alone = evaluate(runner, ids, protocol)
    assert (alone.perplexity, alone.mean_kl, alone.same_top) == (quality.perplexity, None, None)


def test_a_model_does_not_diverge_from_itself():
    quality = evaluate(TableRunner(1), list(range(50)), Protocol(32, 32), TableRunner(1))
    assert quality.mean_kl == pytest.approx(0.0, abs=1e-15)
    assert quality.same_top == 1.0


def test_equal_logits_have_the_vocabulary_as_perplexity():
    runner = TableRunner(0)
    runner.table[:] = 12345.0
    quality = evaluate(runner, list(range(50)), Protocol(32, 32))
    assert quality.perplexity == pytest.approx(50)
    assert quality.perplexity_error == pytest.approx(0, abs=1e-6)


def test_the_error_is_that_of_a_mean():
    ids = np.random.default_rng(0).integers(0, 50, 200).tolist()
    runner = TableRunner(1)
    losses = [-runner.log_probabilities(a)[b] for a, b in itertools.pairwise(ids)]
    quality = evaluate(runner, ids, Protocol(256, 256))
    expected = math.exp(np.mean(losses)) * np.std(losses, ddof=1) / math.sqrt(len(losses))
    assert quality.perplexity_error == pytest.approx(expected)


@pytest.mark.parametrize(
    ("num_tokens", "protocol", "expected"),
    [
        (10, Protocol(4, 4), [(0, 4, 1), (4, 8, 5), (8, 10, 9)]),
        (9, Protocol(4, 4), [(0, 4, 1), (4, 8, 5)]),  # the last token has nothing before it in its window
        (10, Protocol(4, 2), [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]),
        (10, Protocol(5, 4, bos=1), [(0, 4, 0), (4, 8, 4), (8, 10, 8)]),
        (3, Protocol(8, 8), [(0, 3, 1)]),
    ],
)
def test_windows(num_tokens, protocol, expected):
    assert list(windows(num_tokens, protocol)) == expected


def test_progress_counts_windows():
    seen = []
    evaluate(TableRunner(1), [1] * 12, Protocol(4, 4), progress=lambda *args: seen.append(args))
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_what_cannot_be_evaluated():
    with pytest.raises(ConfigError, match="context: got 1, allowed: at least 2"):
        Protocol(context=1)
    with pytest.raises(ConfigError, match="stride: got 9, allowed: 1 to 7"):
        Protocol(context=8, stride=9, bos=0)
    with pytest.raises(ConfigError, match="context: got 512, allowed: at most 256"):
        evaluate(TableRunner(1), [1, 2], Protocol())
    with pytest.raises(ConfigError, match="context: got 20, allowed: at most 16"):
        evaluate(TableRunner(1, max_model_len=16), [1, 2], Protocol(20, 20))
    with pytest.raises(ConfigError, match="vocabulary: got 50 tokens, the reference has 51"):
        evaluate(TableRunner(1), [1, 2], Protocol(4, 4), TableRunner(1, vocab_size=51))
    with pytest.raises(RequestError, match="the text has 1 tokens, and at least 2 are needed"):
        evaluate(TableRunner(1), [1], Protocol(4, 4))
    with pytest.raises(RequestError, match="the text has 0 tokens"):
        evaluate(TableRunner(1), [], Protocol(4, 3, bos=1))


def test_logits_that_are_not_finite():
    runner = TableRunner(1)
    runner.table[3, 7] = np.nan
    with pytest.raises(EngineError, match="not finite"):
        evaluate(runner, [1, 2, 3, 4], Protocol(4, 4))
