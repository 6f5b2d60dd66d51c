"""The built-in engine; DTYPE is one of its own, and `int8+kv8` keeps keys and values in int8."""

from __future__ import annotations

import time

import numpy as np
from worker import BATCH_NEW, BATCH_PROMPT, Options, serve

import llm_boost
from llm_boost import LLM, SamplingParams
from llm_boost.engine.batch import Batch

PIECE = 64  # tokens of a step whose logits are all wanted


class Builtin:
    version = llm_boost.__version__

    def __init__(self, options: Options) -> None:
        dtype, _, cache = options.dtype.partition("+")
        self._llm = LLM(
            options.model,
            dtype=dtype or "auto",
            threads=options.threads,
            max_model_len=max(options.longest, BATCH_PROMPT + BATCH_NEW),
            max_num_seqs=max(options.batch, 1),
            **({"kv_cache_dtype": "int8"} if cache == "kv8" else {}),
        )

    def single(self, prompt: list[int], new: int) -> tuple[float, float]:
        (output,) = self._llm.generate([{"prompt_token_ids": prompt}], _greedy(new + 1))
        metrics = output.metrics
        return (
            metrics.first_token_time - metrics.arrival_time,
            metrics.last_token_time - metrics.first_token_time,
        )

    def many(self, prompts: list[list[int]], new: int) -> float:
        start = time.perf_counter()
        self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], _greedy(new))
        return time.perf_counter() - start

    def logits(self, tokens: list[int]) -> np.ndarray:
        runner, inputs = self._llm.engine.runner, tokens[:-1]
        blocks = np.arange(-(-len(inputs) // runner.block_size), dtype=np.int32)[None]
        rows = []
        for start in range(0, len(inputs), PIECE):
            piece = np.array(inputs[start : start + PIECE], np.int32)
            end = np.array([start + len(piece)], np.int32)
            starts, wanted = np.array([0, len(piece)], np.int32), np.arange(len(piece), dtype=np.int32)
            prompt = np.array([len(inputs)], np.int32)
            rows.append(runner.run(Batch(piece, starts, end, prompt, blocks, wanted)).copy())
        return np.concatenate(rows)


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


serve(Builtin)
