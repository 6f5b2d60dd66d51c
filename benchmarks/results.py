"""Writes benchmarks/RESULTS.md from what was measured: nothing in it is typed by hand.

    python benchmarks/compare.py ... --json qwen.json
    llm-boost bench latency --model SHAPE --load_format dummy --dtype int4 --json > shape.json
    python benchmarks/results.py qwen.json smollm2.json shape.json ... > benchmarks/RESULTS.md

Takes the JSON files of compare.py and of `llm-boost bench latency`, in any order.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIGA, MEGA = 1e9, 1e6
BITS = {  # what a label says of its weights
    4: ("int4", "Q4_0"),
    8: ("int8", "Q8_0"),
    16: ("bfloat16", "bf16", "BF16"),
}
SMALL = ("qwen2.5-coder-0.5b", "smollm2-135m")
SHAPES = ("qwen2-7b", "llama-2-7b")


class Run:
    """What compare.py measured of one model."""

    def __init__(self, reports: Sequence[dict[str, Any]]) -> None:
        """Of one model. Quality and speed may come from different runs; the last with a figure counts."""
        self.report = max(reports, key=lambda report: report["repeat"])
        engines: dict[str, dict[str, Any]] = {}
        for report in reports:
            for engine in report["engines"]:
                known = engines.setdefault(engine["engine"], {"rows": []})
                known |= {name: value for name, value in engine.items() if name != "rows" or value}
        self.engines = list(engines.values())
        self.texts = next((report["texts"] for report in reports if report["texts"]), [])
        self.model: str = next(e["model"] for e in self.engines if e["engine"].startswith("builtin"))
        self.columns = list(dict.fromkeys(name for e in self.engines for row in e["rows"] for name in row))

    def ours(self, dtype: str) -> dict[str, Any] | None:
        return next((e for e in self.engines if e["engine"] == f"builtin {dtype}"), None)

    def peers(self, bits: int | None = None, name: str = "") -> list[dict[str, Any]]:
        """Of so many bits a weight, or of any."""
        labels = [label for b, many in BITS.items() if bits in (None, b) for label in many]
        return [
            e
            for e in self.engines
            if not e["engine"].startswith("builtin")
            and e["engine"].startswith(name)
            and e["engine"].split()[-1] in labels
        ]


def values(engine: dict[str, Any], column: str) -> list[float]:
    return [row[column] for row in engine["rows"] if column in row]


def median(engine: dict[str, Any], column: str) -> float | None:
    return statistics.median(values(engine, column)) if values(engine, column) else None


def ratio(ours: dict[str, Any], theirs: dict[str, Any], column: str) -> float:
    """Repetition by repetition: the machine's drift met both alike."""
    pairs = zip(values(ours, column), values(theirs, column), strict=True)
    return statistics.median(a / b for a, b in pairs)


# ---- the targets


@dataclass(frozen=True)
class Check:
    what: str
    wanted: str
    reached: str
    holds: bool


