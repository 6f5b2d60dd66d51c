"""MindIE's modelWeightPath: a folder with config.json, a vocabulary, one YAML file and the checkpoint."""

from __future__ import annotations

from pathlib import Path

from llm_boost.config.llm_boost_yaml import LlmBoostYaml, read_llm_boost_yaml
from llm_boost.errors import ConfigError


def yaml_of_folder(folder: Path) -> LlmBoostYaml | None:
    """The folder's llm_boost YAML, read; None when it holds none, as a Hugging Face directory does.

    Raises:
        ConfigError: there are several, or the one is not valid.
    """
    if not folder.is_dir():
        return None
    found = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    if len(found) > 1:
        raise ConfigError(f"{folder}: got {', '.join(p.name for p in found)}, allowed: one YAML file")
    return read_llm_boost_yaml(found[0]) if found else None
