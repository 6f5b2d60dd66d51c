"""`llm-boost bench throughput` on the smallest models: what is run and said, never how fast it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llm_boost import _native
from llm_boost.benchmark import throughput, workload
from llm_boost.benchmark.workload import Lengths

MODEL = Path(__file__).parents[1] / "golden_models" / "qwen2"


@pytest.fixture(autouse=True)
def fixed_limits(monkeypatch):
    monkeypatch.setattr(_native, "probe_bandwidth", lambda threads, megabytes: 10e9)
    monkeypatch.setattr(_native, "probe_dot_rate", lambda kind, threads: 1e11)


@pytest.fixture
def bench(run, tmp_path):
    def bench(*args):
        common = ("bench", "throughput", "--model", MODEL, "--threads", 1, "--cache_dir", tmp_path)
        return run(*common, *args)

    return bench


def test_synthetic_lengths(bench):
    code, out, err = bench("--input_len", "3:20", "--output_len", "5", "--num_prompts", 7)
    assert (code, err) == (0, "")
    report = json.loads(out.splitlines()[-1])
    assert (report["requests"], report["output_tokens"], report["source"]) == (7, 35, "synthetic")
    vocab_size = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    jobs = workload.synthetic(7, Lengths(3, 20), Lengths(5, 5), vocab_size, seed=0)
    assert report["prompt_tokens"] == sum(len(job.prompt_token_ids) for job in jobs)
    total = report["prompt_tokens"] + 35
    assert report["total_tokens_per_second"] == pytest.approx(total / report["seconds"])
    assert report["requests_per_second"] == pytest.approx(7 / report["seconds"])
    first, latency = report["time_to_first_token"], report["latency"]
    assert 0 < first["p50"] <= first["p90"] <= first["p99"] < latency["p99"] <= report["seconds"]
    assert out.startswith(f"7 requests, {report['prompt_tokens']} tokens in, 35 tokens out, in ")
    assert "time per output token" in out


def test_the_seed_decides_what_is_drawn():
    def draw(seed):
        jobs = workload.synthetic(30, Lengths(2, 9), Lengths(4, 6), 100, seed=seed)
        return [(job.prompt_token_ids, job.params.max_tokens) for job in jobs]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert {len(ids) for ids, _ in draw(1)} == set(range(2, 10))
    assert {tokens for _, tokens in draw(1)} == {4, 5, 6}


def test_a_file_of_prompts(bench, tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "one two three", "max_new_tokens": 3},
        {"prompt": "four", "temperature": 0.5, "seed": 1},
        {"prompt": "left out"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    code, out, _ = bench("--prompt_file", file, "--output_len", 6, "--num_prompts", 2, "--json")
    assert code == 0
    report = json.loads(out)
    assert (report["requests"], report["output_tokens"]) == (2, 9)


def conversation(question, answer, first="human"):
    return {"conversations": [{"from": first, "value": question}, {"from": "gpt", "value": answer}]}


def test_sharegpt(tmp_path):
    file = tmp_path / "sharegpt.json"
    good = [conversation("q" * n, "a" * (n + 1)) for n in range(4, 10)]
    bad = [
        conversation("q" * 3, "a" * 9),  # too short
        conversation("q" * 9, "a" * 3),
        conversation("q" * 50, "a" * 51),  # longer than the model
        conversation("q" * 9, "a" * 9, first="gpt"),
        {"conversations": [{"from": "human", "value": "alone"}]},
        {"conversations": None},
        "text",
    ]
    file.write_text(json.dumps(bad + good))

    def read(**options):
        asked = {"count": None, "output": None, "max_model_len": 100, "seed": 0} | options
        jobs = workload.sharegpt(file, lambda text: list(text.encode()), **asked)
        return [(len(job.prompt_token_ids), job.params.max_tokens) for job in jobs]

    assert sorted(read()) == [(n, n + 1) for n in range(4, 10)]
    assert len(read(count=3)) == 3
    assert read(count=3) == read(count=3)
    assert sorted(read(output=Lengths(20, 20), max_model_len=26)) == [(4, 20), (5, 20), (6, 20)]


def test_sharegpt_through_the_engine(bench, tmp_path):
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps([conversation("What is this? " * 3, "It is nothing at all.")] * 5))
    code, out, _ = bench("--sharegpt", file, "--num_prompts", 3)
    assert code == 0
    report = json.loads(out.splitlines()[-1])
    assert (report["requests"], report["source"]) == (3, "sharegpt.json")
    assert report["output_tokens"] % 3 == 0


def test_spread():
    seconds = [0.5, 1.0, 2.0, 4.0]
    spread = throughput.Spread.of(seconds)
    assert spread.mean == pytest.approx(1.875)
    assert (spread.p50, spread.p99) == pytest.approx((1.5, np.percentile(seconds, 99)))
    assert throughput.Spread.of([]) is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input_len", "9:4"], "got '9:4', allowed: tokens from 1 to 1048576, as 128 or 16:512"),
        (["--input_len", "0"], "got '0', allowed: tokens"),
        (["--output_len", "1:2:3"], "got '1:2:3', allowed: tokens"),
        (["--input_len", "2000"], "prompt 1: 2000 tokens and 64 to generate, allowed: 1024 together"),
        (
            ["--prompt_file", "a", "--sharegpt", "b"],
            "--prompt_file and --sharegpt: give one source of prompts",
        ),
        (["--sharegpt", "b", "--input_len", "3"], "--sharegpt and --input_len: give one source of prompts"),
        (["--prompt_file", "absent"], "absent: cannot read the prompt file"),
        (["--sharegpt", "absent"], "absent: cannot read the file"),
        (["--sharegpt", __file__], "not valid JSON"),
        (["--sharegpt", MODEL / "config.json"], "got dict, allowed: a list of"),
        (["--max_num_seqs", "0"], "0 is not in the range"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(bench, args, message):
    code, out, err = bench(*args)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_file_without_conversations(bench, tmp_path):
    file = tmp_path / "empty.json"
    file.write_text("[]")
    code, _, err = bench("--sharegpt", file)
    assert code == 2
    assert "no conversation of 4 tokens or more that fits the model's 1024" in err
