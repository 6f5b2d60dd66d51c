"""`manifest.json` beside a rank's weights: what they are a part of, how it was cut, and their SHA-256."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_boost.checkpoint.fields import Fields, read_json_object, shown
from llm_boost.checkpoint.parallel.layout import Layout
from llm_boost.checkpoint.parallel.strategy import Strategy, merged
from llm_boost.checkpoint.parallel.strategy_files import MAX_RANKS, layout_as_json, layout_from_json
from llm_boost.checkpoint.whole_file import whole_file
from llm_boost.errors import CheckpointError

NAME = "manifest.json"
FORMAT = "llm-boost rank 1"


@dataclass(frozen=True)
class Part:
    """A parameter on a rank; `layout` is None where it lies whole without a strategy that says so."""

    shape: tuple[int, ...]
    whole_shape: tuple[int, ...]
    dtype: str
    layout: Layout | None
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`source` says what was split: its path, and a digest of its files and of how they were read."""

    rank: int
    ranks: int
    stage: int
    file: str
    size: int  # bytes
    source: Mapping[str, str]
    parameters: Mapping[str, Part]

    def write(self, folder: Path) -> None:
        parameters = {
            name: {
                "shape": part.shape,
                "whole_shape": part.whole_shape,
                "axes_cut": [i for i, parts in enumerate(part.layout.parts) if parts > 1]
                if part.layout
                else [],
                "dtype": part.dtype,
                "layout": layout_as_json(part.layout) if part.layout else None,
                "sha256": part.sha256,
            }
            for name, part in self.parameters.items()
        }
        table = {
            "format": FORMAT,
            "rank": self.rank,
            "ranks": self.ranks,
            "stage": self.stage,
            "file": self.file,
            "size": self.size,
            "source": dict(self.source),
            "parameters": parameters,
        }
        data = json.dumps(table, indent=1).encode()
        with whole_file(folder / NAME, len(data)) as file:
            file.write(data)

    def layouts(self) -> dict[str, Layout]:
        return {name: part.layout for name, part in self.parameters.items() if part.layout is not None}


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a rank's folder; None without one. Raises CheckpointError for one that is damaged."""
    path = folder / NAME
    if not path.is_file():
        return None
    table = read_json_object(path)
    fields = Fields(table, str(path))
    if table.get("format") != FORMAT:
        raise fields.error("format", repr(FORMAT))
    ranks = fields.integer("ranks", 1, MAX_RANKS)
    file = fields.text("file", "")
    if Path(file).name != file or not file:
        raise fields.error("file", "the name of a file in the same folder")
    return Manifest(
        rank=fields.integer("rank", 0, ranks - 1),
        ranks=ranks,
        stage=fields.integer("stage", 0, ranks - 1),
        file=file,
        size=fields.integer("size", 0, 1 << 62),
        source={key: str(value) for key, value in _object(table.get("source"), f"{path}: source").items()},
        parameters={
            name: _part(name, _object(part, f"{path}: {shown(name)}"), path)
            for name, part in _object(table.get("parameters"), f"{path}: parameters").items()
        },
    )


def strategy_of(manifests: Mapping[int, Manifest], path: Path) -> Strategy | None:
    """The strategy that the ranks' manifests state together; None where nothing was cut by one."""
    stages: dict[int, Mapping[str, Layout]] = {}
    for manifest in manifests.values():
        layouts = manifest.layouts()
        if layouts and stages.setdefault(manifest.stage, layouts) != layouts:
            raise CheckpointError(
                f"{path}: the manifests of pipeline stage {manifest.stage} contradict each other's layouts"
            )
    return merged(stages, path) if stages else None


def _part(name: str, item: Mapping[str, Any], path: Path) -> Part:
    where = f"{path}: {shown(name)}"
    fields = Fields(item, where)
    try:
        layout = layout_from_json(name, item["layout"]) if isinstance(item.get("layout"), dict) else None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Part(
        shape=_shape(item.get("shape"), where),
        whole_shape=_shape(item.get("whole_shape"), where),
        dtype=fields.text("dtype", ""),
        layout=layout,
        sha256=fields.text("sha256", ""),
    )


def _shape(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(each) is int and 0 <= each <= 1 << 48 for each in value):
        raise CheckpointError(f"{where}: a shape is {shown(value)}; it must be a list of sizes")
    return tuple(value)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is {shown(value)}; it must be an object")
    return value
