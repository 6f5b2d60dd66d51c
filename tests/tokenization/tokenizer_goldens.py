"""Where the golden files and the real checkpoints are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

GOLDENS = Path(__file__).parent.parent / "goldens" / "tokenizers"
MODELS = Path(os.environ.get("LLM_BOOST_MODELS", "~/.cache/llm-boost/models")).expanduser()


def golden(name: str) -> Any:
    return json.loads((GOLDENS / name).read_text(encoding="utf-8"))


def real_file(name: str) -> Path:
    path = MODELS / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path
