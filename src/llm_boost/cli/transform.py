"""`llm-boost transform`: split, merge and re-split checkpoints, with the flags of MindFormers' tools."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_boost.cli.options import BOOL_TEXT, note
from llm_boost.cli.progress import ProgressBar
from llm_boost.errors import ConfigError

if TYPE_CHECKING:
    from llm_boost.checkpoint.parallel.source import Source
    from llm_boost.checkpoint.parallel.strategy import Strategy
    from llm_boost.checkpoint.parallel.transform import Share

DEFAULT_WORKERS = 2  # one thread alone writes slower than most disks
LAYOUTS = ("grouped", "grouped_plain_bias", "plain")
_EXAMPLES = """\b
Examples:
  llm-boost transform --src_checkpoint DIR --dst_checkpoint_dir split --ranks 4
  llm-boost transform --src_checkpoint model.ckpt --dst_checkpoint_dir split --dst_strategy output/strategy
  llm-boost transform --src_checkpoint split --dst_checkpoint_dir split2 --ranks 2
  llm-boost transform --src_ckpt_dir train/checkpoint --src_ckpt_strategy train/strategy --dst_ckpt_dir whole
  llm-boost transform --mindspore_ckpt_dir train/checkpoint --src_strategy train/strategy --output_dir out
  llm-boost transform --verify split
Sources: a .ckpt or .safetensors file, a Hugging Face folder, or folders rank_0, rank_1, ...; they stay so.
"""


@click.command("transform", epilog=_EXAMPLES)
@click.option(
    "--src_checkpoint",
    "--src_ckpt_dir",
    "--src_ckpt_path_or_dir",
    "src",
    metavar="PATH",
    help="The checkpoint.",
)
@click.option(
    "--dst_checkpoint_dir", "--dst_checkpoint", "--dst_ckpt_dir", "--output_dir", "dst", metavar="DIR",
    help="Gets rank_0/checkpoint_0.ckpt and so on.",
)  # fmt: skip
@click.option(
    "--src_strategy", "--src_ckpt_strategy", "--src_strategy_dirs", "src_strategy", metavar="PATH",
    help="How a split source is cut: a file or a folder (default: its manifests, or strategy/ beside).",
)  # fmt: skip
@click.option(
    "--dst_strategy", "--dst_ckpt_strategy", "dst_strategy", metavar="PATH",
    help="How to cut; without it and --ranks the checkpoint becomes complete.",
)  # fmt: skip
@click.option("--ranks", type=int, metavar="N", help="Cut for N ranks, by the model's own heads and sizes.")
@click.option("--prefix", default="checkpoint_", metavar="TEXT", help="Of file names (default checkpoint_).")
@click.option(
    "--format", "--save_format", "--output_format", "form", type=click.Choice(["ckpt", "safetensors"]),
    help="Of the files (default: the source's).",
)  # fmt: skip
@click.option(
    "--world_size", type=int, metavar="N", help="Ranks of the result; checked against the strategy."
)
@click.option(
    "--rank_id", type=int, metavar="R", help="Write the share of the process that begins with rank R."
)
@click.option(
    "--transform_process_num", "--max_process_num", "processes", type=int, metavar="N",
    help="Files at work at a time (default 2); with --rank_id the processes that share the ranks (1).",
)  # fmt: skip
@click.option(
    "--transform_by_rank", type=BOOL_TEXT, default=False,
    help="One rank after the other, instead of all while the source is read once.",
)  # fmt: skip
@click.option(
    "--qkv_layout", type=click.Choice(LAYOUTS), help="How rows of w_qkv and w_gate_hidden are ordered."
)
@click.option(
    "--lora_scaling", type=float, metavar="X", help="Merge LoRA adapters: W += X * B @ A (alpha / rank)."
)
@click.option(
    "--mindspore_ckpt_dir", metavar="DIR", help="Merge into unified safetensors, parts of at most 3 GiB."
)
@click.option("--file_suffix", metavar="TEXT", help="Of each rank's file, as 1_1 in llama-1_1.safetensors.")
@click.option(
    "--filter_out_param_prefix", metavar="TEXT", help="Leave such parameters out of unified safetensors."
)
@click.option(
    "--has_redundancy", type=BOOL_TEXT, help="Whether ranks repeat parameters; found out, and checked."
)
@click.option("--verify", metavar="DIR", help="Compare a split checkpoint with the SHA-256 of its manifests.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else.")
def transform_command(
    src: str | None,
    dst: str | None,
    verify: str | None,
    mindspore_ckpt_dir: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Split a complete checkpoint among ranks, merge one that is split, or split it anew."""
    started = time.monotonic()
    if verify is not None:
        summary = _verify(Path(verify), flags)
    else:
        if src is not None and mindspore_ckpt_dir is not None:
            raise ConfigError("--src_checkpoint and --mindspore_ckpt_dir: give one")
        given = src or mindspore_ckpt_dir
        if given is None or dst is None:
            missing = "--dst_checkpoint_dir" if given else "--src_checkpoint"
            raise ConfigError(f"{missing}: missing; see llm-boost transform --help")
        write = _unify if mindspore_ckpt_dir else _transform
        summary = write(Path(given), Path(dst).expanduser(), flags)
    seconds = time.monotonic() - started
    summary["seconds"] = round(seconds, 3)
    if as_json:
        click.echo(json.dumps(summary))
    else:
        size = summary["bytes"]
        speed = f"{size / 1e6:.1f} MB in {seconds:.1f} s ({size / 1e6 / max(seconds, 1e-3):.0f} MB/s)"
        note(f"{summary['what']}: {speed}")


