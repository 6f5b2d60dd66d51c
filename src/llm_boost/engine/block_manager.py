"""Who owns which block of the KV cache, and which blocks hold the beginning of a text that may come again."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable

from llm_boost.engine.sequence import Sequence
from llm_boost.errors import EngineError

Key = tuple[Hashable, bytes]  # what came before a block, and its own tokens


class BlockManager:
    """Hands out blocks of `block_size` tokens. Every block is

    - used: it counts the sequences that hold it;
    - cached: none holds it, but it is full, and a sequence that begins as the last one did finds it; or
    - free.

    A full block is found by its own tokens and a number that stands for all before them (for the first block,
    the sequence's salt). Numbers are never given twice and a dictionary compares its keys, so what is found
    is what was looked for; no hash can be made to collide. Where none is free the least recently used cached
    block is overwritten. A sequence gives its blocks back last first, so that a block goes before the one
    that leads to it.

    Args:
        caching: False shares blocks among sequences of the same salt that run, and keeps none.
    """

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self.num_queried_tokens = 0  # of sequences that were looked up
        self.num_hit_tokens = 0  # of these, those that were found
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._ref_counts = [0] * num_blocks
        self._keys: dict[int, Key] = {}  # of the blocks that can be found
        self._by_key: dict[Key, int] = {}
        self._numbers = [0] * num_blocks  # of these blocks: what their successors' keys begin with
        self._new_number = itertools.count(1)

    @property
    def num_free(self) -> int:
        """Blocks that can be had, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def missing(self, sequence: Sequence) -> int:
        """Blocks that the sequence lacks to hold all its tokens and drafts."""
        return self.blocks_for(sequence.num_tokens + sequence.num_drafts) - sequence.num_blocks

    def fits(self, sequence: Sequence, spare: int, *, instead_of: Iterable[Sequence] = ()) -> bool:
        """Whether `admit` would succeed, once other sequences have been released."""
        found = self._find(sequence)
        uses = Counter(block for other in instead_of for block in other.block_table.tolist())
        given_up = {block for block, count in uses.items() if count == self._ref_counts[block]}
        return self._lacks(sequence, found, spare) <= len(given_up.difference(found))

    def admit(self, sequence: Sequence, spare: int) -> bool:
        """Gives a sequence without blocks all it needs, those that hold its beginning first.

        False, and nothing changed, when fewer than `spare` blocks would stay.
        """
        found = self._find(sequence)
        if self._lacks(sequence, found, spare) > 0:
            return False
        for block in found:
            self._hold(block)
            sequence.append_block(block)
        sequence.num_shareable = len(found)
        sequence.num_computed = len(found) * self.block_size
        if sequence.num_cached is None:  # not one that comes back from preemption
            sequence.num_cached = sequence.num_computed
            self.num_queried_tokens += sequence.num_tokens
            self.num_hit_tokens += sequence.num_computed
        return self.grow(sequence)

    def grow(self, sequence: Sequence) -> bool:
        """Gives the sequence blocks for all its tokens; False, and nothing changed, when too few are free."""
        missing = self.missing(sequence)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._ref_counts[block] = 1
            sequence.append_block(block)
        return True

    def publish(self, sequence: Sequence, num_tokens: int, *, computed: bool = True) -> None:
        """Lets other sequences find the full blocks of a sequence's first `num_tokens` tokens.

        Where two have computed the same, the second takes the first one's block instead of its own. Not
        `computed`: the step about to run computes them, and who finds them runs in it too or later.
        """
        for index in range(sequence.num_shareable, num_tokens // self.block_size):
            block = int(sequence.block_table[index])
            key = self._key(sequence, index, self._number_before(sequence, index))
            known = self._by_key.setdefault(key, block)
            if known != block:
                if not computed:
                    return
                self._hold(known)
                sequence.block_table[index] = known
                self._drop(block)
            elif block not in self._keys:
                self._keys[block] = key
                self._numbers[block] = next(self._new_number)
            sequence.num_shareable += 1

    def release(self, sequence: Sequence) -> None:
        """Takes back all of a sequence's blocks."""
        for block in reversed(sequence.block_table.tolist()):
            self._drop(block)
        sequence.forget()

    def forget(self) -> None:
        """No block is found any more: what they hold is in doubt."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._keys.clear()
        self._by_key.clear()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """EngineError unless free + cached + used blocks are all blocks, and each use has its sequence."""
        held = Counter(block for sequence in sequences for block in sequence.block_table.tolist())
        counted = {block: count for block, count in enumerate(self._ref_counts) if count}
        if counted != held:
            raise EngineError(
                "KV cache: the blocks' reference counts differ from the sequences' block tables"
            )
        free, cached, used = set(self._free), self._cached.keys(), held.keys()
        together = len(self._free) + len(cached) + len(used)
        if (
            len(free) != len(self._free)
            or len(free | cached | used) != together
            or together != self.num_blocks
        ):
            raise EngineError(
                f"KV cache: {len(self._free)} free + {len(cached)} cached + {len(used)} used "
                f"!= {self.num_blocks} blocks"
            )
        if {block: key for key, block in self._by_key.items()} != self._keys or not (
            cached <= self._keys.keys() <= cached | used
        ):
            raise EngineError("KV cache: the blocks that can be found are not those that are full")

    def _find(self, sequence: Sequence) -> list[int]:
        """The blocks that hold the sequence's beginning, as far as it needs no logits there."""
        found: list[int] = []
        before: Hashable = sequence.salt
        for index in range(sequence.num_reusable // self.block_size):
            block = self._by_key.get(self._key(sequence, index, before))
            if block is None:
                break
            found.append(block)
            before = self._numbers[block]
        return found

    def _lacks(self, sequence: Sequence, found: list[int], spare: int) -> int:
        """Blocks that are too few to hold the sequence after those found, and to spare."""
        available = self.num_free - sum(block in self._cached for block in found)
        return self.missing(sequence) - len(found) + spare - available

    def _key(self, sequence: Sequence, index: int, before: Hashable) -> Key:
        start = index * self.block_size
        return before, sequence.tokens[start : start + self.block_size].tobytes()

    def _number_before(self, sequence: Sequence, index: int) -> Hashable:
        return self._numbers[sequence.block_table[index - 1]] if index else sequence.salt

    def _hold(self, block: int) -> None:
        self._cached.pop(block, None)
        self._ref_counts[block] += 1

    def _drop(self, block: int) -> None:
        self._ref_counts[block] -= 1
        if self._ref_counts[block]:
            return
        if self.caching and block in self._keys:
            self._cached[block] = None
            return
        self._lose(block)
        self._free.append(block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._lose(block)
        return block

    def _lose(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._by_key[key]
