"""Speed and quality of the built-in engine beside others, in one run, taking turns: ours, theirs, ours.

A worker process an engine holds its model and does what it is asked, so that drift of the machine falls on
all alike; ratios are taken repetition by repetition. Other engines live in their own environments:

    python benchmarks/compare.py builtin:int4=DIR builtin:int8=DIR llama_cpp:Q4_0=FILE.gguf@/path/to/python \\
        --text ARCHITECTURE.md --json run.json

Each argument is ENGINE[:LABEL]=MODEL[@PYTHON]; the built-in engine's LABEL is its dtype. With --text, each
engine's KL divergence from the first built-in model in float32 stands beside its speed. Prints a table with
ratios to the first engine; benchmarks/results.py makes RESULTS.md of the JSON files of several runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

WORKERS = Path(__file__).parent / "workers"
WINDOW = 512  # tokens that quality is measured on at a time
PAUSE_SECONDS = 0.3  # between engines: threads that spin after their work have gone to sleep
CALM = 0.05  # of the processors' time that others may take while an engine is measured
ATTEMPTS = 3  # the calmest of them counts


@dataclass
class Worker:
    label: str
    model: str
    process: subprocess.Popen[str]
    about: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.label}: the worker ended with code {self.process.wait()}")
        return json.loads(line)

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


@contextlib.contextmanager
def started(argument: str, options: argparse.Namespace) -> Iterator[Worker]:
    """A worker that has loaded its model; it ends with the block."""
    head, _, rest = argument.partition("=")
    model, _, python = rest.partition("@")
    engine, _, label = head.partition(":")
    script = WORKERS / f"run_{engine}.py"
    if not model or not script.exists():
        known = ", ".join(sorted(path.stem.removeprefix("run_") for path in WORKERS.glob("run_*.py")))
        sys.exit(f"{argument}: expected ENGINE[:LABEL]=MODEL[@PYTHON], with ENGINE one of {known}")
    longest = max(WINDOW, *(prompt + options.new + 8 for prompt in options.prompt))
    sizes = [str(x) for x in (options.threads, longest, options.batch, options.vocabulary)]
    process = subprocess.Popen(
        [python or sys.executable, str(script), model, label, *sizes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
    )
    worker = Worker(f"{engine} {label}".strip(), Path(model).name, process)
    try:
        worker.about = worker.answer()
        print(f"{worker.label}: {worker.about}", file=sys.stderr)
        yield worker
    finally:
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()


def processor_seconds() -> float:
    """That all processors have worked since the machine started, for whomever (Linux)."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def process_seconds(process: int) -> float:
    with open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def undisturbed(worker: Worker, request: dict[str, Any], patience: float) -> dict[str, float]:
    """The answer, with the share of the processors' time that others took meanwhile; tried again if large."""
    answers = []
    for _ in range(ATTEMPTS if patience else 1):
        wait_for_calm(patience)
        start, all_before, own_before = time.time(), processor_seconds(), process_seconds(worker.process.pid)
        row = worker.ask(**request)
        seconds = (time.time() - start) * (os.cpu_count() or 1)
        others = processor_seconds() - all_before - (process_seconds(worker.process.pid) - own_before)
        row["others"] = min(max(others / seconds, 0.0), 1.0)  # clock ticks are coarse
        answers.append(row)
        if row["others"] <= CALM:
            break
    return min(answers, key=lambda row: row["others"])


def wait_for_calm(patience: float) -> None:
    """Until other processes have left the machine alone for a moment, or so many seconds are over."""
    end = time.time() + patience
    while time.time() < end:
        before = processor_seconds()
        time.sleep(PAUSE_SECONDS)
        if processor_seconds() - before <= CALM * PAUSE_SECONDS * (os.cpu_count() or 1):
            return


def measure_speed(workers: list[Worker], options: argparse.Namespace) -> None:
    """The first test has a warm-up and all repetitions; the others are long, and have half of them."""
    first, *others = options.prompt
    asked: list[dict[str, Any]] = [{"ask": "single", "prompt": first, "new": options.new}]
    asked += [{"ask": "single", "prompt": prompt, "new": 1} for prompt in others]
    asked += [{"ask": "many"}] if options.batch else []
    for number, request in enumerate(asked):
        measured = options.repeat if number == 0 else (options.repeat + 1) // 2
        for repetition in range(measured + 1 if number == 0 else measured):
            for worker in workers:
                is_warm_up = not repetition and not number
                row = worker.ask(**request) if is_warm_up else undisturbed(worker, request, options.patience)
                print(f"{worker.label}: {row}", file=sys.stderr)
                if not is_warm_up:
                    worker.rows.append(row)


