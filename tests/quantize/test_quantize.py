"""`llm-boost quantize` on tiny models: better than round-to-nearest, loads, survives interruption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from golden import load_golden, mean_kl, model_dir
from llm_boost import LLM, SamplingParams
from llm_boost.checkpoint.packed_checkpoint import WEIGHTS
from llm_boost.convert.source import open_source
from llm_boost.errors import CheckpointError, ConfigError, RequestError
from llm_boost.quantize.calibration import HELD_OUT, file_text, sequences, standard_library_text, tokenizer_of
from llm_boost.quantize.quantize import REPORT, Options, quantize

OPTIONS = Options(num_samples=32, context=64)


def text() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32 + HELD_OUT, 64)).astype(np.int32)


def run(model: str, output: Path, options: Options = OPTIONS, **more):
    return quantize(open_source(model_dir(model)), output, options, text, threads=2, **more)


def logits(model: Path, dtype: str, tmp_path: Path, prompt: list[int]) -> np.ndarray:
    from golden import Sequences

    llm = LLM(model=model, dtype=dtype, cache_dir=tmp_path, max_model_len=512, threads=2)
    return Sequences(llm.engine.runner, [prompt]).forward({0: prompt})[0]


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3"])
def test_much_less_divergence_than_of_round_to_nearest(name: str, tmp_path: Path) -> None:
    source = open_source(model_dir(name))
    found = sequences(tokenizer_of(source.checkpoint), standard_library_text(), 32, 64)
    quantize(source, tmp_path / "model", OPTIONS, lambda: found, threads=2)
    prompt = found[-HELD_OUT:].reshape(-1).tolist()
    want = logits(model_dir(name), "float32", tmp_path, prompt)
    nearest = logits(model_dir(name), "int4", tmp_path, prompt)
    calibrated = logits(tmp_path / "model", "auto", tmp_path, prompt)
    assert mean_kl(calibrated, want) < 0.7 * mean_kl(nearest, want)


def test_round_to_nearest_is_what_the_engine_packs(tmp_path: Path) -> None:
    run("llama", tmp_path / "model", Options("int8", "rtn"))
    prompt = load_golden("llama", 17).prompt
    ours = logits(tmp_path / "model", "int8", tmp_path, prompt)
    np.testing.assert_array_equal(ours, logits(model_dir("llama"), "int8", tmp_path, prompt))


def test_the_folder_is_a_model(tmp_path: Path) -> None:
    told = run(
        "qwen2", tmp_path / "model", report=lambda folder, held_out: {"held_out": list(held_out.shape)}
    )
    llm = LLM(model=tmp_path / "model", max_model_len=128)
    assert llm.dtype == "int4"
    assert (
        len(llm.generate("Hello", SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].token_ids) == 4
    )
    assert json.loads((tmp_path / "model" / REPORT).read_text()) == told
    assert told["held_out"] == [HELD_OUT, 64]
    assert not (tmp_path / "model.unfinished").exists()
    with pytest.raises(ConfigError, match="packed as int4"):
        LLM(model=tmp_path / "model", dtype="int8")


class Interrupted(Exception):
    pass


def interrupt_after(calls: int):
    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise Interrupted

    return progress


@pytest.mark.parametrize("calls", [0, 1, 6, 9, 10])
def test_interrupted_work_goes_on(calls: int, tmp_path: Path) -> None:
    """From any matrix on (a layer of this model has five), to the same bytes."""
    run("llama", tmp_path / "whole")
    with pytest.raises(Interrupted):
        run("llama", tmp_path / "model", progress=interrupt_after(calls))
    assert not (tmp_path / "model").exists()
    with pytest.raises(CheckpointError):
        LLM(model=tmp_path / "model.unfinished")
    done: list[tuple[int, int]] = []
    run("llama", tmp_path / "model", resume=True, progress=lambda *at: done.append(at))
    assert done[-1][0] == done[-1][1]
    assert len(done) == 11 - 5 * (calls // 5)
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_only_the_same_job_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run("llama", tmp_path / "model", progress=interrupt_after(2))
    with pytest.raises(ConfigError, match="holds an interrupted run; --resume continues it"):
        run("llama", tmp_path / "model")
    with pytest.raises(ConfigError, match="was begun with dtype 'int4', not 'int8'"):
        run("llama", tmp_path / "model", Options("int8", num_samples=32, context=64), resume=True)
    with pytest.raises(ConfigError, match="was begun with"):
        run("qwen2", tmp_path / "model", resume=True)


def test_an_output_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(ConfigError, match="is there already; remove it"):
        run("llama", tmp_path / "model")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_what_was_kept_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run("llama", tmp_path / "model", progress=interrupt_after(7))
    work = tmp_path / "model.unfinished" / "work"
    (work / "layers.0.qk.npy").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"layers\.0\.qk is missing or damaged; remove"):
        run("llama", tmp_path / "model", resume=True)
    assert not (tmp_path / "model").exists()


def test_text_becomes_sequences(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(open_source(model_dir("llama")).checkpoint)
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    found = sequences(tokenizer, file_text(tmp_path / "text"), 3, 32)
    assert found.shape == (3 + HELD_OUT, 32)
    assert (found[:, 0] == tokenizer.bos_token_id).all() == (
        tokenizer.encode("a")[0] == tokenizer.bos_token_id
    )
    assert sequences(tokenizer, standard_library_text(), 2, 16).shape == (2 + HELD_OUT, 16)
    assert len(sequences(tokenizer, file_text(tmp_path / "text"), 10_000, 32)) < 10_000
    with pytest.raises(RequestError, match="at least 5"):
        sequences(tokenizer, iter(["short"]), 3, 1024)
    with pytest.raises(RequestError, match="cannot read the text: No such file"):
        list(file_text(tmp_path / "absent"))
