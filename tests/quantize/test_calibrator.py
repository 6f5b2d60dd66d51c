"""The calibrator's arithmetic against transformers' logits, on weights that it leaves as they are."""

from __future__ import annotations

import numpy as np
import pytest

from golden import GOLDEN_MODELS, load_golden, model_dir, relative_error
from llm_boost.checkpoint import open_checkpoint
from llm_boost.models import decoder
from llm_boost.models.config import ModelConfig
from llm_boost.models.plan_builder import Normed
from llm_boost.models.weights import Matrix
from llm_boost.quantize import calibrator
from llm_boost.quantize.calibrator import Calibrator, Events, read_stacked
from llm_boost.quantize.gptq import Quantized


class Faithful:
    """A rounder that changes nothing."""

    def __init__(self, hessian: np.ndarray, damping: float, threads: int) -> None:
        assert hessian.shape[0] == hessian.shape[1]

    def round(self, weights: np.ndarray, fmt: str) -> Quantized:
        nothing = np.empty(0, np.uint8)
        return Quantized(nothing, nothing.view(np.int8), nothing.view(np.float32), weights)


class Listening(Calibrator):
    """Keeps the inputs of the head."""

    def logits(self, x: Normed, head: str) -> None:
        super().logits(x, head)
        self.head_inputs = np.concatenate([inputs for _, inputs in self._inputs(x)])


@pytest.mark.parametrize("length", [17, 300])
@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_the_decoder_is_that_of_transformers(name: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrator, "Rounder", Faithful)
    monkeypatch.setattr(calibrator, "pack", lambda rounded, fmt: np.empty(0, np.uint8))
    checkpoint = open_checkpoint(model_dir(name))
    config = ModelConfig.from_hf(checkpoint.config, name, checkpoint.tensors)
    specs = {spec.name: spec for spec in decoder.weights(config)}
    golden = load_golden(name, length)
    tokens = np.array([golden.prompt, golden.prompt], np.int32)  # sequences do not see each other
    seen: list[str] = []
    events = Events(lambda matrix, _: seen.append(matrix), lambda _: None, lambda _: None)
    listening = Listening(checkpoint, config, specs, tokens, "int4", events, damping=0.01, threads=1)
    decoder.build(listening, config)
    head = next(read_stacked(checkpoint, specs["head"], 1 << 20))
    logits = listening.head_inputs @ head.T
    for sequence in np.split(logits, 2):
        assert relative_error(sequence[-len(golden.logits) :], golden.logits) < 1e-4
    assert seen == [spec.name for spec in specs.values() if isinstance(spec, Matrix)]


@pytest.mark.parametrize("chunk", [32, 64, 4096])
@pytest.mark.parametrize("interleave", [False, True])
def test_rows_in_the_order_of_packing(tmp_path, chunk: int, interleave: bool) -> None:
    """Read in chunks and packed, they are what the packer makes of the whole."""
    from safetensors.numpy import save_file

    from llm_boost import _native

    rng = np.random.default_rng(0)
    rows = (40, 40) if interleave else (40, 24, 7)
    parts = {f"p{i}": rng.standard_normal((n, 8)).astype(np.float32) for i, n in enumerate(rows)}
    save_file(parts, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    spec = Matrix("m", tuple(parts), interleave=interleave)
    got = np.concatenate(list(read_stacked(open_checkpoint(tmp_path), spec, chunk)))
    packed = _native.pack_matrix(list(parts.values()), "float32", interleave)
    np.testing.assert_array_equal(got, _native.unpack_rows(packed, "float32", *got.shape))
