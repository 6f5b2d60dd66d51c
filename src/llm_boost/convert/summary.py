"""What a checkpoint is, as plain values: what `llm-boost inspect` shows and --json writes."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.gguf_quants import BLOCK_TYPES
from llm_boost.checkpoint.mindspore_ckpt import MindSporeFile
from llm_boost.checkpoint.packed_checkpoint import PackedCheckpoint
from llm_boost.checkpoint.parallel.manifest import NAME
from llm_boost.checkpoint.parallel.split_weights import rank_folders, verify_ranks
from llm_boost.checkpoint.whole_file import Progress
from llm_boost.convert.contents import BareWeights, Contents
from llm_boost.convert.source import format_of
from llm_boost.convert.tensors import row_chunks
from llm_boost.errors import CheckpointError
from llm_boost.models.config import ModelConfig, check_tensors

_SHAPE = {  # of ModelConfig, and what people call it
    "num_layers": "layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "heads",
    "num_kv_heads": "kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
}
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_BYTES = {"float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4, "bool": 1}
_GROUPS = re.compile(r"(?:gptq|awq)-int(\d+)")  # without their scales
_BYTES |= dict.fromkeys(("int8", "uint8", "float8_e4m3fn", "float8_e5m2"), 1)


def summary(contents: Contents) -> dict[str, Any]:
    """Format, architecture, sizes, types, and whether every tensor of the model is there in its shape."""
    infos = contents.tensors.values()
    types = Counter[str]()
    for info in infos:
        types[info.dtype] += math.prod(info.shape)
    model, problems = _model(contents)
    return {
        "path": str(contents.path),
        "format": contents.format if isinstance(contents, BareWeights) else format_of(contents),  # type: ignore[arg-type]
        "architecture": model.architecture if model else None,
        "parameters": sum(types.values()),
        "tensors": len(infos),
        "bytes": sum(map(_nbytes, infos)),
        "dtypes": {
            dtype: {"tensors": _count(infos, dtype), "parameters": n} for dtype, n in types.most_common()
        },
        "quantization": _quantization(contents, types),
        "ranks": _ranks(contents.path),
        "files": [{"name": name, "bytes": size} for name, size in weight_files(contents.path)],
        "model": {name: getattr(model, key) for key, name in _SHAPE.items()} if model else None,
        "problems": problems,
    }


def tensor_rows(contents: Contents) -> list[dict[str, Any]]:
    """Name, shape, type and bytes of every tensor, in the checkpoint's order."""
    return [
        {"name": info.name, "shape": list(info.shape), "dtype": info.dtype, "bytes": _nbytes(info)}
        for info in contents.tensors.values()
    ]


def check_values(contents: Contents, progress: Progress | None = None) -> list[str]:
    """Reads everything: what is wrong with the values, a line each; [] for nothing.

    NaN and infinities by tensor, the checksum of a .ckpt that has one, and every rank beside its manifest.
    """
    if isinstance(contents, PackedCheckpoint):
        return []
    problems = []
    total = sum(map(_nbytes, contents.tensors.values()))
    done = 0
    for name, info in contents.tensors.items():
        bad = 0
        for chunk in row_chunks(contents, name):
            bad += int(np.count_nonzero(~np.isfinite(_floats(chunk))))
        if bad:
            problems.append(f"tensor {name}: {bad} of {math.prod(info.shape)} values are not finite numbers")
        done += _nbytes(info)
        if progress:
            progress(done, total)
    for file, _ in weight_files(contents.path):
        path = contents.path if contents.path.is_file() else contents.path / file
        if path.suffix == ".ckpt" and MindSporeFile(path).crc_holds() is False:
            problems.append(f"{path.name}: its bytes do not have the checksum that stands at its end")
    return problems + _ranks_beside_manifests(contents.path)


def _ranks_beside_manifests(path: Path) -> list[str]:
    """What `transform` has split has a manifest in every rank's folder; what other tools split has none."""
    folders = rank_folders(path)
    if not folders or not all((folder / NAME).is_file() for folder in folders):
        return []
    try:
        verify_ranks(path)
    except CheckpointError as error:
        return [str(error)]
    return []