def _transform(src: Path, dst: Path, flags: dict[str, Any]) -> dict[str, Any]:
    from llm_boost.checkpoint.parallel.settings import carry_settings
    from llm_boost.checkpoint.parallel.transform import check_vacant, plan, transform

    source, joined = _open(src, flags)
    strategy = _target(source, src, flags)
    form = flags["form"] or ("safetensors" if source.shards[0].path.suffix != ".ckpt" else "ckpt")
    shares = plan(source, strategy, dst, flags["prefix"], form, joined)
    mine = _my_share(shares, source, flags)
    check_vacant(dst, len(shares), source)
    workers = 1 if flags["rank_id"] is not None else flags["processes"] or DEFAULT_WORKERS
    with ProgressBar("transforming") as progress:
        kept = transform(source, mine, by_rank=flags["transform_by_rank"], workers=workers, progress=progress)
    if flags["ranks"] is not None and strategy is not None:
        from llm_boost.checkpoint.parallel.strategy_files import write_rank_strategies

        write_rank_strategies(dst / "strategy", strategy)
    carry_settings(src, dst)
    done = [share for share in mine if share not in kept]
    ranks = "complete" if strategy is None else f"{len(mine)} of {len(shares)} ranks"
    already = f", {len(kept)} of them whole before" if kept else ""
    return {
        "what": f"{dst}: {ranks}{already}",
        "ranks": len(shares),
        "files": [str(share.file) for share in mine],
        "kept": len(kept),
        "bytes": sum(share.nbytes for share in done),
    }


def _unify(src: Path, dst: Path, flags: dict[str, Any]) -> dict[str, Any]:
    from llm_boost.checkpoint.parallel.settings import carry_settings
    from llm_boost.checkpoint.parallel.unified import unify

    for name in ("dst_strategy", "ranks", "rank_id", "world_size"):
        if flags[name] is not None:
            raise ConfigError(f"--{name}: unified safetensors are complete; it belongs to --src_checkpoint")
    if flags["form"] == "ckpt":
        raise ConfigError("--format: got 'ckpt', allowed: safetensors (what unified safetensors are)")
    source, _ = _open(src, flags)
    workers = flags["processes"] or DEFAULT_WORKERS
    with ProgressBar("unifying") as progress:
        folder, size, parts = unify(
            source, dst, flags["file_suffix"], flags["filter_out_param_prefix"], workers, progress
        )
    carry_settings(src, folder)
    return {"what": f"{folder}: {parts} part{'s' * (parts > 1)}", "files": parts, "bytes": size}


