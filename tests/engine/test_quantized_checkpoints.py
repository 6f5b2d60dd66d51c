"""GPTQ and AWQ checkpoints in the engine: the model that their dequantised weights are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from golden import model_dir
from group_quant_writer import write
from llm_boost import LLM, SamplingParams
from llm_boost.checkpoint import open_checkpoint

KINDS = [("qwen2", "gptq", 4, 16), ("llama", "gptq", 8, -1), ("qwen3", "awq", 4, 16)]


@pytest.mark.parametrize(("name", "method", "bits", "group_size"), KINDS)
def test_the_same_as_its_dequantised_weights(
    tmp_path: Path, name: str, method: str, bits: int, group_size: int
) -> None:
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    write(model_dir(name), quantised, method, bits, group_size)
    write_dequantised(quantised, plain)
    answers = []
    for model in (quantised, plain):
        llm = LLM(model=model, dtype="float32", cache_dir=tmp_path, max_model_len=256, threads=2)
        outputs = llm.generate("A prompt", SamplingParams(temperature=0, max_tokens=24, logprobs=2))
        answers.append(outputs[0].outputs[0])
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].cumulative_logprob == answers[1].cumulative_logprob


def write_dequantised(source: Path, output: Path) -> None:
    checkpoint = open_checkpoint(source)
    output.mkdir()
    for file in source.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            (output / file.name).write_bytes(file.read_bytes())
    (output / "config.json").write_text(json.dumps(checkpoint.config))
    save_file({n: np.array(checkpoint.read(n)) for n in checkpoint.tensors}, output / "model.safetensors")


def test_int8_holds_them_by_default(tmp_path: Path) -> None:
    """Four bits rounded to another grid of four would lose as much again."""
    write(model_dir("qwen2"), tmp_path / "model", "gptq", 4, 16)
    llm = LLM(model=tmp_path / "model", cache_dir=tmp_path, max_model_len=64, threads=1)
    assert llm.dtype == "int8"
    assert LLM(model=tmp_path / "model", dtype="int4", cache_dir=tmp_path, max_model_len=64).dtype == "int4"
