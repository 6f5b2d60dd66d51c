"""From a run's configuration to a loaded model, with a progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_boost.backends.builtin import load_llm, naming_origins
from llm_boost.cli.progress import ProgressBar

if TYPE_CHECKING:
    from llm_boost import LLM
    from llm_boost.config.run_config import Resolved

__all__ = ["build_llm", "naming_origins"]


def build_llm(resolved: Resolved, **engine_options: int) -> LLM:
    """Loads the model that the configuration names; raises CheckpointError or ConfigError.

    `engine_options` are arguments of LLM that a configuration does not have, such as max_num_seqs.
    What the user should know of the choice of a tokenizer is added to `resolved.notes`.
    """
    with ProgressBar("packing weights") as progress:
        return load_llm(resolved, progress, **engine_options)
