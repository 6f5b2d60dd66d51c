"""From a run's configuration to a loaded model: the command line's one door to the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_boost.cli.progress import ProgressBar
from llm_boost.config.locations import find_model
from llm_boost.errors import ConfigError, TokenizerError

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
    hf_config = None
    if resolved.yaml is not None:
        from llm_boost.config.shapes import to_hf_config

        hf_config = to_hf_config(resolved.yaml)
    _check_ranks(resolved, path)
    if resolved.yaml is not None and hf_config is not None:
        _check_against_checkpoint(resolved.yaml, path, hf_config, config.src_strategy)
    overrides = config.tokenizer_overrides
    if overrides and path.suffix == ".gguf" and config.vocab_file is None and config.merges_file is None:
        resolved.notes.append(
            "processor.tokenizer of the YAML is without effect: the GGUF file holds its own tokenizer"
        )
        overrides = {}
    from llm_boost import LLM

    with ProgressBar("packing weights") as progress, naming_origins(resolved):
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
            hf_config=hf_config,
            src_strategy=config.src_strategy,
            progress=progress,
        )


@contextlib.contextmanager
def naming_origins(resolved: Resolved) -> Iterator[None]:
    """The engine names a setting; the user is told the flag, the variable or the file that it came from."""
    try:
        yield
    except ConfigError as error:
        name = str(error).partition(":")[0]
        origin = resolved.origins.get("seq_length" if name == "max_model_len" else name, name)
        raise ConfigError(str(error).replace(name, origin, 1)) from None
    except TokenizerError as error:
        if resolved.yaml is None or not str(error).startswith("processor.tokenizer"):
            raise
        raise TokenizerError(f"{resolved.yaml.path}: {error}") from None


def _check_ranks(resolved: Resolved, path: Path) -> None:
    """A checkpoint in rank folders is merged as it is read, unless auto_trans_ckpt says that it must fit."""
    from llm_boost.checkpoint.parallel.split_weights import is_split

    config, origins = resolved.config, resolved.origins
    if not is_split(path):
        if config.src_strategy is not None:
            resolved.notes.append(
                f"{origins.get('src_strategy')}: without effect, since {path} is not split into ranks"
            )
    elif config.auto_trans_ckpt is False:
        raise ConfigError(
            f"{origins.get('auto_trans_ckpt')}: got False, but {path} is split into ranks and this is one: "
            "set it to True, or merge the checkpoint with llm-boost transform"
        )


def _check_against_checkpoint(
    yaml_config: LlmBoostYaml, path: Path, hf_config: dict[str, Any], src_strategy: Path | None
) -> None:
    from llm_boost.checkpoint.checkpoint import open_checkpoint
    from llm_boost.config.shapes import check_shapes

    checkpoint = open_checkpoint(path, hf_config, src_strategy=src_strategy)
    try:
        config_file = path if checkpoint.format == "gguf" else checkpoint.folder / "config.json"
        check_shapes(yaml_config, checkpoint.config, config_file)
    finally:
        checkpoint.close()
