"""The sampler against a slow, obvious one in numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_boost._native import Sampler, SamplingRow, philox

NEAR = 1e-5  # a reference in float64 cannot tell on which side of a boundary float32 falls


@dataclass
class Case:
    """A row of logits, what to do with it, and the tokens so far."""

    logits: np.ndarray
    tokens: np.ndarray
    params: dict[str, Any] = field(default_factory=dict)
    mask: np.ndarray | None = None  # [vocab] bool: which tokens a grammar allows

    def run(self, **more: Any) -> tuple[int, int, Any]:
        sampler = Sampler(len(self.logits))
        row = SamplingRow(**{**self.params, **more})
        masks = {} if self.mask is None else {"masks": as_words(self.mask)[None], "masked": [0]}
        tokens, status, logprobs = sampler.sample(self.logits[None], [row], [self.tokens], **masks)
        return int(tokens[0]), int(status[0]), logprobs


def uniform(seed: int, stream: int, position: int) -> float:
    high, low, *_ = philox([position & 0xFFFFFFFF, position >> 32, stream, 0], seed)
    return ((high << 32 | low) >> 11) * 2.0**-53


def as_words(mask: np.ndarray) -> np.ndarray:
    """[vocab] bool as a bit mask, with a word more than it needs."""
    bits = np.packbits(mask, bitorder="little")
    return np.concatenate([bits, np.zeros(8 - len(bits) % 4, np.uint8)]).view(np.int32)


def edited(case: Case) -> np.ndarray:
    """Masks, bad words and bias, then the stops held back, then penalties, in float64."""
    held = edited_with(case, hold_stops=True)
    if np.isneginf(held).all() and case.mask is not None:
        return edited_with(case, hold_stops=False)
    return held


def edited_with(case: Case, hold_stops: bool) -> np.ndarray:
    p = case.params
    logits = case.logits.astype(np.float64)
    prompt_len = p.get("prompt_len", 0)
    output = case.tokens[prompt_len:].tolist()
    if case.mask is not None:
        logits[~case.mask] = -np.inf
    if p.get("allowed"):
        words = np.array(p["allowed"], np.uint32).view(np.uint8)
        logits[~np.unpackbits(words, bitorder="little")[: len(logits)].astype(bool)] = -np.inf
    for *beginning, last in p.get("bad_words", []):
        if output[len(output) - len(beginning) :] == beginning and len(output) >= len(beginning):
            logits[last] = -np.inf
    for token, bias in p.get("logit_bias", []):
        logits[token] += bias
    if hold_stops and len(output) < p.get("min_tokens", 0):
        logits[p.get("stop_ids", [])] = -np.inf
    for token in set(case.tokens.tolist()):
        penalty = p.get("repetition_penalty", 1.0)
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(output):
        logits[token] -= p.get("frequency_penalty", 0.0) * output.count(token) + p.get(
            "presence_penalty", 0.0
        )
    return logits


def kept(logits: np.ndarray, params: dict[str, Any]) -> tuple[np.ndarray, bool]:
    """Probabilities after all filters, and whether a boundary is too near to call."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    weights = np.exp((logits - logits.max()) / params.get("temperature", 1.0))
    near = bool(np.any(np.abs(weights - params.get("min_p", 0.0)) < NEAR * params.get("min_p", 0.0)))
    keep = [i for i in order if weights[i] >= params.get("min_p", 0.0) and logits[i] > -np.inf]
    if params.get("top_k", 0) > 0:
        keep = keep[: params["top_k"]]
    probabilities = np.zeros(len(logits))
    probabilities[keep] = weights[keep] / weights[keep].sum()
    top_p = params.get("top_p", 1.0)
    if top_p < 1.0:
        before = np.cumsum(probabilities[keep]) - probabilities[keep]
        near |= bool(np.any(np.abs(before - top_p) < NEAR))
        probabilities[[i for i, mass in zip(keep, before, strict=True) if mass >= top_p]] = 0
    probabilities /= probabilities.sum()
    typical_p = params.get("typical_p", 1.0)
    if typical_p < 1.0:
        keep = np.flatnonzero(probabilities).tolist()
        surprise = -np.log(probabilities[keep])
        distance = dict(zip(keep, np.abs(surprise - (probabilities[keep] * surprise).sum()), strict=True))
        keep.sort(key=lambda i: (distance[i], -probabilities[i], i))
        # Rounded, two that are equally far may change places: it matters where the cut falls between them.
        before = np.cumsum(probabilities[keep]) - probabilities[keep]
        count = int((before < typical_p).sum())
        near |= bool(np.any(np.abs(before - typical_p) < NEAR))
        near |= count < len(keep) and distance[keep[count]] - distance[keep[count - 1]] < 1e-4
        probabilities[keep[count:]] = 0
    return probabilities / probabilities.sum(), near


