"""The scripts of benchmarks/: engines in turns through their workers, and the page of the figures."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "tests" / "golden_models" / "qwen2"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


results, regenerate = script("results"), script("regenerate")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compare")
    text, out = folder / "text.txt", folder / "run.json"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog is not amused at all. " * 60)
    arguments = [f"builtin:{dtype}={MODEL}" for dtype in ("int8", "int4")]
    arguments += [
        "--prompt",
        "12,20",
        "--new",
        "3",
        "--batch",
        "2",
        "--repeat",
        "2",
        "--patience",
        "0",
        "--threads",
        "1",
        "--vocabulary",
        "200",
    ]
    arguments += ["--text", str(text), "--text_tokens", "512", "--json", str(out)]
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(out.read_text())
    report["table"] = done.stdout
    return report


def test_engines_take_turns_and_their_quality_stands_beside(compared: dict[str, Any]) -> None:
    int8, int4 = compared["engines"]
    assert (int8["engine"], int4["engine"]) == ("builtin int8", "builtin int4")
    assert 0 < int8["kl"] < int4["kl"]
    assert int8["scored_tokens"] == 511
    for engine in (int8, int4):
        columns = [sorted(row.keys() - {"others"}) for row in engine["rows"]]
        assert columns == [["pp12", "tg3"], ["pp12", "tg3"], ["pp20"], ["batch2"]]
        assert all(value > 0 for row in engine["rows"] for name, value in row.items() if name != "others")
        assert all(0 <= row["others"] <= 1 for row in engine["rows"])
        assert engine["peak_memory"] > 1e6
    assert "| builtin int4 |" in compared["table"]
    assert f"{int4['kl']:.5g}" in compared["table"]


def test_the_page_of_a_real_run(compared: dict[str, Any]) -> None:
    page = results.page([results.Run([compared])], [])
    assert "## qwen2, beside other engines" in page
    assert "others, tokens/s" not in page
    most = max(row["others"] for engine in compared["engines"] for row in engine["rows"])
    assert f"{100 * most:.0f} % at most" in page
    assert f"| {compared['engines'][0]['kl']:.5f} |" in page
    assert "builtin:int8=qwen2 builtin:int4=qwen2 --prompt 12,20 --new 3 --batch 2 --repeat 2" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["builtin:int8"], "expected ENGINE[:LABEL]=MODEL[@PYTHON], with ENGINE one of builtin, llama_cpp"),
        (["other=a"], "with ENGINE one of builtin"),
    ],
)
def test_wrong_engines_are_named(arguments: list[str], message: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert message in done.stderr


def engine(name: str, speeds: list[float], kl: float | None = None) -> dict[str, Any]:
    quality = {} if kl is None else {"kl": kl, "perplexity": 9.0, "scored_tokens": 100}
    rows = [{"tg64": speed} for speed in speeds]
    return {
        "engine": name,
        "model": "qwen2.5-coder-0.5b",
        "version": "1",
        "peak_memory": 1e9,
        **quality,
        "rows": rows,
    }


def report(engines: list[dict[str, Any]], repeat: int = 3) -> dict[str, Any]:
    machine = {
        "processor": "P",
        "isa": "avx2",
        "threads": 2,
        "read_bandwidth": 20e9,
        "dot_rates": {"int8": 4e11},
    }
    return {
        "date": "2026-01-01",
        "machine": machine,
        "texts": ["a.txt"],
        "repeat": repeat,
        "arguments": "",
        "engines": engines,
    }


def checks(runs: list[Any], latencies: list[dict[str, Any]]) -> dict[str, tuple[str, bool]]:
    return {c.what: (c.reached, c.holds) for c in results.Targets(runs, latencies).checks}


def test_ratios_are_taken_repetition_by_repetition() -> None:
    """The machine halved its speed in the second repetition, for all alike."""
    ours = engine("builtin int4", [150.0, 80.0, 160.0], kl=0.03)
    run = results.Run(
        [
            report(
                [
                    ours,
                    engine("llama_cpp Q4_0", [100.0, 50.0, 100.0], kl=0.04),
                    engine("openvino int4", [60.0, 30.0, 50.0]),
                ]
            )
        ]
    )
    found = checks([run], [])
    assert found["tg64, int4, beside the best peer"] == ("1.60 x llama_cpp Q4_0", True)
    assert found["KL divergence, int4, of llama_cpp Q4_0's"] == ("0.75 x", False)


def test_quality_and_speed_may_come_from_two_runs() -> None:
    quality = report([engine("builtin int8", [], kl=0.1), engine("llama_cpp Q8_0", [], kl=0.2)], repeat=0)
    speed = report([engine("builtin int8", [3.0] * 3), engine("llama_cpp Q8_0", [1.0] * 3)])
    for order in ([quality, speed], [speed, quality]):
        found = checks([results.Run(order)], [])
        assert found["tg64, int8, beside the best peer"] == ("3.00 x llama_cpp Q8_0", True)
        assert found["KL divergence, int8, of llama_cpp Q8_0's"] == ("0.50 x", True)


def test_depth_may_cost_what_reading_the_cache_costs() -> None:
    def test(name: str, step: float, step_bytes: float) -> dict[str, Any]:
        return {
            "test": name,
            "dtype": "int4",
            "seconds": [64 * step],
            "bytes_per_second": step_bytes / step,
            "share_of_bandwidth": 0.9,
            "share_of_dot_rate": 0.1,
        }

    def found(deep_step: float) -> tuple[str, bool]:
        latency = report([]) | {"model": "llama-2-7b", "models": []}
        latency["tests"] = [test("tg64", 0.1, 2e9), test("tg64 @ d4096", deep_step, 3.6e9)]
        return checks([], [latency])["llama-2-7b: a step at depth 4096, int4"]

    # 1.6 GB more at 0.8 of 20 GB/s is 100 ms.
    assert found(0.19) == ("90.00 ms more", True)
    assert found(0.21) == ("110.00 ms more", False)


def test_what_is_not_installed_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models, peers, exports = tmp_path / "models", tmp_path / "peers", tmp_path / "exports"
    for file in (
        peers / "llama_cpp/bin/python",
        exports / "m-q4_0.gguf",
        exports / "m-openvino-int8/model.xml",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = regenerate.engines("m", SimpleNamespace(models=models, peers=peers, exports=exports))
    assert found == [
        *(f"builtin:{dtype}={models}/m" for dtype in ("int4", "int8", "bfloat16")),
        f"llama_cpp:Q4_0={exports}/m-q4_0.gguf@{peers}/llama_cpp/bin/python",
    ]
    assert f"left out: openvino int8: no {peers}/openvino/bin/python" in capsys.readouterr().err


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    out, command = tmp_path / "a.json", [sys.executable, "-c", "print('{}')"]
    assert regenerate.measure(out, command, writes=False).read_text() == "{}\n"
    out.write_text("kept")
    assert regenerate.measure(out, command, writes=False).read_text() == "kept"
