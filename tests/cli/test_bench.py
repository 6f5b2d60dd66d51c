"""`llm-boost bench` on the smallest models: what is shown and said, never how fast it was."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from llm_boost import _native
from llm_boost.benchmark import kernels, latency
from llm_boost.benchmark.latency import Case, make_cases, room_for
from llm_boost.benchmark.subject import forget, load_subject, read_config
from llm_boost.engine.native_runner import DTYPES
from llm_boost.models.config import expected_tensors

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "tests" / "golden_models"
SMALL = (
    "--pp", 6, "--pp_depth", "0,40", "--tg", 2, "--depth", "0,40", "--batch", "1,3",
    "--repetitions", 2, "--threads", 1,
)  # fmt: skip
TESTS = ["pp6", "pp6 @ d40", "tg2", "tg2 x3", "tg2 @ d40", "tg2 x3 @ d40"]


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
    config = read_config(model, dummy=dummy)
    room = room_for([Case("tg", 2, 40, 3)])
    return load_subject(model, config, room, dtype=dtype, dummy=dummy, threads=1, cache_dir=cache_dir)


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
    assert cells(lines[0])[:8] == [
        "model", "size", "params", "backend", "threads", "test", "t/s", "first token"
    ]  # fmt: skip
    rows = [cells(line) for line in lines[2:14]]
    assert [(row[0], row[5]) for row in rows] == [
        (f"qwen2 {dtype}", test) for test in TESTS for dtype in ("int8", "bfloat16")
    ]
    assert all(" ± " in row[6] and row[9].endswith(" %") and row[11].endswith(" %") for row in rows)
    assert [bool(row[7]) for row in rows] == [True] * 4 + [False] * 8  # prompts have a first token
    notes = "\n".join(lines[14:-1])
    assert "load int8, to the first token: first start, packing " in notes
    assert "peak memory: " in notes
    report = json.loads(lines[-1])
    assert [model["dtype"] for model in report["models"]] == ["int8", "bfloat16"]
    assert report["machine"]["isa"] == _native.available_isas()[0]
    assert report["machine"]["dot_rates"] == {"int8": 4e11, "fp32": 1e11}
    assert report["peak_memory"] > 1e6
    assert report["left_out"] == []
    start = report["models"][0]["start_seconds"]
    assert start["first"] > 0
    assert start["warm"] > 0


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
    head = 2 * math.prod(shapes["model.embed_tokens.weight"])
    prefill = tests["pp6"]
    seconds = np.mean(prefill["seconds"])
    assert prefill["time_to_first_token"] == pytest.approx(seconds)
    assert prefill["operations_per_second"] == pytest.approx((2 * matrices * 6 + head) / seconds)
    assert prefill["share_of_dot_rate"] == pytest.approx(prefill["operations_per_second"] / 1e11)  # no bf16

    decode = tests["tg2 x3 @ d40"]
    heads = 2 * runner.config.num_layers * runner.config.num_kv_heads
    keys_and_values = heads * (runner.config.head_dim * 2 + 4)  # int16, and a float32 scale
    weights = runner.weight_bytes - math.prod(shapes["model.embed_tokens.weight"]) * 2
    step = weights + 3 * 41.5 * keys_and_values
    assert decode["bytes_per_second"] == pytest.approx(2 * step / np.mean(decode["seconds"]))
    assert decode["share_of_bandwidth"] == pytest.approx(decode["bytes_per_second"] / 10e9)
    operations = 2 * 3 * (2 * matrices + head)
    assert decode["operations_per_second"] == pytest.approx(operations / np.mean(decode["seconds"]))
    speeds = [6 / seconds for seconds in decode["seconds"]]
    assert decode["tokens_per_second"] == pytest.approx(np.mean(speeds))
    assert decode["tokens_per_second_std"] == pytest.approx(np.std(speeds, ddof=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["qwen2", "qwen3", "llama"])
def test_made_weights_give_finite_logits(tmp_path, model, dtype):
    shutil.copy(MODELS / model / "config.json", tmp_path)
    made = subject(tmp_path, dtype, dummy=True, cache_dir=tmp_path).runner
    real = subject(MODELS / model, dtype, dummy=False, cache_dir=tmp_path).runner
    tables = np.array([[0, 1], [4, 5]], np.int32)
    logits = made.run(latency._step(made, tables, 0, 5, logits=True))
    assert logits.shape == (2, made.vocab_size)
    assert np.isfinite(logits).all()
    assert 1e-3 < np.abs(logits).mean() < 1e3
    assert made.weight_bytes == real.weight_bytes


class CountingRunner:
    """Says of each step (sequences, tokens, context, first block); a step takes as long as it is told."""

    vocab_size, max_model_len = 9, 2048

    def __init__(self, step_seconds=0.0):
        self.ran, self.step_seconds, self.now = [], step_seconds, 0.0

    def run(self, batch):
        self.now += self.step_seconds
        lengths, tables = batch.context_lens, batch.block_tables
        self.ran.append((len(lengths), len(batch.token_ids), int(lengths[0]), int(tables[0, 0])))


def test_cases_fill_what_lies_below_their_depth():
    """Before a case every block below its depth has been written, once for all cases, in short prompts."""
    runner = CountingRunner()
    cases = make_cases([3], [0], [1], [600, 0], [1, 2])
    assert [case.name for case in cases] == ["pp3", "tg1", "tg1 x2", "tg1 @ d600", "tg1 x2 @ d600"]
    latency.measure([latency.Subject(runner, None)], cases, 1)
    shallow = [(1, 3, 3, 0)] * 2 + [(1, 1, 1, 0)] * 2 + [(2, 2, 1, 0)] * 2
    fill = [(16, 512, 32, 0), (3, 96, 32, 16)]  # 19 blocks of 32 hold 601 tokens
    second = [(16, 512, 32, 19), (3, 96, 32, 35)]
    assert runner.ran == [
        *shallow, *fill, *[(1, 1, 601, 0)] * 2, *second, *[(2, 2, 601, 0)] * 2
    ]  # fmt: skip


def test_cases_that_would_end_too_late_are_left_out(monkeypatch):
    runner = CountingRunner(step_seconds=1.0)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: runner.now)
    cases = make_cases([512], [0], [4], [0, 1024], [1, 64])
    results, left_out = latency.measure([latency.Subject(runner, None)], cases, 2, seconds=20.0)
    assert [result.case.name for result in results] == ["pp512", "tg4"]
    # 15 s have gone; a step of decode was seen to take 1 s: 2 repetitions of 4, and 3 s or 4 to warm up.
    assert [case.name for case in left_out] == ["tg4 x64", "tg4 @ d1024", "tg4 x64 @ d1024"]
    assert left_out[cases[2]] == pytest.approx(3 + 2 * 4)
    assert left_out[cases[3]] == pytest.approx(33 * 32 / 512 + 3 + 2 * 4)  # 33 blocks to fill first


def test_a_file_is_forgotten_by_the_systems_cache(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 20))
    assert isinstance(forget(file), bool)  # not every file system lets go
    assert file.read_bytes() == bytes(1 << 20)


def test_dtypes_come_in_one_flag_or_in_several(run, tmp_path):
    args = ("bench", "latency", "--model", MODELS / "qwen2", "--cache_dir", tmp_path, *SMALL, "--json")
    one = run(*args, "--dtype", "int8,int4")[1]
    several = run(*args, "--dtype", "int8", "--dtype", "int4", "--dtype", "int8")[1]
    for out in (one, several):
        assert [model["dtype"] for model in json.loads(out)["models"]] == ["int8", "int4"]


def test_quality_stands_beside_speed(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    common = ("--model", MODELS / "qwen2", "--cache_dir", tmp_path)
    code, out, _ = run(
        "bench", "latency", *common, *SMALL, "--dtype", "int8,int4", "--text", text, "--text_tokens", 90
    )
    assert code == 0
    header, row = cells(out.splitlines()[0]), cells(out.splitlines()[2])
    assert header[-2:] == ["KL, nats", "perplexity"]
    report = json.loads(out.splitlines()[-1])
    int8, int4 = (model["quality"] for model in report["models"])
    assert 0 < int8["mean_kl"] < int4["mean_kl"]
    assert row[-2:] == [f"{int8['mean_kl']:.5f}", f"{int8['perplexity']:.3f}"]
    again = run(
        "eval", *common, "--dtype", "int8", "--reference_dtype", "float32", "--file", text,
        "--max_tokens", 90, "--json",
    )  # fmt: skip
    assert json.loads(again[1])["mean_kl"] == int8["mean_kl"]


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "llm_boost.benchmark.plot", raising=False)
    args = ("bench", "latency", "--model", MODELS / "llama", "--cache_dir", tmp_path, *SMALL)
    code, out, err = run(*args, "--plot", tmp_path / "a.png")
    assert (code, out) == (2, "")
    assert 'pip install "llm-boost[plot]"' in err


def test_a_plot_is_a_png(run, tmp_path):
    picture = tmp_path / "roofline.png"
    args = ("bench", "latency", "--model", MODELS / "llama", "--cache_dir", tmp_path, *SMALL)
    assert run(*args, "--dtype", "int8,int4", "--plot", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    ("shape", "parameters"), [("qwen2-7b", 7_615_616_512), ("llama-2-7b", 6_738_415_616)]
)
def test_the_shapes_are_those_of_the_models(shape, parameters):
    shapes = expected_tensors(read_config(ROOT / "benchmarks" / "shapes" / shape, dummy=True))
    assert sum(map(math.prod, shapes.values())) == parameters


def test_kernels_of_every_instruction_set(run):
    args = (
        "bench", "kernels", "--isa", "all", "--rows", 40, "--cols", 96, "--tokens", "1,7",
        "--heads", 4, "--kv_heads", 2, "--head_dim", 16, "--context", "40,64", "--repetitions", 2,
    )  # fmt: skip
    code, out, err = run(*args)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    report = json.loads(lines[-1])
    isas = _native.available_isas()
    linears = [k for k in report["kernels"] if k["kernel"] == "linear"]
    formats = ("float32", "bfloat16", "int8", "int6", "int4")
    assert [(k["format"], k["isa"], k["tokens"]) for k in linears] == [
        (f, isa, t) for f in formats for isa in isas for t in (1, 7)
    ]
    for kernel in linears:
        operations = 2 * 40 * 96 * kernel["tokens"] / np.median(kernel["seconds"])
        assert kernel["operations_per_second"] == pytest.approx(operations)
    activations = [(k["format"], k["isa"]) for k in report["kernels"] if k["kernel"] == "activate"]
    assert activations == [(f, isa) for f in ("float32", "bfloat16", "int8") for isa in isas]
    attentions = [k for k in report["kernels"] if k["kernel"] == "attention"]
    assert [(k["format"], k["isa"], k["size"]) for k in attentions] == [
        (f, isa, size)
        for f in ("float32", "int16", "int8")
        for n in (40, 64)
        for isa in isas
        for size in (f"context {n}", f"prompt {n}")
    ]
    decode = next(k for k in attentions if k["format"] == "int16" and k["size"] == "context 64")
    keys_and_values = 2 * 2 * (16 * 2 + 4) * 64  # a float32 scale for each position and head
    assert decode["bytes_per_second"] == pytest.approx(keys_and_values / np.median(decode["seconds"]))
    assert len(lines) == 2 + len(report["kernels"]) + 2
    assert len({len(line) for line in lines[:-2]}) == 1
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
            ["latency", "--model", MODELS / "qwen2", "--pp", 5000, "--depth", 5000],
            "no test fits; pp5000: 5000 tokens, and the model was made for 1024",
        ),
        (["latency", "--model", MODELS / "qwen2", "--load_format", "gguf"], "'gguf' is not one of"),
        (["latency", "--model", MODELS / "qwen2", "--plot", "a.pdf"], "allowed a name that ends in .png"),
        (["latency", "--model", MODELS / "qwen2", "--plot", "no/a.png"], "allowed a file in a directory"),
        (["latency", "--model", MODELS / "qwen2", "--text", "absent"], "absent: cannot read the text"),
        (
            ["latency", "--model", MODELS / "qwen2", "--load_format", "dummy", "--text", __file__],
            "--text: made weights (--load_format dummy) have no quality to measure",
        ),
        (["kernels", "--heads", 3, "--kv_heads", 2], "allowed: kv_heads divides heads"),
        (
            ["latency", "--model", __file__, "--load_format", "dummy"],
            "allowed a directory with a config.json",
        ),
        (["latency", "--model", MODELS / "qwen2", "--repetitions", "0"], "0 is not in the range"),
        (["kernels", "--isa", "sse9"], "--isa: got 'sse9', allowed here: all, "),
        (
            ["kernels", "--rows", 1 << 20, "--cols", 1 << 20],
            "got 1048576 x 1048576 for 512 tokens, and attention over 2048, which take",
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


def test_what_model_and_memory_have_no_room_for_is_left_out(monkeypatch):
    config = read_config(ROOT / "benchmarks/shapes/llama-2-7b", dummy=True)
    cases = make_cases([2048], [0], [64], [0, 1024, 4096], [1, 16])
    monkeypatch.setattr(latency, "available_memory", lambda: 8 * 10**9)
    fitting, reasons = latency.fitting_cases(cases, config, ["int4"])
    assert [case.name for case in fitting] == ["pp2048", "tg64", "tg64 x16", "tg64 @ d1024"]
    assert {case.name: reason.split(",")[0] for case, reason in reasons.items()} == {
        "tg64 @ d4096": "4160 tokens",
        "tg64 x16 @ d1024": "its cache takes 9.3 GB",
        "tg64 x16 @ d4096": "4160 tokens",
    }
    assert room_for(fitting)["num_blocks"] == 2048 // 32


def test_made_weights_that_do_not_fit_are_refused(run, monkeypatch):
    monkeypatch.setattr(latency, "available_memory", lambda: 2 * 10**9)
    code, _, err = run(
        "bench", "latency", "--model", ROOT / "benchmarks/shapes/llama-2-7b", "--load_format", "dummy"
    )
    assert code == 2
    assert "no test fits; pp128: its cache takes 0.1 GB, 0.0 GB are free" in err


def test_tests_longer_than_the_model_are_left_out_and_named(run, tmp_path):
    args = ("--model", MODELS / "qwen2", "--cache_dir", tmp_path, "--json")
    sizes = ("--pp", 6, "--tg", 2, "--depth", "0,4096", "--batch", 1, "--repetitions", 1)
    code, out, err = run("bench", "latency", *args, *sizes)
    assert code == 0
    assert "left out: tg2 @ d4096: 4098 tokens, and the model was made for 1024" in err
    assert json.loads(out)["left_out"] == ["tg2 @ d4096"]


def test_bench_alone_shows_its_help(run):
    code, out, _ = run("bench")
    assert code == 0
    assert all(name in out for name in ("latency", "throughput", "kernels"))
