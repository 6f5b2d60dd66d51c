"""Who owns which block of the KV cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from llm_boost.engine.sequence import Sequence
from llm_boost.errors import EngineError


class BlockManager:
    """Hands out blocks of `block_size` tokens. Every block is free, or counts the sequences that hold it."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._ref_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def missing(self, sequence: Sequence) -> int:
        """Blocks that the sequence lacks to hold all its tokens."""
        return self.blocks_for(sequence.num_tokens) - sequence.num_blocks

    def grow(self, sequence: Sequence) -> bool:
        """Gives the sequence blocks for all its tokens; False, and nothing changed, when too few are free."""
        missing = self.missing(sequence)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._free.pop()
            self._ref_counts[block] = 1
            sequence.append_block(block)
        return True

    def share(self, donor: Sequence, sequence: Sequence, num_blocks: int) -> None:
        """Lets a sequence without blocks begin with the donor's first ones: full and computed ones."""
        for block in donor.block_table[:num_blocks].tolist():
            self._ref_counts[block] += 1
            sequence.append_block(block)
        sequence.num_computed = num_blocks * self.block_size

    def release(self, sequence: Sequence) -> None:
        """Takes back all of a sequence's blocks."""
        for block in reversed(sequence.block_table.tolist()):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free.append(block)
        sequence.forget()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """EngineError unless each block is free, or counted for exactly the given sequences that hold it."""
        held = Counter(block for sequence in sequences for block in sequence.block_table.tolist())
        free = set(self._free)
        counted = {block: count for block, count in enumerate(self._ref_counts) if count}
        if counted != held:
            raise EngineError(
                "KV cache: the blocks' reference counts differ from the sequences' block tables"
            )
        if len(free) != len(self._free) or free & held.keys() or len(free) + len(held) != self.num_blocks:
            raise EngineError(
                f"KV cache: {len(self._free)} free + {len(held)} held != {self.num_blocks} blocks"
            )
