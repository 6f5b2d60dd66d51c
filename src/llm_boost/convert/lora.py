"""A LoRA adapter between PEFT (adapter_model.safetensors, adapter_config.json) and MindFormers, both ways."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.fields import read_json_object, shown
from llm_boost.checkpoint.mindformers_names import FAMILIES, hf_name, mindformers_name
from llm_boost.checkpoint.safetensors_reader import SafetensorsFile
from llm_boost.checkpoint.safetensors_writer import write_safetensors
from llm_boost.checkpoint.weight_files import WeightFiles
from llm_boost.checkpoint.whole_file import disk_errors, whole_folder
from llm_boost.convert import mindspore
from llm_boost.convert.convert import Options, Result, float_dtype, output_path
from llm_boost.convert.progress import Steps
from llm_boost.convert.source import MODELS
from llm_boost.convert.tensors import FLOATS, OutTensor, streamed
from llm_boost.convert.verify import Checksums
from llm_boost.errors import CheckpointError, ConfigError

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# PEFT's suffix -> MindFormers'; the reverse also knows what its older trainers wrote
SUFFIXES = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
_REVERSED = re.compile(r"(.+)\.(?:tk_delta_|mindpet_delta_)?lora_([ab])(?:\.weight)?")


class _Adapter:
    """An adapter's weights, as much of a Checkpoint as streaming needs."""

    def __init__(self, path: Path, files: WeightFiles) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = dict(files.tensors)
        self.read, self.read_rows, self.forget = files.read, files.read_rows, files.forget
        for name, info in self.tensors.items():
            if info.dtype not in FLOATS:
                raise CheckpointError(
                    f"{path}: tensor {shown(name)} is {info.dtype}; an adapter's are floating point"
                )


def convert_adapter(source: Path, output: Path, to: str, dtype: str | None, model: str | None) -> Result:
    """PEFT's folder to a MindSpore file with adapter_config.json beside it, or back to a folder.

    Raises:
        CheckpointError: a file is missing, a parameter is none of an adapter's. ConfigError: a wrong target.
    """
    start = time.monotonic()
    if model is not None and model not in MODELS:
        raise ConfigError(f"--model: got {model!r}, allowed: {', '.join(MODELS)}")
    family = MODELS[model][0] if model is not None else "llama"
    path = output_path(output, to, source)
    if to not in ("hf", *mindspore.SUFFIXES):
        raise ConfigError(f"--is_lora: an adapter becomes hf or mindspore, not {to}")
    kept = float_dtype(Options(to, dtype))
    weights, config = _open(source, to_peft=to == "hf")
    rename = _peft_name if to == "hf" else _mindformers_name
    tensors = [
        streamed(weights, name, kept or FLOATS[info.dtype], rename(name, family, source))  # type: ignore[arg-type]
        for name, info in weights.tensors.items()
    ]
    modules = _modules(config.get("target_modules"), family, reverse=to == "hf")
    files = {PEFT_CONFIG: (json.dumps({**config, "target_modules": modules}, indent=2) + "\n").encode()}
    total = sum(tensor.spec.nbytes for tensor in tensors)
    with disk_errors(path, total):
        path.parent.mkdir(parents=True, exist_ok=True)
    steps = Steps(total)
    if to == "hf":
        _write_peft(path, tensors, files, total)
    else:
        mindspore.write(path, tensors, files, steps)
    kinds = " and ".join(sorted({tensor.spec.dtype for tensor in tensors}))
    return Result(path, to, kinds, len(tensors), total, time.monotonic() - start)


def _open(source: Path, to_peft: bool) -> tuple[_Adapter, dict[str, Any]]:
    folder = source if source.is_dir() else source.parent
    if source.is_dir():
        files = sorted(folder.glob("*.ckpt" if to_peft else PEFT_WEIGHTS)) or sorted(
            folder.glob("*.safetensors")
        )
        if len(files) != 1:
            wanted = "one .ckpt or .safetensors file" if to_peft else PEFT_WEIGHTS
            raise CheckpointError(
                f"{source}: {len(files)} adapter files there; it must hold {wanted}, or name one"
            )
        source = files[0]
    if not source.is_file():
        raise CheckpointError(f"{source}: no such adapter")
    if not (folder / PEFT_CONFIG).is_file():
        raise CheckpointError(f"{folder / PEFT_CONFIG}: is missing; an adapter's rank and scale stand there")
    return _Adapter(source, WeightFiles(source, [source])), read_json_object(folder / PEFT_CONFIG)


def _mindformers_name(name: str, family: str, source: Path) -> str:
    """`base_model.model.layers.0.mlp.up_proj.lora_A.weight` to `layers.0.feed_forward.w3.lora_a`."""
    for suffix, theirs in SUFFIXES.items():
        if name.startswith(PREFIX) and name.endswith(suffix):
            stem = mindformers_name(name[len(PREFIX) : -len(suffix)] + ".weight", family)
            if stem is not None:
                return stem.removesuffix(".weight") + theirs
    raise CheckpointError(
        f"{source}: tensor {shown(name)} is no LoRA weight of a linear that MindFormers names"
    )


def _peft_name(name: str, family: str, source: Path) -> str:
    match = _REVERSED.fullmatch(name)
    stem = hf_name(match[1] + ".weight") if match else None
    if match is None or stem is None:
        raise CheckpointError(f"{source}: parameter {shown(name)} is no LoRA weight of MindFormers")
    return f"{PREFIX}{stem.removesuffix('.weight')}.lora_{match[2].upper()}.weight"


def _modules(modules: Any, family: str, reverse: bool) -> Any:
    """target_modules with the other side's names; MindFormers also takes them as a pattern: `.*wq|.*wv`."""
    table = {
        theirs.rpartition(".")[2]: ours.rpartition(".")[2]
        for theirs, ours in FAMILIES[family].items()
        if "_proj" in theirs
    }
    if reverse:
        table = {ours: theirs for theirs, ours in table.items()}
    if isinstance(modules, list):
        return [table.get(str(name), name) for name in modules]
    if isinstance(modules, str):
        return re.sub(r"\w+", lambda word: table.get(word[0], word[0]), modules)
    return modules


def _write_peft(folder: Path, tensors: list[OutTensor[Any]], files: dict[str, bytes], total: int) -> None:
    sums = Checksums()
    with whole_folder(folder, total) as temporary:
        write_safetensors(
            temporary / PEFT_WEIGHTS,
            [tensor.spec for tensor in tensors],
            sums.outgoing(tensors),
            {"format": "pt"},
            alignment=1,
            verify=lambda file: sums.check(file, SafetensorsFile(file)),
        )
        for name, data in files.items():
            (temporary / name).write_bytes(data)
