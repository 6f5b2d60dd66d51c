"""The arrows of ARCHITECTURE.md: which room may import which, and who knows a vector register."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "llm_boost"

# A room, and the rooms it may import besides itself. "llm_boost" is the public face: LLM and its like.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "suggest": set(),
    "protobuf": set(),
    "worker_process": set(),
    "checkpoint": {"errors", "protobuf", "suggest"},
    "tokenization": {"errors", "protobuf", "worker_process"},
    "config": {"errors", "suggest"},
    "models": {"_native", "checkpoint", "errors"},
    "engine": {"_native", "checkpoint", "errors", "models", "tokenization", "worker_process"},
    "convert": {"checkpoint", "errors", "models", "suggest", "tokenization"},
    "llm_boost": {"engine"},
    "evaluation": {"engine", "errors"},
    "benchmark": {"_native", "checkpoint", "engine", "errors", "models"},
    "backends": {"checkpoint", "config", "engine", "errors", "models", "suggest", "tokenization"},
    # of the engine its data alone: outputs, prompts, sampling parameters, stats
    "service": {"backends", "config", "engine", "errors", "llm_boost", "suggest"},
    "quantize": {"_native", "checkpoint", "convert", "errors", "models", "tokenization"},
    "cli": {
        "_native",
        "backends",
        "benchmark",
        "checkpoint",
        "config",
        "convert",
        "engine",
        "errors",
        "evaluation",
        "llm_boost",
        "models",
        "service",
        "quantize",
        "suggest",
    },
}


def room_of(file: Path, package: Path) -> str:
    first = file.relative_to(package).parts[0]
    return "llm_boost" if first == "__init__.py" else first.removesuffix(".py")


def imported_rooms(source: str, rooms: set[str]) -> set[str]:
    """The rooms that a module imports, at the top, inside functions, or for type checking alone."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "llm_boost":
                found.add(rest[0] if rest and rest[0] in rooms else "llm_boost")
    return found


def forbidden(package: Path) -> list[str]:
    rooms = {*ARROWS, "_native"}
    return [
        f"{file.relative_to(package)} imports {imported}"
        for file in sorted(package.rglob("*.py"))
        for imported in sorted(imported_rooms(file.read_text(encoding="utf-8"), rooms))
        if imported not in {room_of(file, package), *ARROWS[room_of(file, package)]}
    ]


def test_arrows_point_down() -> None:
    assert forbidden(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("checkpoint/x.py", "from llm_boost.engine.batch import Batch"),
        ("checkpoint/x.py", "from llm_boost import LLM"),
        ("tokenization/x.py", "import llm_boost.config.locations"),
        ("models/x.py", "def f():\n    from llm_boost.engine import llm"),
        ("engine/x.py", "from llm_boost import cli"),
        ("errors.py", "from llm_boost import _native"),
    ],
)
def test_an_arrow_that_points_up_is_found(tmp_path: Path, file: str, line: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"import numpy\nfrom llm_boost.errors import ConfigError\n{line}\n")
    assert len(forbidden(tmp_path)) == 1


def test_vector_registers_are_known_to_the_kernels_alone() -> None:
    knowing = {
        file.name
        for file in (ROOT / "csrc").iterdir()
        if re.search(r"\b_mm\d*_(?!pause\b)|\b__m\d+|\barm_neon\.h\b", file.read_text(encoding="utf-8"))
    }
    assert knowing == {"simd.h", "probe.cpp"} or knowing == {
        "simd.h",
        "probe.cpp",
        "kernels.cpp",
        "attention.cpp",
    }
    including = {file.name for file in (ROOT / "csrc").iterdir() if "immintrin.h" in file.read_text("utf-8")}
    assert including <= {"simd.h", "probe.cpp", "kernels.cpp", "threads.cpp"}  # threads: to pause in a spin


def test_python_is_known_to_the_bindings_alone() -> None:
    for file in (ROOT / "csrc").iterdir():
        if file.name not in {"module.cpp", "bindings.h"} and not file.name.startswith("bind_"):
            assert "nanobind" not in file.read_text(encoding="utf-8"), file


def test_help_needs_neither_numpy_nor_the_native_module() -> None:
    """The package's face and the command line's entry import nothing that is slow to load."""
    slow = {"numpy", "tokenizers", "pydantic", "rich", "jinja2", "yaml", "_native"}
    for name in ("__init__.py", "errors.py", "suggest.py", "cli/main.py"):
        tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {part for node in top for part in ast.unparse(node).replace(".", " ").split()}
        assert not names & slow, name
