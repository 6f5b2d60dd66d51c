"""What one step runs: the tokens of a mix of prefill chunks and decodes, flat, sequence after sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
FloatArray = NDArray[np.float32]


@dataclass(slots=True)
class Batch:
    """T tokens of S sequences, R of which want logits.

    A sequence's tokens are consecutive and end at `context_lens[s]`: its new tokens have the positions
    `context_lens[s] - n .. context_lens[s] - 1`, n = seq_starts[s + 1] - seq_starts[s] >= 1.
    """

    token_ids: Int32Array  # [T]
    seq_starts: Int32Array  # [S + 1], offsets into token_ids
    context_lens: Int32Array  # [S], tokens in the cache once the step has run
    prompt_lens: Int32Array  # [S], tokens of the original prompt (dynamic rope scaling needs it)
    block_tables: Int32Array  # [S, blocks], unused entries are -1
    logit_rows: Int32Array  # [R], indices into token_ids, ascending


class ModelRunner(Protocol):
    """Runs batches. The cache of keys and values lives behind it; block ids are its only handle."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_size(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...

    def position_salt(self, num_prompt_tokens: int) -> int:
        """Equal for two prompts' lengths if the same tokens get the same keys and values in both."""
        ...

    def run(self, batch: Batch) -> FloatArray:
        """Logits [R, vocab_size] of `batch.logit_rows`; the array is valid until the next call.

        A sequence may read a block that another fills in the same step, if that has more than one token in
        it: each layer then writes all its keys and values before it reads any.
        """
        ...