class Targets:
    """What the project set itself, and what of it was reached in these runs."""

    def __init__(self, runs: Sequence[Run], latencies: Sequence[dict[str, Any]]) -> None:
        self._runs, self._latencies = runs, latencies
        self.checks: list[Check] = []
        qwen, smollm = (next((r for r in runs if r.model.startswith(name)), None) for name in SMALL)
        if qwen:
            self._beside_peers(qwen)
        self._limits()
        if smollm:
            for dtype, peer in (("int4", "Q4_0"), ("int8", "Q8_0"), ("bfloat16", "BF16")):
                self._faster(
                    smollm, "tg64", dtype, 1.5, smollm.peers(name=f"llama_cpp {peer}"), "SmolLM2-135M: "
                )
        self._starts()

    def _beside_peers(self, run: Run) -> None:
        for dtype, bits, least in (("int4", 4, 1.5), ("int8", 8, 1.35), ("bfloat16", 16, 1.02)):
            self._faster(run, "tg64", dtype, least, run.peers(bits))
        for dtype, peer, most in (("int4", "Q4_0", 0.7), ("int8", "Q8_0", 1.0)):
            self._closer(run, dtype, f"llama_cpp {peer}", most)
        for column in ("pp512", "pp2048"):
            for dtype in ("int8", "int4"):
                self._faster(run, column, dtype, 1.5, run.peers())
        self._faster(run, "pp512", "bfloat16", 1.1, run.peers(16))
        for dtype in ("int8", "int4"):
            self._faster(run, "batch16", dtype, 1.8, run.peers())

    def _faster(
        self, run: Run, column: str, dtype: str, least: float, peers: Sequence[dict[str, Any]], of: str = ""
    ) -> None:
        ours, peers = run.ours(dtype), [p for p in peers if median(p, column) is not None]
        if ours is None or not peers or median(ours, column) is None:
            return
        best = max(peers, key=lambda peer: median(peer, column) or 0.0)
        reached = ratio(ours, best, column)
        self._add(
            f"{of}{column}, {dtype}, beside the best peer",
            f"at least {least:g} x",
            f"{reached:.2f} x {best['engine']}",
            reached >= least,
        )

    def _closer(self, run: Run, dtype: str, peer: str, most: float) -> None:
        ours, theirs = run.ours(dtype), next((e for e in run.engines if e["engine"] == peer), None)
        if ours is None or theirs is None or "kl" not in ours or "kl" not in theirs:
            return
        reached = ours["kl"] / theirs["kl"]
        self._add(
            f"KL divergence, {dtype}, of {peer}'s", f"at most {most:g} x", f"{reached:.2f} x", reached <= most
        )

    def _limits(self) -> None:
        shares = {"int4": 0.92, "int8": 0.95, "bfloat16": 0.95}
        for report in self._latencies:
            shape = report["model"] in SHAPES
            for test in report["tests"]:
                name, dtype = f"{report['model']}: {test['test']}, {test['dtype']}", test["dtype"]
                if test["test"] == "tg64" and (shape or dtype == "int4"):
                    self._share(
                        f"{name}, of the read bandwidth",
                        test["share_of_bandwidth"],
                        shares[dtype] if shape else 0.85,
                    )
                if shape and test["test"] in ("pp512", "pp2048") and dtype in ("int8", "int4"):
                    self._share(f"{name}, of the int8 dot rate", test["share_of_dot_rate"], 0.75)
                if test["test"] == "pp512" and dtype == "bfloat16":
                    self._share(f"{name}, of the bfloat16 dot rate", test["share_of_dot_rate"], 0.85)
            self._depth(report)

    def _share(self, what: str, reached: float, least: float) -> None:
        self._add(what, f"at least {least:g}", f"{reached:.2f}", reached >= least)

    def _depth(self, report: dict[str, Any]) -> None:
        """A step after 4096 tokens may cost more by what reading their keys and values takes at 0.8."""
        bandwidth = report["machine"]["read_bandwidth"]
        for dtype in dict.fromkeys(test["dtype"] for test in report["tests"]):
            tests = {t["test"]: t for t in report["tests"] if t["dtype"] == dtype}
            if not {"tg64", "tg64 @ d4096"} <= tests.keys():
                continue
            near, far = (statistics.median(tests[name]["seconds"]) / 64 for name in ("tg64", "tg64 @ d4096"))
            step_bytes = [
                t["bytes_per_second"] * statistics.mean(t["seconds"]) / 64
                for t in (tests["tg64"], tests["tg64 @ d4096"])
            ]
            allowed = (step_bytes[1] - step_bytes[0]) / (0.8 * bandwidth)
            self._add(
                f"{report['model']}: a step at depth 4096, {dtype}",
                f"at most {1e3 * allowed:.2f} ms more",
                f"{1e3 * (far - near):.2f} ms more",
                far - near <= allowed,
            )

    def _starts(self) -> None:
        for report in self._latencies:
            for model in report["models"]:
                start = model["start_seconds"]
                if start and report["model"].startswith(SMALL[0]):
                    self._add(
                        f"{report['model']}: warm start to the first token, {model['dtype']}",
                        "under 0.5 s",
                        f"{start['warm']:.2f} s",
                        start["warm"] < 0.5,
                    )
            if len(report["models"]) == 1:
                (model,) = report["models"]
                rest = report["peak_memory"] - model["weight_bytes"] - model["cache_bytes"]
                self._add(
                    f"{report['model']}: memory beyond weights and cache, {model['dtype']}",
                    "at most 150 MB",
                    f"{rest / MEGA:.0f} MB",
                    rest <= 150 * MEGA,
                )

    def _add(self, what: str, wanted: str, reached: str, holds: bool) -> None:
        self.checks.append(Check(what, wanted, reached, holds))


# ---- the page


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def comparison(run: Run) -> str:
    header = ["engine", *(f"{column}, tokens/s" for column in run.columns)]
    header += ["KL, nats", "perplexity", "peak memory, GB"]
    rows = []
    for engine in run.engines:
        cells = [engine["engine"]]
        for column in run.columns:
            all_of = values(engine, column)
            spread = (
                f"{statistics.median(all_of):.1f} ({min(all_of):.1f} to {max(all_of):.1f})" if all_of else ""
            )
            cells.append(spread)
        cells += [
            f"{engine[name]:.{digits}f}" if name in engine else ""
            for name, digits in (("kl", 5), ("perplexity", 3))
        ]
        rows.append([*cells, f"{engine['peak_memory'] / GIGA:.2f}"])
    return table(header, rows)


