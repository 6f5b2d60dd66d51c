"""Where things lie: the cache folder, and a model by its path or its short name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from llm_boost.errors import CheckpointError
from llm_boost.suggest import did_you_mean

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def cache_folder(flag: str | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """--cache_dir, else LLM_BOOST_CACHE, else ~/.cache/llm-boost."""
    return Path(flag or environ.get("LLM_BOOST_CACHE") or "~/.cache/llm-boost").expanduser()


def models_folder(cache: Path) -> Path:
    """Where `llm-boost pull` puts models: `NAME/` or, for a repository id, `OWNER/NAME/`."""
    return cache / "models"


def is_model_name(name: str) -> bool:
    """A short name or a repository id: letters, digits, `-`, `_`, `.`, and at most one `/`."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def pulled_models(cache: Path) -> dict[str, Path]:
    """Every model under the cache's models folder: its name, and the directory or GGUF file to load."""
    folder = models_folder(cache)
    found: dict[str, Path] = {}
    for directory in sorted(p for pattern in ("*", "*/*") for p in folder.glob(pattern) if p.is_dir()):
        model = _model_in(directory)
        if model is not None:
            found[directory.relative_to(folder).as_posix()] = model
    return found


def find_model(name: str, cache: Path) -> Path:
    """The directory or GGUF file that `name` (a path, or the name of a pulled model) stands for.

    Raises CheckpointError when there is nothing of that name, or when the directory is empty.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            if not any(path.iterdir()):
                raise CheckpointError(
                    f"{path}: the model directory is empty; it needs config.json and safetensors, or GGUF"
                )
            return _model_in(path) or path
        if path.exists():
            return path
    except OSError as error:
        raise CheckpointError(f"{name[:200]}: cannot open the model ({error.strerror})") from None
    if is_model_name(name):
        pulled = pulled_models(cache)
        if name in pulled:
            return pulled[name]
        there = ", ".join(pulled) or "none"
        raise CheckpointError(
            f"model {name!r}: no such directory or file, nor a pulled model{did_you_mean(name, pulled)} "
            f"(pulled: {there}; `llm-boost pull` fetches one)"
        )
    raise CheckpointError(f"{path}: no such model directory or file")


def _model_in(directory: Path) -> Path | None:
    if (directory / "config.json").is_file():
        return directory
    ggufs = list(directory.glob("*.gguf"))
    return ggufs[0] if len(ggufs) == 1 else None