@st.composite
def cases(draw: st.DrawFn, filters: bool = True) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocab = draw(st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 300, 1023, 1024, 1025, 2500]))
    spread = draw(st.sampled_from([0.5, 3.0, 20.0]))
    logits = (np.round(rng.normal(0, spread, vocab) * 4) / 4).astype(
        np.float32
    )  # quarters: ties are frequent
    length = draw(st.integers(0, 12))
    tokens = rng.integers(0, vocab, length).astype(np.int32)
    ids = st.integers(0, vocab - 1)
    params: dict[str, Any] = {
        "prompt_len": draw(st.integers(0, length)),
        "seed": draw(st.integers(0, 2**64 - 1)),
    }
    optional = {
        "repetition_penalty": st.sampled_from([0.5, 1.25, 2.0]),
        "presence_penalty": st.sampled_from([-1.0, 0.5, 2.0]),
        "frequency_penalty": st.sampled_from([-0.5, 0.25, 2.0]),
        "logit_bias": st.lists(st.tuples(ids, st.sampled_from([-100.0, -3.5, 4.0])), max_size=4),
        "min_tokens": st.integers(0, 12),
        "stop_ids": st.lists(ids, max_size=3, unique=True),
        "stream": st.integers(0, 127),
        "allowed": st.sets(ids, min_size=1).map(
            lambda some: as_words(np.isin(np.arange(vocab), list(some))).view(np.uint32).tolist()
        ),
        "bad_words": st.lists(st.lists(ids, min_size=1, max_size=3), max_size=3),
    }
    if filters:
        optional |= {
            "temperature": st.sampled_from([0.25, 0.7, 1.0, 3.0]),
            "top_k": st.sampled_from([1, 2, 7, 64, 5000]),
            "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.999]),
            "min_p": st.sampled_from([0.01, 0.3, 1.0]),
            "typical_p": st.sampled_from([0.01, 0.5, 0.95]),
        }
    for name, values in optional.items():
        if draw(st.booleans()):
            params[name] = draw(values)
    if draw(st.booleans()) and length > params["prompt_len"]:  # a bad word whose beginning has just come
        params.setdefault("bad_words", []).append([*tokens[params["prompt_len"] :].tolist(), draw(ids)])
    mask = rng.random(vocab) < draw(st.sampled_from([0.0, 0.02, 0.5, 1.0])) if draw(st.booleans()) else None
    return Case(logits, tokens, params, mask)


@given(cases(filters=False))
@settings(deadline=None)
def test_greedy_takes_the_first_of_the_highest(case: Case) -> None:
    logits = edited(case)
    token, status, logprobs = case.run(temperature=0.0)
    assert logprobs is None
    if np.isneginf(logits).all():
        assert status == 2
    else:
        assert status == 0
        assert logits[token] > logits.max() - NEAR
        if "repetition_penalty" not in case.params:  # dividing rounds: a tie there may be none in float64
            assert token == int(np.argmax(logits))


@given(cases())
@settings(max_examples=300, deadline=None)
def test_the_draw_is_the_one_of_the_reference(case: Case) -> None:
    logits = edited(case)
    token, status, _ = case.run()
    if np.isneginf(logits).all():
        assert status == 2
        return
    probabilities, near = kept(logits, case.params)
    position = len(case.tokens) - case.params["prompt_len"]
    u = uniform(case.params["seed"], case.params.get("stream", 0), position)
    cumulative = np.cumsum(probabilities)
    if near or np.any(np.abs(cumulative - u) < NEAR):
        return
    assert status == 0
    assert token == int(np.argmax(cumulative > u))