def check_manifest(contents: Contents, manifest: Path, progress: Progress | None = None) -> list[str]:
    """Compares the weight files with their SHA-256 in `manifest`, lines as `sha256sum` writes them.

    What is wrong, a line each: a file that differs, that is missing, or that the manifest does not name.

    Raises:
        CheckpointError: the manifest cannot be read, or holds other lines.
    """
    try:
        lines = manifest.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{manifest}: cannot be read ({error})") from None
    expected = {}
    for number, line in enumerate(lines, 1):
        match = _SUM.fullmatch(line)
        if match is None:
            raise CheckpointError(f"{manifest}: line {number} is no line of sha256sum: SHA-256, then a name")
        expected[Path(match[2]).as_posix()] = match[1].lower()
    folder = contents.path if contents.path.is_dir() else contents.path.parent
    files = dict(weight_files(contents.path))
    problems = [f"{name}: is not in {manifest}" for name in files if name not in expected]
    problems += [f"{name}: is missing" for name in expected if not (folder / name).is_file()]
    total, done = sum(files.values()), 0
    for name, size in files.items():
        if name in expected:
            found = _sha256(folder / name)
            if found != expected[name]:
                problems.append(f"{name}: its SHA-256 is {found}, in {manifest} {expected[name]}")
        done += size
        if progress:
            progress(done, total)
    return problems


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weight_files(path: Path) -> list[tuple[str, int]]:
    """The weight files at a path, by their names within it, and their sizes."""
    if path.is_file():
        return [(path.name, path.stat().st_size)]
    found = sorted(
        file
        for pattern in ("*", "rank_*/*")
        for file in path.glob(pattern)
        if file.suffix in (".safetensors", ".ckpt", ".bin", ".pth", ".gguf", ".packed")
    )
    return [(str(file.relative_to(path)), file.stat().st_size) for file in found]


def _model(contents: Contents) -> tuple[ModelConfig | None, list[str]]:
    """The model that the configuration describes, and where the tensors contradict it."""
    if isinstance(contents, BareWeights):
        return None, []
    problems = []
    model = None
    try:
        model = ModelConfig.from_hf(contents.config, "config.json", contents.tensors)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_tensors(model, contents)  # type: ignore[arg-type]
        problems += [str(warning.message) for warning in caught]
    except CheckpointError as error:
        problems.append(str(error))
    return model, problems


def _quantization(contents: Contents, types: Counter[str]) -> str | None:
    """How the weights are quantised; None for floating point."""
    if isinstance(contents, PackedCheckpoint):
        return contents.dtype if contents.dtype.startswith("int") else None
    return ", ".join(t for t, _ in types.most_common() if t in BLOCK_TYPES or _GROUPS.fullmatch(t)) or None


def _ranks(path: Path) -> int:
    folders = [entry for entry in path.glob("rank_*") if entry.is_dir()] if path.is_dir() else []
    return max(1, len(folders))


def _count(infos: Iterable[TensorInfo], dtype: str) -> int:
    return sum(1 for info in infos if info.dtype == dtype)


def _nbytes(info: TensorInfo) -> int:
    count = math.prod(info.shape)
    if info.dtype in BLOCK_TYPES:
        return count // BLOCK_TYPES[info.dtype].size * BLOCK_TYPES[info.dtype].bytes
    if match := _GROUPS.fullmatch(info.dtype):
        return count * int(match[1]) // 8
    return count * _BYTES.get(info.dtype, 2)


def _floats(chunk: Any) -> Any:
    """numpy's isfinite wants a type that it knows."""
    return chunk if chunk.dtype.kind in "iufb" else chunk.astype(np.float32)


def rows_of(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The summary as lines of text: a label and a value."""
    parameters, nbytes = summary["parameters"], summary["bytes"]
    yield "format", summary["format"] + (f", {summary['ranks']} ranks" if summary["ranks"] > 1 else "")
    yield "architecture", summary["architecture"] or "unknown: there is no configuration"
    yield "parameters", f"{parameters:,} in {summary['tensors']} tensors, {nbytes / 1e6:.1f} MB"
    yield (
        "types",
        ", ".join(f"{dtype} ({each['tensors']} tensors)" for dtype, each in summary["dtypes"].items()),
    )
    yield "quantisation", summary["quantization"] or "none"
    if summary["model"]:
        yield "model", ", ".join(f"{name} {value}" for name, value in summary["model"].items())
    files = summary["files"]
    size = sum(file["bytes"] for file in files)
    yield (
        "files",
        f"{len(files)}, {size / 1e6:.1f} MB: {', '.join(file['name'] for file in files[:4])}"
        + (", ..." if len(files) > 4 else ""),
    )
