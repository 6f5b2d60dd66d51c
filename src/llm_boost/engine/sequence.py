"""One completion in the making: its tokens, how many of them are in the cache, and in which blocks."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np

from llm_boost.engine.batch import Int32Array

if TYPE_CHECKING:
    from llm_boost.engine.drafts import Drafting


class Sequence:
    """A prompt and the tokens made from it so far.

    `order` is (request number, index in the request). Tokens 0 .. num_computed - 1 are in the cache; a step
    computes the next, and once all are computed the logits of the last give a new token. Sequences of
    different `salt` share no blocks. `num_cached` is how many tokens were in the cache when it first ran,
    None before. The prompt's positions from `logits_from` on give logits too, beside the last token. Drafts
    are guesses of the tokens to come, which a step computes too, to be verified.
    """

    __slots__ = (
        "_blocks",
        "_tokens",
        "arrival",
        "drafting",
        "logits_from",
        "num_blocks",
        "num_cached",
        "num_computed",
        "num_drafts",
        "num_prompt_tokens",
        "num_shareable",
        "num_tokens",
        "order",
        "priority",
        "salt",
        "set_aside",
    )

    def __init__(
        self,
        order: tuple[int, int],
        prompt: Int32Array,
        max_tokens: int,
        max_blocks: int,
        *,
        arrival: float = 0.0,
        priority: int = 0,
        salt: Hashable = None,
    ) -> None:
        self.order = order
        self.arrival = arrival  # in seconds
        self.priority = priority  # lower comes first
        self.set_aside = False  # it once gave way to one that had waited too long
        self.num_prompt_tokens = self.num_tokens = len(prompt)
        self.salt = salt
        self.num_cached: int | None = None
        self.logits_from = len(prompt)
        self.num_computed = 0
        self.num_drafts = 0
        self.drafting: Drafting | None = None  # what a drafter knows of it
        self.num_blocks = 0
        self.num_shareable = 0  # of its blocks, the first ones that others can find
        # Arrays, not lists: a step copies slices of them into its batch.
        self._tokens = np.empty(len(prompt) + max_tokens, np.int32)
        self._tokens[: len(prompt)] = prompt
        self._blocks = np.empty(max_blocks, np.int32)

    def mirror(self) -> Sequence:
        """A sequence of the same tokens, in the same memory, of which nothing is computed."""
        other = Sequence(self.order, self.tokens[:0], 0, len(self._blocks))
        other._tokens = self._tokens
        other.num_prompt_tokens, other.num_tokens = self.num_prompt_tokens, self.num_tokens
        other.logits_from = self.num_prompt_tokens
        return other

    @property
    def tokens(self) -> Int32Array:
        """Prompt and output [num_tokens]; a view."""
        return self._tokens[: self.num_tokens]

    @property
    def block_table(self) -> Int32Array:
        """Block ids [num_blocks]; a view."""
        return self._blocks[: self.num_blocks]

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """A step computes its newest token alone."""
        return self.num_uncomputed == 1

    @property
    def is_scored(self) -> bool:
        """No position of the prompt is left that gives logits for their own sake: all but the last may."""
        return self.logits_from >= self.num_prompt_tokens - 1

    @property
    def num_reusable(self) -> int:
        """Of its tokens, the first ones that need not be computed if the cache holds them."""
        return min(self.num_tokens - 1, self.num_tokens if self.is_scored else self.logits_from)

    @property
    def is_full(self) -> bool:
        """No token may follow."""
        return self.num_left == 0

    @property
    def num_left(self) -> int:
        """Tokens that may follow."""
        return len(self._tokens) - self.num_tokens

    def propose(self, drafts: Int32Array) -> None:
        """Guesses of the next tokens, fewer than may follow."""
        self.num_drafts = len(drafts)
        self._tokens[self.num_tokens : self.num_tokens + len(drafts)] = drafts

    def upcoming(self, count: int) -> Int32Array:
        """The next tokens to compute [count], drafts after the last; a view."""
        return self._tokens[self.num_computed : self.num_computed + count]

    def with_drafts(self, count: int) -> Int32Array:
        """Its tokens and the first drafts [num_tokens + count]; a view."""
        return self._tokens[: self.num_tokens + count]

    def append(self, token: int) -> None:
        self._tokens[self.num_tokens] = token
        self.num_tokens += 1

    def append_block(self, block: int) -> None:
        self._blocks[self.num_blocks] = block
        self.num_blocks += 1

    def forget(self) -> None:
        """Nothing of it is in the cache any more."""
        self.num_blocks = self.num_computed = self.num_shareable = self.num_drafts = 0