def measure_quality(workers: list[Worker], options: argparse.Namespace) -> None:
    """Against the first built-in engine's model in float32, on the first tokens of each text."""
    ours = next((argument for argument in options.engines if argument.startswith("builtin")), None)
    if ours is None:
        sys.exit("--text: one of the engines has to be builtin, whose model in float32 is the reference")
    model = ours.partition("=")[2].partition("@")[0]
    with tempfile.TemporaryDirectory() as folder:
        tokens, reference = f"{folder}/tokens.npy", f"{folder}/reference.npy"
        np.save(tokens, windows(model, options.text, options.text_tokens))
        with started(f"builtin:float32={model}", options) as worker:
            worker.ask(ask="reference", tokens=tokens, file=reference)
        for worker in workers:
            worker.about |= worker.ask(ask="quality", tokens=tokens, file=reference)
            print(f"{worker.label}: {worker.about}", file=sys.stderr)


def windows(model: str, texts: list[Path], count: int) -> np.ndarray:
    """[windows, WINDOW] token ids."""
    from llm_boost.tokenization import load_tokenizer

    tokenizer = load_tokenizer(Path(model))
    found: list[list[int]] = []
    for text in texts:
        ids = tokenizer.encode(text.read_text("utf-8"), add_special_tokens=False)[:count]
        found += [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    if not found:
        sys.exit(f"--text: less than {WINDOW} tokens in each of {', '.join(map(str, texts))}")
    return np.array(found, np.int64)


def table(workers: list[Worker]) -> str:
    first = workers[0]
    names = dict.fromkeys(name for worker in workers for row in worker.rows for name in row)
    columns = [name for name in names if name != "others"]
    header = ["engine", *(f"{c}, tok/s (of {first.label})" for c in columns), "KL, nats", "perplexity"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for worker in workers:
        cells = [worker.label]
        for column in columns:
            values, ours = worker.values(column), first.values(column)
            cell = f"{statistics.median(values):.1f} [{min(values):.1f}, {max(values):.1f}]" if values else ""
            if values and ours:
                ratios = [a / b for a, b in zip(values, ours, strict=True)]
                cell += f" (x {statistics.median(ratios):.2f})"
            cells.append(cell)
        cells += [
            f"{worker.about[name]:.5g}" if name in worker.about else "" for name in ("kl", "perplexity")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(workers: list[Worker], options: argparse.Namespace) -> dict[str, Any]:
    from llm_boost.benchmark.limits import Limits
    from llm_boost.cli.bench_report import machine
    from llm_boost.engine.native_runner import choose_isa

    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(Limits(options.threads), [choose_isa()]),
        "texts": [text.name for text in options.text],
        "repeat": options.repeat,
        "arguments": f"--prompt {','.join(map(str, options.prompt))} --new {options.new} "
        f"--batch {options.batch} --repeat {options.repeat} --threads {options.threads}",
        "engines": [
            {"engine": w.label, "model": w.model, **w.about, **w.ask(ask="memory"), "rows": w.rows}
            for w in workers
        ],
    }


def lengths(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engines", nargs="+", metavar="ENGINE[:LABEL]=MODEL[@PYTHON]")
    parser.add_argument("--prompt", type=lengths, default=[512], help="tokens of prompts, as 512,2048")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded after the first prompt")
    parser.add_argument("--batch", type=int, default=16, help="sequences of 128 + 64 tokens; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=40000, help="random prompts have ids below")
    parser.add_argument("--repeat", type=int, default=5, help="0: quality alone")
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for a calm machine")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="measure quality on these")
    parser.add_argument("--text_tokens", type=int, default=1024, help="of each text (default: 1024)")
    parser.add_argument("--wait", action="store_true", help="load, then wait for a line on standard input")
    parser.add_argument("--json", type=Path, help="write everything that was measured")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(started(argument, options)) for argument in options.engines]
        if options.text:
            measure_quality(workers, options)
        if options.wait:
            print("loaded; a line on standard input starts the measurement", file=sys.stderr, flush=True)
            sys.stdin.readline()
        if options.repeat:
            measure_speed(workers, options)
        print(table(workers))
        if options.json:
            options.json.write_text(json.dumps(report(workers, options), indent=1) + "\n")


if __name__ == "__main__":
    main()
