"""A strategy: how each parameter lies on the ranks of each pipeline stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_boost.checkpoint.fields import shown
from llm_boost.checkpoint.parallel.layout import Layout
from llm_boost.errors import CheckpointError


@dataclass(frozen=True)
class Strategy:
    """`stages[s]` are the layouts of stage s by parameter; rank r is rank r % stage_ranks of stage r // it.

    A parameter that no stage names lies whole on every rank that has it.
    """

    stages: tuple[Mapping[str, Layout], ...]
    source: str  # the file or flag that it came from, for messages

    def __post_init__(self) -> None:
        if not self.stages or not all(self.stages):
            raise CheckpointError(f"{self.source}: names no parameter; a strategy file lists their layouts")
        expected = self.stage_ranks
        for layouts in self.stages:
            for name, layout in layouts.items():
                if layout.ranks != expected:
                    raise CheckpointError(
                        f"{self.source}: parameter {shown(name)} is laid on {layout.ranks} ranks, "
                        f"others on {expected}"
                    )

    @property
    def stage_ranks(self) -> int:
        return next(iter(self.stages[0].values())).ranks

    @property
    def ranks(self) -> int:
        return self.stage_ranks * len(self.stages)

    @property
    def names(self) -> list[str]:
        """Every parameter, in the order of the stages."""
        return list(dict.fromkeys(name for layouts in self.stages for name in layouts))

    def holders(self, name: str) -> list[tuple[int, Layout]]:
        """The first rank of each stage that holds a parameter, and how it lies on that stage's ranks."""
        return [
            (stage * self.stage_ranks, layouts[name])
            for stage, layouts in enumerate(self.stages)
            if name in layouts
        ]

    def of_rank(self, rank: int) -> Mapping[str, Layout]:
        """The layouts of the stage that a rank belongs to."""
        return self.stages[rank // self.stage_ranks]


def merged(strategies: Mapping[int, Mapping[str, Layout]], path: Path) -> Strategy:
    """The stages' layouts as one strategy; every stage from 0 on must be there."""
    stages = sorted(strategies)
    for expected, stage in enumerate(stages):
        if stage != expected:
            raise CheckpointError(
                f"{path}: the strategy of pipeline stage {expected} is missing, "
                f"that of stage {stages[-1]} is there"
            )
    return Strategy(tuple(strategies[stage] for stage in stages), str(path))