@given(cases(), st.integers(0, 20))
@settings(deadline=None)
def test_logprobs_are_of_the_raw_logits(case: Case, count: int) -> None:
    token, status, logprobs = case.run(num_logprobs=count)
    if status != 0:
        return
    assert token == case.run()[0], "asking for logprobs changes nothing"
    raw = case.logits.astype(np.float64)
    expected = raw - raw.max() - np.log(np.exp(raw - raw.max()).sum())
    order = sorted(range(len(raw)), key=lambda i: (-raw[i], i))
    logprob, rank, top_ids, top_logprobs = logprobs
    assert logprob[0] == pytest.approx(expected[token], rel=1e-5, abs=1e-5)
    assert rank[0] == order.index(token) + 1
    found = min(count, len(raw))
    assert top_ids.shape == top_logprobs.shape == (1, count)
    assert top_ids[0].tolist() == order[:found] + [-1] * (count - found)
    assert top_logprobs[0, :found] == pytest.approx(expected[order[:found]], rel=1e-5, abs=1e-5)


@given(st.lists(cases(), min_size=1, max_size=24), st.sampled_from([1, 2, 3]))
@settings(max_examples=30, deadline=None)
def test_a_row_does_not_depend_on_its_batch_or_on_threads(batch: list[Case], threads: int) -> None:
    vocab = len(batch[0].logits)
    batch = [case for case in batch if len(case.logits) == vocab] * 3
    masks = [as_words(case.mask) for case in batch if case.mask is not None]
    tokens, status, _ = Sampler(vocab, threads).sample(
        np.stack([case.logits for case in batch]),
        [SamplingRow(**case.params) for case in batch],
        [case.tokens for case in batch],
        np.stack(masks) if masks else None,
        [i for i, case in enumerate(batch) if case.mask is not None],
    )
    assert list(zip(tokens.tolist(), status.tolist(), strict=True)) == [case.run()[:2] for case in batch]


DISTRIBUTIONS = [
    {},
    {"temperature": 2.0},
    {"temperature": 0.5, "top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 1.5, "min_p": 0.05, "top_k": 7, "top_p": 0.95},
]


@pytest.mark.parametrize("params", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("vocab", [12, 2000])
def test_draws_follow_the_distribution(params: dict[str, Any], vocab: int) -> None:
    draws = 4000
    logits = np.random.default_rng(7).normal(0, 2, vocab).astype(np.float32)
    logits[:10] = np.linspace(6, 9, 10)  # or each of 2000 tokens is too rare to count
    row = SamplingRow(seed=1234, **params)
    positions = np.zeros(draws, np.int32)
    sampler = Sampler(vocab)
    counts = np.zeros(vocab)
    for start in range(0, draws, 500):
        tokens, _, _ = sampler.sample(
            np.tile(logits, (500, 1)), [row] * 500, [positions[:n] for n in range(start, start + 500)]
        )
        counts += np.bincount(tokens, minlength=vocab)
    probabilities, _ = kept(logits.astype(np.float64), params)
    assert counts[probabilities == 0].sum() == 0
    # Pearson's chi-square; tokens expected less than five times count as one.
    expected = probabilities * draws
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = max(len(expected) - 1, 1)
    # The 99.99th percentile, by Wilson and Hilferty's approximation. The seed is fixed: this never flickers.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * np.sqrt(2 / (9 * freedom))) ** 3


def test_streams_positions_and_seeds_are_independent() -> None:
    logits = np.zeros((64, 1000), np.float32)
    tokens = np.zeros(64, np.int32)
    sampler = Sampler(1000)

    def draw(rows: list[SamplingRow], lengths: range | list[int]) -> list[int]:
        return sampler.sample(logits, rows, [tokens[:n] for n in lengths])[0].tolist()

    by_stream = draw([SamplingRow(seed=1, stream=i) for i in range(64)], [0] * 64)
    by_position = draw([SamplingRow(seed=1)] * 64, range(64))
    by_seed = draw([SamplingRow(seed=i) for i in range(64)], [0] * 64)
    for drawn in (by_stream, by_position, by_seed):
        assert len(set(drawn)) > 50
    assert by_position == draw([SamplingRow(seed=1)] * 64, range(64))
    shifted = [SamplingRow(seed=1, prompt_len=3)] * 61
    again = sampler.sample(logits[:61], shifted, [tokens[: n + 3] for n in range(61)])[0].tolist()
    assert again == by_position[:61], "a position counts from the prompt's end"


def test_philox_gives_the_published_bits() -> None:
    # Known answers of the Random123 distribution.
    assert philox([0, 0, 0, 0], 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox([ones] * 4, 2**64 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    digits_of_pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox(digits_of_pi, 0x299F31D0A4093822) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 17, 1030])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_k": 5}, {"repetition_penalty": 1.5}], ids=str)
def test_a_row_that_is_not_finite_fails_alone(bad: float, at: int, params: dict[str, Any]) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 1031)).astype(np.float32)
    good = logits[[0, 2]].copy()
    logits[1, at] = bad
    tokens = np.arange(4, dtype=np.int32)
    row = SamplingRow(seed=5, **params)
    sampler = Sampler(1031)
    ids, status, _ = sampler.sample(logits, [row] * 3, [tokens] * 3)
    assert status.tolist() == [0, 1, 0]
    assert ids[[0, 2]].tolist() == sampler.sample(good, [row] * 2, [tokens] * 2)[0].tolist()