def _verify(folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
    from llm_boost.checkpoint.parallel.split_weights import verify_ranks

    with ProgressBar("verifying") as progress:
        ranks, size = verify_ranks(folder, progress)
    return {
        "what": f"{folder}: {ranks} rank{'s' * (ranks > 1)} as their manifests say",
        "ranks": ranks,
        "bytes": size,
    }


def _open(src: Path, flags: dict[str, Any]) -> tuple[Source, Any]:
    from llm_boost.checkpoint.parallel.lora import LoraSource
    from llm_boost.checkpoint.parallel.source import open_source
    from llm_boost.checkpoint.parallel.strategy_files import read_strategy

    given = flags["src_strategy"] if flags["src_strategy"] not in (None, "None") else None
    strategy = read_strategy(given) if given else None
    source, joined = open_source(src, strategy, flags["qkv_layout"], flags["file_suffix"])
    if strategy is not None and source.strategy is None:
        note(f"note: --src_strategy {given}: without effect, since {src} is complete")
    if flags["lora_scaling"] is not None:
        source = LoraSource(source, flags["lora_scaling"])
    return source, joined


def _target(source: Source, src: Path, flags: dict[str, Any]) -> Strategy | None:
    """The strategy to cut by; None for a complete checkpoint."""
    from llm_boost.checkpoint.parallel.strategy_files import read_strategy

    given = flags["dst_strategy"] if flags["dst_strategy"] not in (None, "None") else None
    if given is not None and flags["ranks"] is not None:
        raise ConfigError("--ranks and --dst_strategy: give one")
    if given is not None:
        return read_strategy(given)
    if flags["ranks"] is not None:
        from llm_boost.cli.strategy import make_strategy

        if not 1 <= flags["ranks"] <= 1 << 16:
            raise ConfigError(f"--ranks: got {flags['ranks']}, allowed: a number from 1 to {1 << 16}")
        return make_strategy(src, flags["ranks"], any("w_qkv" in name for name in source.parameters))
    if source.strategy is None and flags["lora_scaling"] is None:
        raise ConfigError(
            f"{src}: is complete already: give --ranks or --dst_strategy to split it "
            "(another format is made by llm-boost convert)"
        )
    return None


def _my_share(shares: list[Share], source: Source, flags: dict[str, Any]) -> list[Share]:
    """The ranks that this process writes: all, or with --rank_id those of one of several processes."""
    ranks, rank_id = len(shares), flags["rank_id"]
    processes = 1 if flags["processes"] is None else flags["processes"]
    allowed = {ranks} if ranks > 1 else {1, source.strategy.ranks if source.strategy else 1}
    if flags["world_size"] is not None and flags["world_size"] not in allowed:
        raise ConfigError(f"--world_size: got {flags['world_size']}, but the result has {ranks} ranks")
    if processes < 1:
        raise ConfigError(f"--transform_process_num: got {processes}, allowed: 1 or more")
    processes = min(processes, ranks)
    if ranks % processes:
        raise ConfigError(
            f"--transform_process_num: got {processes}, allowed: a divisor of the {ranks} ranks"
        )
    if rank_id is None:
        return shares
    each = ranks // processes
    if not 0 <= rank_id < ranks or rank_id % each:
        raise ConfigError(
            f"--rank_id: got {rank_id}, allowed with {processes} processes of {ranks} ranks: "
            f"{', '.join(str(first) for first in range(0, ranks, each))}"
        )
    return shares[rank_id : rank_id + each]
