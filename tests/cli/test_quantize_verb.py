"""`llm-boost quantize` as people call it, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from golden import model_dir
from llm_boost.cli.main import main


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LLM_BOOST_CACHE", str(tmp_path / "cache"))

    def run(*args) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


SMALL = ("--num_samples", 8, "--context", 32, "--threads", 2)


def test_from_model_to_answer(call, tmp_path: Path) -> None:
    output = tmp_path / "int4"
    code, out, err = call("quantize", model_dir("qwen2"), "--output", output, *SMALL)
    assert (code, err) == (0, "")
    first, beside, rtn, gptq, share = out.splitlines()
    assert first.startswith(f"{output}: int4 by gptq, 0.1 MB")
    assert beside.startswith("on 124 tokens that it was not calibrated on, beside bfloat16 (perplexity ")
    assert rtn.startswith("  rtn:  mean KL 0.")
    assert gptq.startswith("  gptq: mean KL 0.")
    assert float(share.split()[2]) < 0.9
    code, out, _ = call("predict", "--model", output, "--max_new_tokens", 3, "--ignore_eos", "--json", "Hi")
    assert code == 0
    assert len(json.loads(out)["token_ids"]) == 3


def test_as_json_and_without_a_report(call, tmp_path: Path) -> None:
    output = tmp_path / "int8"
    args = ("--dtype", "int8", "--method", "rtn", "--no-report", "--json")
    code, out, _ = call("quantize", model_dir("llama"), "--output", output, *args)
    told = json.loads(out)
    assert code == 0
    assert (told["dtype"], told["method"]) == ("int8", "rtn")
    assert told == json.loads((output / "quantization.json").read_text())
    assert "rtn" not in told


def test_a_text_of_the_users(call, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    code, _, err = call(
        "quantize",
        model_dir("llama"),
        "--output",
        tmp_path / "m",
        "--calibration",
        text,
        *SMALL,
        "--no-report",
    )
    assert code == 0
    assert "the text is enough for" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["absent"], "model 'absent': no such directory or file"),
        ([model_dir("llama"), "--dtype", "int3"], "'int3' is not one of 'int4', 'int8'"),
        (
            [model_dir("llama"), "--calibration", "absent.txt", "--context", "32"],
            "absent.txt: cannot read the text: No such file",
        ),
        ([model_dir("llama"), "--context", "1000000"], "Invalid value for '--context'"),
        ([model_dir("llama"), "--reference_dtype", "fp16"], "--reference_dtype: got 'fp16'"),
        ([model_dir("llama"), "--num_samples", "0"], "Invalid value for '--num_samples'"),
    ],
)
def test_wrong_input(call, tmp_path: Path, args, message: str) -> None:
    code, out, err = call("quantize", *args, "--output", tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.glob("out*"))


def test_a_packed_model_is_no_source(call, tmp_path: Path) -> None:
    args = ("--method", "rtn", "--no-report")
    assert call("quantize", model_dir("llama"), "--output", tmp_path / "a", *args)[0] == 0
    code, _, err = call("quantize", tmp_path / "a", "--output", tmp_path / "b", *args)
    assert code == 2
    assert "packed weights" in err
