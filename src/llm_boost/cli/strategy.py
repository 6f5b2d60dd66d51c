"""`llm-boost strategy`: how a model lies on N ranks, in files as --only_save_strategy writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_boost.cli.options import BOOL_TEXT, note
from llm_boost.config.locations import cache_folder, find_model
from llm_boost.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from llm_boost.checkpoint.parallel.strategy import Strategy
    from llm_boost.checkpoint.parallel.tensor_parallel import Mesh
    from llm_boost.config.llm_boost_yaml import LlmBoostYaml
    from llm_boost.models.config import ModelConfig

DEFAULT_OUTPUT = "./output"
_EXAMPLES = """\b
Examples:
  llm-boost strategy --model DIR --device_num 4                   # writes output/strategy/
  llm-boost strategy --config_path FILE.yaml --device_num 8 --output_dir out --format json
  llm-boost strategy --show output/strategy                       # a file, or a folder of a pipeline's stages
"""


@click.command("strategy", epilog=_EXAMPLES)
@click.option(
    "--model", "--load_checkpoint", metavar="PATH|NAME", help="A checkpoint, or the folder of a config.json."
)
@click.option("--config_path", "--config", metavar="FILE", help="An llm_boost YAML file.")
@click.option(
    "--device_num", "--model_parallel", "--ranks", type=int, metavar="N", help="Ranks that share a matrix."
)
@click.option("--data_parallel", type=int, metavar="N", help="Copies of these side by side (default 1).")
@click.option("--pipeline_stage", type=int, metavar="N", help="Stages that follow each other (default 1).")
@click.option("--vocab_emb_dp", type=BOOL_TEXT, help="The head whole on every rank (default False).")
@click.option(
    "--qkv_concat", type=BOOL_TEXT, help="For w_qkv and w_gate_hidden, as convert --qkv_concat makes them."
)
@click.option(
    "--output_dir", metavar="DIR", help=f"Its folder strategy/ gets them (default {DEFAULT_OUTPUT})."
)
@click.option("--format", "form", type=click.Choice(["ckpt", "json"]), default="ckpt", help="Of the files.")
@click.option("--show", metavar="PATH", help="Print a strategy instead of writing one.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else.")
def strategy_command(
    model: str | None,
    config_path: str | None,
    device_num: int | None,
    data_parallel: int | None,
    pipeline_stage: int | None,
    vocab_emb_dp: bool | None,
    qkv_concat: bool | None,
    output_dir: str | None,
    form: str,
    show: str | None,
    as_json: bool,
) -> None:
    """Write the strategy of N ranks: for MindSpore, and for llm-boost transform."""
    if show is not None:
        _show(show, as_json)
        return
    yaml_config = None
    if config_path is not None:
        from llm_boost.config.llm_boost_yaml import read_llm_boost_yaml

        yaml_config = read_llm_boost_yaml(config_path)
    strategy = _make(
        model,
        yaml_config,
        sizes={"model": device_num, "data": data_parallel, "stages": pipeline_stage},
        vocab_emb_dp=vocab_emb_dp,
        qkv_concat=bool(qkv_concat),
    )
    _save(strategy, _output_folder(output_dir, yaml_config), f".{form}", as_json)


def wants_strategy(flags: Mapping[str, Any], yaml_config: LlmBoostYaml | None) -> bool:
    """Whether a run of predict is to save a strategy alone; a flag outranks the file."""
    wanted = flags.get("only_save_strategy")
    if wanted is None and yaml_config is not None:
        wanted = yaml_config.root.only_save_strategy
    return bool(wanted)


def save_strategy_of_run(flags: Mapping[str, Any], yaml_config: LlmBoostYaml | None) -> None:
    """What `predict --only_save_strategy True` does, with run_llm_boost.py's flags."""
    for name in ("vocab_file", "merges_file"):
        if flags.get(name) is not None and not Path(flags[name]).expanduser().exists():
            raise ConfigError(f"--{name}: got {flags[name]!r}: The {name} should exist.")
    use_parallel = flags.get("use_parallel")
    if use_parallel is None and yaml_config is not None:
        use_parallel = yaml_config.root.use_parallel
    if not use_parallel:
        note("only_save_strategy without use_parallel: one rank needs no strategy; nothing was written")
        return
    model = flags.get("load_checkpoint") or flags.get("model")
    strategy = _make(model, yaml_config, sizes={"model": flags.get("device_num")})
    _save(strategy, _output_folder(None, yaml_config), ".ckpt", as_json=False)


def make_strategy(path: Path, ranks: int, qkv_concat: bool = False) -> Strategy:
    """The strategy of a checkpoint on so many ranks. Raises CheckpointError where it does not divide."""
    from llm_boost.checkpoint.parallel.tensor_parallel import Mesh

    return _strategy(_config_of(path, None), Mesh(ranks), False, qkv_concat)


def _make(
    model: str | None,
    yaml_config: LlmBoostYaml | None,
    sizes: Mapping[str, int | None],
    vocab_emb_dp: bool | None = None,
    qkv_concat: bool = False,
) -> Strategy:
    mesh = _mesh(sizes, yaml_config)
    if vocab_emb_dp is None and yaml_config is not None and yaml_config.root.parallel_config is not None:
        vocab_emb_dp = yaml_config.root.parallel_config.vocab_emb_dp
    if model is None and yaml_config is not None:
        model = yaml_config.root.load_checkpoint or None
    if model is None and yaml_config is None:
        raise ConfigError(
            "no model: give --model (a checkpoint, or the folder of a config.json) or --config_path"
        )
    path = find_model(model, cache_folder()) if model else None
    return _strategy(_config_of(path, yaml_config), mesh, bool(vocab_emb_dp), qkv_concat)


