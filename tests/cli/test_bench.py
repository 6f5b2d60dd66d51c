"""`llm-boost bench` on the smallest models: what is shown and said, never how fast it was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from llm_boost import _native
from llm_boost.benchmark import kernels, latency
from llm_boost.benchmark.latency import Case, load_subject, make_cases
from llm_boost.engine.native_runner import DTYPES
from llm_boost.models.config import expected_tensors

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "tests" / "golden_models"
SMALL = ("--pp", 6, "--tg", 2, "--depth", "0,40", "--batch", "1,3", "--repetitions", 2, "--threads", 1)
TESTS = ["pp6", "tg2", "tg2 x3", "pp6 @ d40", "tg2 @ d40", "tg2 x3 @ d40"]


@pytest.fixture(autouse=True)
def fixed_limits(monkeypatch):
    monkeypatch.delenv("LLM_BOOST_ISA", raising=False)
    monkeypatch.setattr(kernels, "STREAMED_BYTES", 40_000)
    monkeypatch.setattr(_native, "probe_bandwidth", lambda threads, megabytes: 10e9)
    monkeypatch.setattr(
        _native, "probe_dot_rate", lambda kind, threads: {"int8": 4e11, "fp32": 1e11}.get(kind)
    )


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def subject(model, dtype, *, dummy, cache_dir):
    return load_subject(
        model, [Case("tg", 2, 40, 3)], dtype=dtype, dummy=dummy, threads=1, cache_dir=cache_dir
    )


def test_latency_shows_llama_benchs_table_and_ends_in_json(run, tmp_path):
    code, out, err = run(
        "bench",
        "latency",
        "--model",
        MODELS / "qwen2",
        "--dtype",
        "int8,bf16",
        "--cache_dir",
        tmp_path,
        *SMALL,
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert cells(lines[0])[:7] == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    rows = [cells(line) for line in lines[2:14]]
    assert [(row[0], row[5]) for row in rows] == [
        (f"qwen2 {dtype}", test) for test in TESTS for dtype in ("int8", "bfloat16")
    ]
    assert all(" ± " in row[6] and row[8].endswith(" %") for row in rows)
    assert [row[7].split()[1] for row in rows[:4]] == ["GOP/s", "GOP/s", "GB/s", "GB/s"]
    assert "load, warm: " in lines[15]
    assert "peak memory: " in lines[15]
    report = json.loads(lines[-1])
    assert [model["dtype"] for model in report["models"]] == ["int8", "bfloat16"]
    assert report["machine"]["isa"] == _native.available_isas()[0]
    assert report["machine"]["dot_rates"] == {"int8": 4e11, "fp32": 1e11}
    assert report["peak_memory"] > 1e6


def test_rates_follow_from_the_samples(run, tmp_path):
    code, out, _ = run(
        "bench",
        "latency",
        "--model",
        MODELS / "llama",
        "--dtype",
        "bf16",
        "--cache_dir",
        tmp_path,
        *SMALL,
        "--json",
    )
    assert code == 0
    report = json.loads(out)
    assert out.count("\n") == 1
    tests = {test["test"]: test for test in report["tests"]}
    assert list(tests) == TESTS
    assert all(len(test["seconds"]) == 2 for test in tests.values())

    runner = subject(MODELS / "llama", "bfloat16", dummy=False, cache_dir=tmp_path).runner
    shapes = expected_tensors(runner.config)
    matrices = sum(math.prod(s) for name, s in shapes.items() if ".layers." in name and len(s) == 2)
    prefill = tests["pp6"]
    assert prefill["operations_per_second"] == pytest.approx(2 * matrices * 6 / np.mean(prefill["seconds"]))
    assert prefill["share_of_limit"] == pytest.approx(prefill["operations_per_second"] / 1e11)  # no bf16 dots

    decode = tests["tg2 x3 @ d40"]
    keys_and_values = 2 * runner.config.num_layers * runner.config.num_kv_heads * runner.config.head_dim * 2
    weights = runner.weight_bytes - math.prod(shapes["model.embed_tokens.weight"]) * 2
    step = weights + 3 * 41.5 * keys_and_values
    assert decode["bytes_per_second"] == pytest.approx(2 * step / np.mean(decode["seconds"]))
    assert decode["share_of_limit"] == pytest.approx(decode["bytes_per_second"] / 10e9)
    speeds = [6 / seconds for seconds in decode["seconds"]]
    assert decode["tokens_per_second"] == pytest.approx(np.mean(speeds))
    assert decode["tokens_per_second_std"] == pytest.approx(np.std(speeds, ddof=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["qwen2", "qwen3", "llama"])
def test_made_weights_give_finite_logits(tmp_path, model, dtype):
    shutil.copy(MODELS / model / "config.json", tmp_path)
    made = subject(tmp_path, dtype, dummy=True, cache_dir=tmp_path).runner
    real = subject(MODELS / model, dtype, dummy=False, cache_dir=tmp_path).runner
    logits = made.run(latency._step(made, [0, 2], 0, 5, logits=True))
    assert logits.shape == (2, made.vocab_size)
    assert np.isfinite(logits).all()
    assert 1e-3 < np.abs(logits).mean() < 1e3
    assert made.weight_bytes == real.weight_bytes


def test_cases_fill_what_lies_below_their_depth():
    """A sequence's cache holds `depth` tokens before a case, written once for all cases of that depth."""
    ran = []

    class Runner:
        vocab_size, max_model_len = 9, 2048

        def run(self, batch):
            ran.append((len(batch.context_lens), len(batch.token_ids), int(batch.context_lens[0])))

    latency.measure([latency.Subject(Runner(), None)], make_cases([3], [1], [600, 0], [1, 2]), 1)
    shallow = [(1, 3, 3)] * 2 + [(1, 1, 1)] * 2 + [(2, 2, 1)] * 2
    fill = [(1, 512, 512), (1, 88, 600)]
    deep = [(1, 3, 603)] * 2 + [(1, 1, 601)] * 2
    assert ran == [*shallow, *fill, *deep, *fill, *[(2, 2, 601)] * 2]


