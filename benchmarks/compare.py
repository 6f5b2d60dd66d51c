"""Speed of the built-in engine beside other engines, in one run, taking turns: ours, theirs, ours, theirs.

A worker process an engine holds its model and runs one repetition when asked, so that drift of the machine
falls on all alike; ratios are taken repetition by repetition. Other engines live in their own environments:

    python benchmarks/compare.py builtin:int4=DIR builtin:int8=DIR llama_cpp=FILE.gguf@/path/to/python

Each argument is ENGINE[:DTYPE]=MODEL[@PYTHON]. Prints a table with ratios to the first engine,
and one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent / "workers"


@dataclass
class Worker:
    label: str
    process: subprocess.Popen[str]
    rows: list[dict[str, float]]

    def ask(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.label}: the worker ended with code {self.process.wait()}")
        self.rows.append(json.loads(line))
        print(f"{self.label}: {line.strip()}", file=sys.stderr)

    def median(self, name: str) -> float:
        return statistics.median(row[name] for row in self.rows)


def start(argument: str, options: argparse.Namespace) -> Worker:
    head, _, rest = argument.partition("=")
    model, _, python = rest.partition("@")
    engine, _, dtype = head.partition(":")
    script = WORKERS / f"run_{engine}.py"
    if not model or not script.exists():
        known = ", ".join(sorted(path.stem.removeprefix("run_") for path in WORKERS.glob("run_*.py")))
        sys.exit(f"{argument}: expected ENGINE[:DTYPE]=MODEL[@PYTHON], with ENGINE one of {known}")
    sizes = [str(x) for x in (options.prompt, options.new, options.batch, options.threads)]
    process = subprocess.Popen(
        [python or sys.executable, str(script), model, dtype, *sizes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Worker(f"{head} {Path(model).name}", process, [])


def table(workers: list[Worker], columns: list[str]) -> str:
    first = workers[0]
    lines = ["| engine | " + " | ".join(f"{c} tok/s (of {first.label})" for c in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for worker in workers:
        cells = []
        for column in columns:
            ratios = [a[column] / b[column] for a, b in zip(worker.rows, first.rows, strict=True)]
            spread = [row[column] for row in worker.rows]
            cells.append(
                f"{worker.median(column):.1f} [{min(spread):.1f}, {max(spread):.1f}] "
                f"(x {statistics.median(ratios):.2f})"
            )
        lines.append(f"| {worker.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engines", nargs="+", metavar="ENGINE[:DTYPE]=MODEL[@PYTHON]")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: 512)")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded (default: 64)")
    parser.add_argument(
        "--batch", type=int, default=16, help="sequences of 128 + 64 tokens (default: 16; 0: none)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    workers = [start(argument, options) for argument in options.engines]
    for repetition in range(options.repeat + 1):
        for worker in workers:
            worker.ask()
            if repetition == 0:  # warm-up
                worker.rows.clear()
    columns = [c for c in workers[0].rows[0] if all(c in worker.rows[0] for worker in workers)]
    print(table(workers, columns))
    result: dict[str, Any] = {worker.label: worker.rows for worker in workers}
    print(json.dumps(result))
    for worker in workers:
        worker.process.stdin.close()  # type: ignore[union-attr]
        worker.process.wait()


if __name__ == "__main__":
    main()