@pytest.mark.parametrize("top_p", [1e-30, 0.3, 1.0])
@pytest.mark.parametrize("value", [0.0, 3e38, -3e38])
def test_extreme_logits_and_temperatures(top_p: float, value: float) -> None:
    logits = np.full(100, value, np.float32)
    logits[40] = -3.4e38
    for temperature in (1e-5, 1.0, 100.0):
        token, status, _ = Case(logits, np.zeros(0, np.int32)).run(temperature=temperature, top_p=top_p)
        assert status == 0
        assert token != 40 or value == -3e38
    lone = np.full(100, -3.4e38, np.float32)
    lone[77] = 3.4e38
    assert Case(lone, np.zeros(0, np.int32)).run(temperature=1e-5, top_p=top_p)[0] == 77


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        ({"logit_bias": [(10, 1.0)]}, []),
        ({"stop_ids": [-1], "min_tokens": 1}, []),
        ({"repetition_penalty": 2.0}, [10]),
        ({"presence_penalty": 1.0}, [3, -1]),
    ],
)
def test_tokens_outside_the_vocabulary_fail_their_row(params: dict[str, Any], tokens: list[int]) -> None:
    case = Case(np.zeros(10, np.float32), np.array(tokens, np.int32), params)
    assert case.run()[1] == 3


def test_arguments_that_do_not_fit_are_refused() -> None:
    sampler, row, none = Sampler(8), SamplingRow(), np.zeros(0, np.int32)
    with pytest.raises(ValueError, match="vocabulary"):
        sampler.sample(np.zeros((1, 9), np.float32), [row], [none])
    with pytest.raises(ValueError, match="each row"):
        sampler.sample(np.zeros((2, 8), np.float32), [row], [none])
    with pytest.raises(ValueError, match="prompt"):
        sampler.sample(np.zeros((1, 8), np.float32), [SamplingRow(prompt_len=1)], [none])
    with pytest.raises(TypeError):
        sampler.sample(np.zeros((1, 8), np.float64), [row], [none])
    assert sampler.sample(np.zeros((0, 8), np.float32), [], [])[0].shape == (0,)


@given(cases(), st.integers(0, 20), st.sampled_from([1, 3]))
@settings(max_examples=50, deadline=None)
def test_a_score_is_what_sampling_would_have_reported(case: Case, count: int, threads: int) -> None:
    token, status, logprobs = case.run(num_logprobs=count)
    if status != 0:
        return
    rows = np.repeat(case.logits[None], 9, axis=0)
    status, scored = Sampler(len(case.logits), threads).score(rows, np.full(9, token, np.int32), count)
    assert not status.any()
    for of_sampling, of_scoring in zip(logprobs, scored, strict=True):
        for row in of_scoring:
            np.testing.assert_array_equal(row, of_sampling[0])


def test_what_cannot_be_scored_is_told() -> None:
    logits = np.zeros((3, 5), np.float32)
    logits[1, 2] = np.nan
    status, _ = Sampler(5).score(logits, np.array([5, 0, 4], np.int32), 0)
    assert status.tolist() == [3, 1, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"masks": np.zeros((1, 1), np.int32), "masked": [0]}, "narrower"),
        ({"masks": np.zeros((1, 2), np.int32), "masked": [1]}, "no such row"),
        ({"masks": np.zeros((2, 2), np.int32), "masked": [0]}, "one mask for each row"),
        ({"masked": [0]}, "one mask for each row"),
    ],
)
def test_masks_that_do_not_fit_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(40).sample(np.zeros((1, 40), np.float32), [SamplingRow()], [np.zeros(0, np.int32)], **wrong)