def latency(report: dict[str, Any]) -> str:
    header = ["test", "dtype", "tokens/s", "first token, ms", "GB/s", "of limit", "GOP/s", "of limit"]
    rows = []
    for test in report["tests"]:
        first = test["time_to_first_token"]
        rows.append(
            [
                test["test"],
                test["dtype"],
                f"{test['tokens_per_second']:.2f} ± {test['tokens_per_second_std']:.2f}",
                "" if first is None else f"{1e3 * first:.0f}",
                f"{test['bytes_per_second'] / GIGA:.1f}",
                f"{100 * test['share_of_bandwidth']:.0f} %",
                f"{test['operations_per_second'] / GIGA:.0f}",
                f"{100 * test['share_of_dot_rate']:.0f} %",
            ]
        )
    return table(header, rows)


def machine(about: dict[str, Any]) -> str:
    rates = ", ".join(f"{kind} {rate / GIGA:.0f}" for kind, rate in about["dot_rates"].items())
    return (
        f"{about['processor']}, {about['threads']} threads, {about['isa']}; measured limits: "
        f"{about['read_bandwidth'] / GIGA:.1f} GB/s read, GOP/s of dots: {rates}"
    )


def compare_section(run: Run) -> str:
    report = run.report
    versions = sorted(
        {engine["version"] for engine in run.engines if not engine["engine"].startswith("builtin")}
    )
    arguments = " ".join(f"{e['engine'].replace(' ', ':')}={e['model']}" for e in run.engines)
    return "\n".join(
        [
            f"## {run.model}, beside other engines",
            "",
            f"{report['date']}, {machine(report['machine'])}. All in one run, taking turns; medians of "
            f"{report['repeat']} repetitions (of the long tests {(report['repeat'] + 1) // 2}), with the "
            "lowest and the highest. pp: prefill of a prompt; tg64: decode after the first of these prompts; "
            "batch16: output tokens a second of 16 sequences, 128 tokens in, 64 out.",
            "",
            comparison(run),
            "",
            f"KL is the mean of KL(float32 || engine) over {run.engines[0].get('scored_tokens', 0)} tokens "
            f"of {', '.join(run.texts)}. {'; '.join(versions)}.",
            "",
            "```bash",
            f"python benchmarks/compare.py {arguments} {report['arguments']}",
            "```",
        ]
    )


def latency_section(report: dict[str, Any]) -> str:
    dtypes = ",".join(model["dtype"] for model in report["models"])
    dummy = " --load_format dummy" if report["load_format"] == "dummy" else ""
    made = " with made weights" if dummy else ""
    lines = [
        f"## {report['model']}{made}, {dtypes}, beside the machine's limits",
        "",
        f"{machine(report['machine'])}.",
        "",
        latency(report),
        "",
    ]
    for model in report["models"]:
        memory = f"weights {model['weight_bytes'] / GIGA:.2f} GB, cache {model['cache_bytes'] / GIGA:.2f} GB"
        start = model["start_seconds"]
        times = (
            "".join(f"; {what} start {s:.2f} s" for what, s in start.items() if s is not None)
            if start
            else ""
        )
        lines.append(f"{model['dtype']}: {memory}{times}.")
    left_out = f" Left out: {', '.join(report['left_out'])}." if report["left_out"] else ""
    return "\n".join(
        [
            *lines,
            f"Peak memory: {report['peak_memory'] / GIGA:.2f} GB.{left_out}",
            "",
            "```bash",
            f"llm-boost bench latency --model {report['model']}{dummy} --dtype {dtypes}",
            "```",
        ]
    )


def page(runs: Sequence[Run], latencies: Sequence[dict[str, Any]]) -> str:
    checks = Targets(runs, latencies).checks
    rows = [[c.what, c.wanted, c.reached, "yes" if c.holds else "**no**"] for c in checks]
    version = next(
        (e["version"] for run in runs for e in run.engines if e["engine"].startswith("builtin")), ""
    )
    sections = [
        "# Results",
        f"LLM Boost {version}. Written by `benchmarks/results.py` from the measurements; do not edit. "
        "What was tried on the way here is in [the diary](DIARY.md).",
        "## Targets",
        f"{sum(c.holds for c in checks)} of {len(checks)} hold.",
        table(["what", "wanted", "reached", "holds"], rows),
        *(compare_section(run) for run in runs),
        *(latency_section(report) for report in latencies),
    ]
    return "\n\n".join(sections) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    reports = [
        json.loads(path.read_text().splitlines()[-1] if path.suffix == ".txt" else path.read_text())
        for path in parser.parse_args().files
    ]
    compared: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        if "engines" in report:
            compared.setdefault(report["engines"][0]["model"], []).append(report)
    runs = [Run(same) for same in compared.values()]
    print(page(runs, [report for report in reports if "tests" in report]), end="")


if __name__ == "__main__":
    main()
