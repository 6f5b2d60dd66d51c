"""From the scheduler's chunks to the arrays of a Batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llm_boost.engine.batch import Batch, Int32Array
from llm_boost.engine.scheduler import Chunk


def build_batch(chunks: Sequence[Chunk]) -> Batch:
    """The batch of the chunks, in their order.

    The last token of each last chunk wants logits, and so do the drafts after it.
    """
    count = len(chunks)
    seq_starts = np.zeros(count + 1, np.int32)
    np.cumsum([chunk.num_tokens for chunk in chunks], out=seq_starts[1:])
    context_lens = np.array([s.num_computed + n for s, n in chunks], np.int32)
    block_tables = np.full((count, max(chunk.sequence.num_blocks for chunk in chunks)), -1, np.int32)
    for row, (sequence, _) in zip(block_tables, chunks, strict=True):
        row[: sequence.num_blocks] = sequence.block_table
    return Batch(
        token_ids=np.concatenate([s.upcoming(n) for s, n in chunks]),
        seq_starts=seq_starts,
        context_lens=context_lens,
        prompt_lens=np.array([chunk.sequence.num_prompt_tokens for chunk in chunks], np.int32),
        block_tables=block_tables,
        logit_rows=_logit_rows(chunks, seq_starts),
    )


def _logit_rows(chunks: Sequence[Chunk], seq_starts: Int32Array) -> Int32Array:
    ends = seq_starts[1:][[chunk.is_last for chunk in chunks]]
    drafts = [chunk.num_drafts for chunk in chunks if chunk.is_last]
    if not any(drafts):
        return ends - 1
    rows = [np.arange(end - 1 - n, end, dtype=np.int32) for end, n in zip(ends, drafts, strict=True)]
    return np.concatenate(rows)
