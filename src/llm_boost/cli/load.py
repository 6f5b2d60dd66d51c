"""From a run's configuration to a loaded model: the command line's one door to the engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llm_boost.cli.progress import ProgressBar
from llm_boost.config.locations import find_model

if TYPE_CHECKING:
    from llm_boost import LLM
    from llm_boost.config.llm_boost_yaml import LlmBoostYaml
    from llm_boost.config.run_config import Resolved


def build_llm(resolved: Resolved) -> LLM:
    """Loads the model that the configuration names; raises CheckpointError or ConfigError.

    What the user should know of the choice of a tokenizer is added to `resolved.notes`.
    """
    config = resolved.config
    path = find_model(config.model, config.cache_dir)
    if resolved.yaml is not None:
        _check_against_checkpoint(resolved.yaml, path)
    overrides = config.tokenizer_overrides
    if overrides and path.suffix == ".gguf" and config.vocab_file is None and config.merges_file is None:
        resolved.notes.append(
            "processor.tokenizer of the YAML is without effect: the GGUF file holds its own tokenizer"
        )
        overrides = {}
    from llm_boost import LLM

    with ProgressBar("packing weights") as progress:
        return LLM(
            model=path,
            dtype=config.dtype,
            max_model_len=config.seq_length,
            threads=config.threads,
            seed=config.seed,
            cache_dir=config.cache_dir,
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            vocab_file=config.vocab_file,
            merges_file=config.merges_file,
            tokenizer_overrides=overrides or None,
            progress=progress,
        )


def _check_against_checkpoint(yaml_config: LlmBoostYaml, path: Path) -> None:
    from llm_boost.checkpoint.checkpoint import open_checkpoint
    from llm_boost.config.shapes import check_shapes

    checkpoint = open_checkpoint(path)
    try:
        check_shapes(yaml_config, checkpoint.config, path / "config.json" if path.is_dir() else path)
    finally:
        checkpoint.close()
