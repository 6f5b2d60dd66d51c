"""Measures everything that RESULTS.md shows, and writes it: one command, for an idle machine.

    python benchmarks/regenerate.py --models DIR --peers DIR --exports DIR --out DIR

--models holds checkpoints NAME/ and their NAME.gguf in BF16; --peers a virtual environment for each engine
(llama_cpp, openvino, vllm, onnxruntime; what is missing is left out); --exports what was made of the models
for them: NAME-q4_0.gguf, NAME-q8_0.gguf, NAME-openvino-int8/, NAME-openvino-int4/, NAME-onnx-int4/
(docs/benchmark.md says how). A part whose JSON file is in --out already is not measured again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
MODELS = ("qwen2.5-coder-0.5b-smooth", "smollm2-135m-smooth")
SHAPES = (
    ("qwen2-7b", "int4"),
    ("qwen2-7b", "int8"),
    ("qwen2-7b", "bf16"),
    ("llama-2-7b", "int4"),
    ("llama-2-7b", "int8"),
)
TEXTS = ("src/llm_boost/models/rope.py", "LICENSE")


def engines(model: str, options: argparse.Namespace) -> list[str]:
    """compare.py's arguments, of what is there."""
    models, exports = options.models, options.exports
    ours = [f"builtin:{dtype}={models / model}" for dtype in ("int4", "int8", "bfloat16")]
    theirs = [
        ("llama_cpp", "Q4_0", exports / f"{model}-q4_0.gguf"),
        ("llama_cpp", "Q8_0", exports / f"{model}-q8_0.gguf"),
        ("llama_cpp", "BF16", models / f"{model}.gguf"),
        ("openvino", "int4", exports / f"{model}-openvino-int4"),
        ("openvino", "int8", exports / f"{model}-openvino-int8"),
        ("onnxruntime", "int4", exports / f"{model}-onnx-int4"),
        ("vllm", "bf16", models / model),
    ]
    found = []
    for engine, label, path in theirs:
        python = options.peers / engine / "bin" / "python"
        if path.exists() and python.exists():
            found.append(f"{engine}:{label}={path}@{python}")
        else:
            print(f"left out: {engine} {label}: no {path if python.exists() else python}", file=sys.stderr)
    return ours + found


def compare(model: str, out: Path, options: argparse.Namespace) -> list[str]:
    texts = [str(HERE.parent / text) for text in TEXTS]
    sizes = ["--prompt", "512,2048", "--new", "64", "--batch", "16", "--threads", str(options.threads)]
    return [
        sys.executable, str(HERE / "compare.py"), *engines(model, options), *sizes,
        "--repeat", str(options.repeat), "--text", *texts, "--json", str(out),
    ]  # fmt: skip


def latency(model: Path, dtype: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "llm_boost.cli.main", "bench", "latency", "--model", str(model)]
    return [*command, "--dtype", dtype, *arguments, "--json"]


def measure(out: Path, command: list[str], *, writes: bool) -> Path:
    """Runs the command unless its file is there; one that does not write the file itself prints it."""
    if not out.exists():
        print(f"measuring {out.name}", file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        if not writes:
            out.write_text(done.stdout)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("models", "peers", "exports", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    files = []
    for model in MODELS:
        out = options.out / f"compare-{model}.json"
        files.append(measure(out, compare(model, out, options), writes=True))
    small = options.models / MODELS[0]
    deep = ("--pp", "512,2048", "--depth", "0,4096", "--batch", "1")
    for dtype in ("int4", "int8", "bf16"):
        out = options.out / f"latency-{MODELS[0]}-{dtype}.json"
        files.append(measure(out, latency(small, dtype, *deep), writes=False))
    for shape, dtype in SHAPES:
        out = options.out / f"latency-{shape}-{dtype}.json"
        sizes = ("--pp", "512", "--depth", "0", "--batch", "1", "--repetitions", "3")
        tests = deep if dtype == "int4" else sizes
        made = latency(HERE / "shapes" / shape, dtype, "--load_format", "dummy", *tests)
        files.append(measure(out, made, writes=False))
    command = [sys.executable, str(HERE / "results.py"), *map(str, files)]
    page = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    (HERE / "RESULTS.md").write_text(page.stdout)


if __name__ == "__main__":
    main()