@pytest.mark.parametrize(
    ("shape", "parameters"), [("qwen2-7b", 7_615_616_512), ("llama-2-7b", 6_738_415_616)]
)
def test_the_shapes_are_those_of_the_models(shape, parameters):
    config = latency.read_json_object(ROOT / "benchmarks" / "shapes" / shape / "config.json")
    shapes = expected_tensors(latency.ModelConfig.from_hf(config, shape))
    assert sum(map(math.prod, shapes.values())) == parameters


def test_kernels_of_every_instruction_set(run):
    args = (
        "bench",
        "kernels",
        "--isa",
        "all",
        "--rows",
        40,
        "--cols",
        96,
        "--tokens",
        "1,7",
        "--repetitions",
        2,
    )
    code, out, err = run(*args)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    products = json.loads(lines[-1])["products"]
    formats = ("float32", "bfloat16", "int8", "int6", "int4")
    expected = [(f, isa, t) for f in formats for isa in _native.available_isas() for t in (1, 7)]
    assert [(p["format"], p["isa"], p["tokens"]) for p in products] == expected
    assert [(row[0], row[1], int(row[3])) for row in map(cells, lines[2:-2])] == expected
    for product in products:
        operations = 2 * 40 * 96 * product["tokens"] / np.median(product["seconds"])
        assert product["operations_per_second"] == pytest.approx(operations)
    assert [*map(int, {len(line) for line in lines[:-2]})] == [len(lines[0])]
    assert run(*args, "--json")[1].count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["latency"], "no model: give --model"),
        (["latency", "--model", "absent"], "model 'absent': no such directory"),
        (
            ["latency", "--model", MODELS / "qwen2", "--dtype", "int8,int3"],
            "--dtype: got 'int3', allowed: auto",
        ),
        (
            ["latency", "--model", MODELS / "qwen2", "--pp", "0"],
            "got '0', allowed: numbers from 1 to 1048576",
        ),
        (["latency", "--model", MODELS / "qwen2", "--batch", "1,,2"], "got '1,,2', allowed: numbers from 1"),
        (
            ["latency", "--model", MODELS / "qwen2", "--depth", "5000"],
            "takes 5512 tokens, allowed at most 1024",
        ),
        (["latency", "--model", MODELS / "qwen2", "--load_format", "gguf"], "'gguf' is not one of"),
        (
            ["latency", "--model", __file__, "--load_format", "dummy"],
            "allowed a directory with a config.json",
        ),
        (["latency", "--model", MODELS / "qwen2", "--repetitions", "0"], "0 is not in the range"),
        (["kernels", "--isa", "sse9"], "--isa: got 'sse9', allowed here: all, "),
        (
            ["kernels", "--rows", 1 << 20, "--cols", 1 << 20],
            "got 1048576 x 1048576 for 512 tokens, which take",
        ),
        (["speed"], "No such command 'speed'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(run, tmp_path, args, message):
    cache = ("--cache_dir", tmp_path) if args[0] == "latency" else ()
    code, out, err = run("bench", *args, *cache)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_made_weights_that_do_not_fit_are_refused(run, monkeypatch):
    monkeypatch.setattr("llm_boost.benchmark.dummy.available_memory", lambda: 2 * 10**9)
    code, _, err = run(
        "bench", "latency", "--model", ROOT / "benchmarks/shapes/llama-2-7b", "--load_format", "dummy"
    )
    assert code == 2
    assert "allowed 2.0 GB" in err


def test_bench_alone_shows_its_help(run):
    code, out, _ = run("bench")
    assert code == 0
    assert "latency" in out
    assert "kernels" in out
