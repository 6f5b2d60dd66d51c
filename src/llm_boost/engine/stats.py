"""How an engine is doing: what runs and waits, where the memory is, how much has been done."""

from __future__ import annotations

from dataclasses import dataclass

from llm_boost.engine.drafts import Speculator
from llm_boost.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment's sizes, and sums since the engine was made. Sequences are a request's completions."""

    num_running: int  # sequences
    num_waiting: int  # sequences
    num_blocks: int  # of the KV cache
    num_free_blocks: int  # hold nothing
    num_cached_blocks: int  # hold the beginning of a text that may come again, and can be had like free ones
    num_used_blocks: int
    num_queried_tokens: int  # of sequences whose beginning was looked for in the prefix cache
    num_hit_tokens: int  # of these, those that were found there
    num_preemptions: int
    num_steps: int
    num_computed_tokens: int  # of prompts and outputs, those computed twice included
    num_generated_tokens: int
    step_seconds: float  # of all steps together
    last_step_seconds: float
    num_drafted_tokens: int = 0  # guessed ahead, by speculation
    num_accepted_tokens: int = 0  # of these, those that were right


@dataclass(slots=True)
class EngineCounters:
    """The sums, as the engine counts them."""

    num_steps: int = 0
    num_computed_tokens: int = 0
    num_generated_tokens: int = 0
    step_seconds: float = 0.0
    last_step_seconds: float = 0.0

    def count(self, computed: int, generated: int, seconds: float) -> None:
        """One step."""
        self.num_steps += 1
        self.num_computed_tokens += computed
        self.num_generated_tokens += generated
        self.step_seconds += seconds
        self.last_step_seconds = seconds

    def stats(self, scheduler: Scheduler, speculator: Speculator | None = None) -> EngineStats:
        blocks = scheduler.blocks
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=blocks.num_blocks,
            num_free_blocks=blocks.num_free - blocks.num_cached,
            num_cached_blocks=blocks.num_cached,
            num_used_blocks=blocks.num_blocks - blocks.num_free,
            num_queried_tokens=blocks.num_queried_tokens,
            num_hit_tokens=blocks.num_hit_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self.num_steps,
            num_computed_tokens=self.num_computed_tokens,
            num_generated_tokens=self.num_generated_tokens,
            step_seconds=self.step_seconds,
            last_step_seconds=self.last_step_seconds,
            num_drafted_tokens=speculator.num_drafted_tokens if speculator else 0,
            num_accepted_tokens=speculator.num_accepted_tokens if speculator else 0,
        )