def _mesh(sizes: Mapping[str, int | None], yaml_config: LlmBoostYaml | None) -> Mesh:
    """Flags over parallel_config; ranks of context_parallel hold the same weights, as data_parallel's do."""
    from llm_boost.checkpoint.parallel.tensor_parallel import Mesh

    said = yaml_config.root.parallel_config if yaml_config else None
    data = (said.data_parallel or 1) * (said.context_parallel or 1) if said else None
    from_file = {
        "model": said.model_parallel if said else None,
        "data": data,
        "stages": said.pipeline_stage if said else None,
    }
    flags = {"model": "--device_num", "data": "--data_parallel", "stages": "--pipeline_stage"}
    chosen = {}
    for name, flag in flags.items():
        value = sizes.get(name)
        if value is not None and not 1 <= value <= 1 << 16:
            raise ConfigError(f"{flag}: got {value}, allowed: a number of ranks from 1 to {1 << 16}")
        chosen[name] = value or from_file[name]
    if chosen["model"] is None:
        raise ConfigError("--device_num: missing; give the number of ranks (or a YAML with parallel_config)")
    return Mesh(chosen["model"], chosen["data"] or 1, chosen["stages"] or 1)


def _config_of(path: Path | None, yaml_config: LlmBoostYaml | None) -> ModelConfig:
    """The model's shape by its weights where there are any, else by its config.json, else by the YAML."""
    from llm_boost.checkpoint import open_checkpoint
    from llm_boost.checkpoint.fields import read_json_object
    from llm_boost.checkpoint.mindformers_names import LAYOUTS
    from llm_boost.config.shapes import check_shapes, to_hf_config
    from llm_boost.models.config import ModelConfig, check_tensors

    hf_config = to_hf_config(yaml_config) if yaml_config else None
    if path is None:
        assert yaml_config is not None
        return ModelConfig.from_hf(hf_config or {}, str(yaml_config.path))
    config_file = path if path.name == "config.json" else path / "config.json"
    if config_file.is_file() and not _has_weights(config_file.parent):
        table = read_json_object(config_file)
        if yaml_config is not None:
            check_shapes(yaml_config, table, config_file)
        return ModelConfig.from_hf(table, str(config_file))
    checkpoint = open_checkpoint(path, hf_config, qkv_layout=LAYOUTS[0])  # shapes are those of any layout
    try:
        source = checkpoint.folder / "config.json" if checkpoint.format != "gguf" else checkpoint.path
        if yaml_config is not None:
            check_shapes(yaml_config, checkpoint.config, source)
        config = ModelConfig.from_hf(checkpoint.config, str(source), checkpoint.tensors)
        check_tensors(config, checkpoint)
        return config
    finally:
        checkpoint.close()


def _has_weights(folder: Path) -> bool:
    suffixes = (".safetensors", ".bin", ".ckpt", ".gguf", ".pth")
    return any(each.suffix in suffixes or each.name.startswith("rank_") for each in folder.iterdir())


def _strategy(config: ModelConfig, mesh: Mesh, vocab_emb_dp: bool, qkv_concat: bool) -> Strategy:
    from llm_boost.checkpoint.mindformers_names import concatenated_name, mindformers_name
    from llm_boost.checkpoint.parallel.tensor_parallel import Heads, decoder_strategy
    from llm_boost.models.config import ARCHITECTURES, expected_tensors

    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in expected_tensors(config).items():
        joined = concatenated_name(name) if qkv_concat else None
        ours = joined or mindformers_name(name, ARCHITECTURES[config.architecture])
        if ours is None:
            raise CheckpointError(f"MindFormers has no name for tensor {name}")
        rows = shapes[ours][0] if ours in shapes else 0
        shapes[ours] = (rows + shape[0], *shape[1:])
    return decoder_strategy(shapes, Heads(config.num_heads, config.num_kv_heads), mesh, vocab_emb_dp)


def _output_folder(flag: str | None, yaml_config: LlmBoostYaml | None) -> Path:
    """--output_dir, else LOCAL_DEFAULT_PATH, else the YAML's output_dir, else ./output."""
    from_file = yaml_config.root.output_dir if yaml_config else None
    return Path(flag or os.environ.get("LOCAL_DEFAULT_PATH") or from_file or DEFAULT_OUTPUT).expanduser()


def _save(strategy: Strategy, output: Path, suffix: str, as_json: bool) -> None:
    from llm_boost.checkpoint.parallel.strategy_files import write_rank_strategies

    folder = output / "strategy"
    files = write_rank_strategies(folder, strategy, suffix)
    if as_json:
        click.echo(json.dumps({"ranks": strategy.ranks, "files": [str(file) for file in files]}))
    else:
        note(
            f"Strategy file has been saved in {folder} "
            f"({strategy.ranks} ranks, {len(strategy.names)} parameters)"
        )


def _show(path: str, as_json: bool) -> None:
    from llm_boost.checkpoint.parallel.strategy_files import layout_as_json, read_strategy

    strategy = read_strategy(path)
    if as_json:
        stages = [{name: layout_as_json(each) for name, each in stage.items()} for stage in strategy.stages]
        click.echo(json.dumps({"ranks": strategy.ranks, "stages": stages}))
        return
    for number, stage in enumerate(strategy.stages):
        first = number * strategy.stage_ranks
        click.echo(f"stage {number}: ranks {first} to {first + strategy.stage_ranks - 1}")
        width = max(map(len, stage))
        for name, layout in stage.items():
            cut = ", ".join(f"axis {i} in {parts}" for i, parts in enumerate(layout.parts) if parts > 1)
            mesh = f"{list(layout.dev_matrix)} {layout.tensor_map}"
            click.echo(f"  {name:<{width}}  {cut or 'whole':<12}  {list(layout.split_shape)}  {mesh}")
