"""`llm-boost eval` on a fake LLM."""

from __future__ import annotations

import json

import pytest

from llm_boost.evaluation import Protocol, evaluate

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_perplexity_and_protocol(run, llm, text):
    code, out, _ = run("eval", "--model", "m", "--file", text, "--context", 64)
    expected = evaluate(llm.engine.runner, [ord(c) for c in TEXT], Protocol(64, 63, bos=0))
    assert code == 0
    assert out.splitlines() == [
        f"text: {text}, 900 tokens scored",
        "protocol: context 64, stride 63, 15 windows, BOS (token 0) before each window",
        f"perplexity (bfloat16): {expected.perplexity:.4f} +- {expected.perplexity_error:.4f}",
    ]
    assert llm.resolved[0].config.seq_length == 64


def test_against_a_reference(run, llm, text):
    args = ["--model", "m", "--file", text, "--dtype", "int8", "--reference_dtype", "fp32", "--context", 64]
    code, out, _ = run("eval", *args, "--stride", 32, "--max_tokens", 100, "--json")
    report = json.loads(out)
    assert code == 0
    assert [resolved.config.dtype for resolved in llm.resolved] == ["int8", "float32"]
    assert (report["dtype"], report["reference_dtype"]) == ("int8", "float32")
    assert (report["context"], report["stride"], report["bos"], report["scored_tokens"]) == (64, 32, 0, 100)
    assert report["mean_kl"] == pytest.approx(0, abs=1e-12)
    assert report["same_top"] == 1.0
    assert "same top token: 100.00 %" in run("eval", *args)[1]


def test_a_model_without_a_beginning_token(run, llm, text):
    llm.tokenizer.encode = lambda text, *, add_special_tokens=True: [ord(c) for c in text]
    code, out, _ = run("eval", "--model", "m", "--file", text, "--context", 64)
    assert code == 0
    assert "context 64, stride 64, 15 windows, no BOS" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--file", "absent"], "absent: cannot read the text: No such file"),
        (["--file", "text.txt", "--context", "1"], "context: got 1, allowed: at least 3"),
        (["--file", "text.txt", "--stride", "0"], "stride: got 0, allowed: 1 to 511"),
        (["--file", "text.txt", "--context", "257"], "context: got 257, allowed: at most 256"),
        (["--file", "text.txt", "--reference_dtype", "int3"], "--reference_dtype: got 'int3', allowed: auto"),
        (["--file", "text.txt", "--dtype", "int3"], "--dtype: got 'int3', allowed: auto"),
        (["--file", "text.txt", "--max_tokens", "0"], "Invalid value for '--max_tokens'"),
        (["--file", "empty.txt", "--context", "64"], "the text has 0 tokens, and at least 1 are needed"),
        (["--file", "latin.txt"], "latin.txt: not UTF-8 text (byte 1)"),
    ],
)
def test_wrong_input(run, llm, text, tmp_path, args, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"a\xe9b")
    code, out, err = run("eval", "--model", "m", *args)
    assert (code, out) == (2, "")
    assert message in err
