"""From the scheduler's chunks to the arrays of a Batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llm_boost.engine.batch import Batch, Int32Array
from llm_boost.engine.scheduler import Chunk


def build_batch(chunks: Sequence[Chunk]) -> Batch:
    """The batch of the chunks, in their order; each chunk's last `num_logits` tokens give logits."""
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
        logit_rows=_tails(seq_starts[1:], np.array([chunk.num_logits for chunk in chunks])),
    )


def _tails(ends: Int32Array, counts: Int32Array) -> Int32Array:
    """The indices ends[i] - counts[i] .. ends[i] - 1 for each i, one after another."""
    firsts = ends - np.cumsum(counts)
    return np.arange(counts.sum(), dtype=np.int32) + np.repeat(firsts, counts).astype(np.int32)
