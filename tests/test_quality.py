"""The quality gates: what each dtype may cost a real model, on every instruction set that the processor has.

`make quality` fetches SmolLM2-135M and runs them. Bounds lie a quarter or so above what was measured when
they were set: a kernel that costs accuracy fails here, whatever its other tests say of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from llm_boost import LLM, _native
from llm_boost.engine.batch import Batch, FloatArray
from llm_boost.evaluation import Protocol, Quality, evaluate

TEXT = Path(__file__).parent / "quality_text.txt"
TOKENS = {"generic": 64}  # which is slow, and whose arithmetic is plain; the others take
MANY_TOKENS = 256

pytestmark = pytest.mark.quality


@dataclass(frozen=True)
class Gate:
    """Bounds on the mean KL(float32 || dtype) in nats, and on the perplexity beside float32's."""

    dtype: str
    mean_kl: float
    perplexity_ratio: float
    kv_cache_dtype: str = "auto"

    def __str__(self) -> str:
        return self.dtype if self.kv_cache_dtype == "auto" else f"{self.dtype}, cache {self.kv_cache_dtype}"


GATES = [
    Gate("float32", mean_kl=1e-8, perplexity_ratio=1.0001),
    Gate("bfloat16", mean_kl=0.00022, perplexity_ratio=1.005),
    Gate("int8", mean_kl=0.0038, perplexity_ratio=1.015),
    Gate("int4", mean_kl=0.21, perplexity_ratio=1.08),
    Gate("bfloat16", mean_kl=0.00053, perplexity_ratio=1.005, kv_cache_dtype="int8"),
    Gate("int8", mean_kl=0.0042, perplexity_ratio=1.015, kv_cache_dtype="int8"),
]
FEW_TOKENS_SLACK = 1.4  # so few tokens say less of the mean


class Recorded:
    """A runner whose logits are computed once: the reference of every gate."""

    def __init__(self, llm: LLM) -> None:
        runner = llm.engine.runner
        self.vocab_size, self.max_model_len = runner.vocab_size, runner.max_model_len
        self.num_blocks, self.block_size = runner.num_blocks, runner.block_size
        self._run = runner.run
        self._logits: dict[bytes, FloatArray] = {}

    def position_salt(self, num_prompt_tokens: int) -> int:
        return 0

    def run(self, batch: Batch) -> FloatArray:
        key = batch.token_ids.tobytes() + batch.context_lens.tobytes()
        if key not in self._logits:
            self._logits[key] = self._run(batch).copy()
        return self._logits[key]


def load(dtype: str, kv_cache_dtype: str = "auto") -> LLM:
    model = os.environ["LLM_BOOST_QUALITY_MODEL"]
    return LLM(model, dtype=dtype, kv_cache_dtype=kv_cache_dtype, max_model_len=512, max_num_seqs=1)


@cache
def reference() -> tuple[Recorded, list[int]]:
    llm = load("float32")
    return Recorded(llm), llm.tokenizer.encode(TEXT.read_text("utf-8"))


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Gate], Quality]:
    def measure(isa: str, gate: Gate) -> Quality:
        monkeypatch.delenv("LLM_BOOST_ISA", raising=False)
        recorded, ids = reference()
        monkeypatch.setenv("LLM_BOOST_ISA", isa)
        llm, count = load(gate.dtype, gate.kv_cache_dtype), TOKENS.get(isa, MANY_TOKENS)
        assert (llm.isa, llm.dtype) == (isa, gate.dtype)
        quality = evaluate(llm.engine.runner, ids[:count], Protocol(count, count), recorded)
        print(f"{isa} {gate}: {quality}")
        return quality

    return measure


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("isa", _native.available_isas())
def test_what_a_dtype_costs(measure: Callable[[str, Gate], Quality], isa: str, gate: Gate) -> None:
    quality = measure(isa, gate)
    assert quality.scored_tokens == TOKENS.get(isa, MANY_TOKENS) - 1
    assert quality.mean_kl is not None
    assert quality.reference_perplexity is not None
    slack = FEW_TOKENS_SLACK if isa in TOKENS else 1.0
    assert quality.mean_kl <= slack * gate.mean_kl
    ratio = quality.perplexity / quality.reference_perplexity
    assert abs(ratio - 1) <= slack * (gate.perplexity_ratio - 1)
