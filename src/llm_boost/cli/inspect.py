"""`llm-boost inspect`: what a checkpoint is, whether it is sound, and whether two hold the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_boost.cli.progress import ProgressBar
from llm_boost.errors import ConfigError

if TYPE_CHECKING:
    from llm_boost.convert.contents import Contents

_EXAMPLES = """\b
Examples:
  llm-boost inspect qwen2.5-0.5b                  format, architecture, types, sizes
  llm-boost inspect model.gguf --tensors          every tensor
  llm-boost inspect model.ckpt --check            reads all values: NaN, infinities, checksums
  llm-boost inspect model --manifest SHA256SUMS   the files against their SHA-256
  llm-boost inspect --diff qwen2.5-0.5b ms.ckpt   exit code 1 when they differ
"""
_SHOWN = 20  # differences, without --tensors


@click.command("inspect", epilog=_EXAMPLES)
@click.argument("path", required=False)
@click.option("--tensors", is_flag=True, help="Every tensor: name, shape, type, bytes.")
@click.option("--check", is_flag=True, help="Read all values: NaN, infinities, checksums (exit code 1).")
@click.option("--manifest", metavar="FILE", help="Check the weight files' SHA-256: lines of sha256sum.")
@click.option("--diff", nargs=2, metavar="A B", help="Compare two, of any format (exit code 1: they differ).")
@click.option("--config_path", metavar="FILE", help="An llm_boost YAML or config.json, for weights without.")
@click.option("--qkv_layout", metavar="LAYOUT", help="Of MindSpore's concatenated weights (see convert).")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def inspect_command(
    path: str | None,
    tensors: bool,
    check: bool,
    manifest: str | None,
    diff: tuple[str, str] | None,
    config_path: str | None,
    qkv_layout: str | None,
    as_json: bool,
) -> None:
    """Say what the checkpoint at PATH is, or how two differ. Any format; nothing of it is run."""
    from llm_boost.cli.convert import read_hf_config

    if (path is None) == (diff is None):
        raise click.UsageError("give one PATH, or --diff A B")
    hf_config = read_hf_config(config_path)
    if diff is not None:
        if check or manifest:
            raise ConfigError("--check and --manifest: are for one checkpoint, --diff compares two")
        a, b = (_open(each, hf_config, qkv_layout) for each in diff)
        _show_differences(a, b, tensors, as_json)
        return
    _show(_open(str(path), hf_config, qkv_layout), tensors, check, manifest, as_json)


def _open(path: str, hf_config: dict[str, Any] | None, qkv_layout: str | None) -> Contents:
    from llm_boost.config.locations import cache_folder, find_model
    from llm_boost.convert.contents import open_contents

    found = Path(path).expanduser()
    return open_contents(found if found.exists() else find_model(path, cache_folder()), hf_config, qkv_layout)


def _show(contents: Contents, tensors: bool, check: bool, manifest: str | None, as_json: bool) -> None:
    from llm_boost.convert.summary import check_manifest, check_values, rows_of, summary, tensor_rows

    found = summary(contents)
    if check:
        with ProgressBar("reading") as bar:
            found["problems"] += check_values(contents, bar)
        found["checked"] = True
    if manifest:
        with ProgressBar("SHA-256") as bar:
            found["problems"] += check_manifest(contents, Path(manifest).expanduser(), bar)
        found["manifest"] = manifest
    if as_json:
        click.echo(json.dumps(found | ({"tensor_table": tensor_rows(contents)} if tensors else {}), indent=2))
    else:
        click.echo(found["path"])
        for label, value in rows_of(found):
            click.echo(f"  {label:<14}{value}")
        sound = (
            "every value is a finite number" if check else "sizes and shapes are right (--check reads values)"
        )
        for line in found["problems"] or [sound]:
            click.echo(f"  {'problem' if found['problems'] else 'integrity':<14}{line}")
        for row in tensor_rows(contents) if tensors else ():
            click.echo(f"  {row['name']:<52} {row['dtype']:<9} {row['shape']}  {row['bytes']:,} bytes")
    if (check or manifest) and found["problems"]:
        raise click.exceptions.Exit(1)


def _show_differences(a: Contents, b: Contents, all_of_them: bool, as_json: bool) -> None:
    from llm_boost.convert.compare import compare

    with ProgressBar("comparing", "tensors") as bar:
        found = list(compare(a, b, bar))
    differing = [each for each in found if each.matters]
    names = len({*a.tensors, *b.tensors})
    if as_json:
        rows = [
            {"name": d.name, "kind": d.kind, "detail": d.detail, "max": d.maximum, "mean": d.mean}
            for d in found
        ]
        click.echo(json.dumps({"equal": not differing, "tensors": names, "differences": rows}, indent=2))
    else:
        for each in differing if all_of_them else differing[:_SHOWN]:
            click.echo(
                f"{each.name}: {each.kind}: {each.detail}"
                if each.kind != "missing"
                else f"{each.name} {each.detail}"
            )
        if len(differing) > _SHOWN and not all_of_them:
            click.echo(f"and {len(differing) - _SHOWN} more (--tensors shows all)")
        retyped = len(found) - len(differing)
        also = f", {retyped} of them in another type" if retyped else ""
        equal = names - len(differing)
        click.echo(f"{equal} of {names} tensors are equal to the bit{also}")
    if differing:
        raise click.exceptions.Exit(1)
