"""Who comes first, and whether prompts or decodes do: MindIE's policies."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequences

from llm_boost.engine.scheduler_config import BY_PRIORITY, FIRST_COME, SchedulerConfig
from llm_boost.engine.sequence import Sequence

Rank = Callable[[Sequence], tuple[float, ...]]  # the smaller comes first

# A sequence comes before those of the next priority that arrived up to this much earlier: all get their turn.
PRIORITY_STEP_SECONDS = 60.0


def first_come(sequence: Sequence) -> tuple[float, ...]:
    return sequence.arrival, *sequence.order


def by_priority(sequence: Sequence) -> tuple[float, ...]:
    return sequence.arrival + sequence.priority * PRIORITY_STEP_SECONDS, *sequence.order


RANKS: dict[int, Rank] = {FIRST_COME: first_come, BY_PRIORITY: by_priority}


class PrefillFirst:
    """A batch of prompts goes first once it is due: its oldest has waited, it is full, or nothing runs."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._delay = config.max_queue_delay_microseconds / 1e6
        self._full = config.prefill_batch_size

    def __call__(self, waiting: Sequences[Sequence], running: Sequences[Sequence], now: float) -> bool:
        if not waiting or not running or len(waiting) >= self._full:
            return bool(waiting)
        return now - min(sequence.arrival for sequence in waiting) >= self._delay


class SelectBatch(PrefillFirst):
    """What is due goes first when what decoding lost to empty places outweighs what it would wait.

    Each time a batch of prompts is due, `decode_time_ms_per_req` is lost for every place of the decode batch
    that is empty; prompts cost `prefill_time_ms_per_req` for every sequence that runs.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self._config = config
        self._lost_ms = 0

    def __call__(self, waiting: Sequences[Sequence], running: Sequences[Sequence], now: float) -> bool:
        if not super().__call__(waiting, running, now):
            return False
        config = self._config
        self._lost_ms += config.decode_time_ms_per_req * (config.max_num_seqs - len(running))
        if config.prefill_time_ms_per_req * len(running) > self._lost_ms:
            return False
        self._lost_ms = 0
        return True
