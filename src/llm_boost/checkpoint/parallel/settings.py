"""What lies beside weights and is needed to run them: carried to where a split or merged checkpoint goes."""

from __future__ import annotations

import shutil
from pathlib import Path

from llm_boost.checkpoint.mindformers import settings_folder
from llm_boost.checkpoint.whole_file import whole_file

CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)


def carry_settings(source: Path, folder: Path) -> None:
    """Copies the configuration and tokenizer of a checkpoint into `folder`, where it lacks them."""
    came_from = settings_folder(source.expanduser())
    for name in CARRIED:
        file = came_from / name
        if file.is_file() and not (folder / name).exists():
            with whole_file(folder / name, file.stat().st_size) as out, file.open("rb") as data:
                while chunk := data.read(1 << 20):
                    out.write(chunk)
            shutil.copymode(file, folder / name)
