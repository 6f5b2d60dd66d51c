"""The built-in engine for compare.py: argv = MODEL DTYPE PROMPT NEW BATCH THREADS."""

import json
import sys
import time

import numpy as np

from llm_boost import LLM, SamplingParams

model, dtype, *numbers = sys.argv[1:]
prompt, new, batch, threads = map(int, numbers)
llm = LLM(
    model,
    dtype=dtype or "auto",
    threads=threads,
    max_model_len=max(prompt + new + 8, 256),
    max_num_seqs=max(batch, 1),
)
rng = np.random.default_rng(0)


def prompts(count: int, length: int) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": [int(t) for t in rng.integers(10, 40000, length)]} for _ in range(count)]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


for _ in sys.stdin:
    (single,) = llm.generate(prompts(1, prompt), greedy(new + 1))
    metrics = single.metrics
    prefill = metrics.first_token_time - metrics.arrival_time
    row = {
        f"pp{prompt}": prompt / prefill,
        f"tg{new}": new / (metrics.finished_time - metrics.first_token_time),
    }
    if batch:
        start = time.perf_counter()
        llm.generate(prompts(batch, 128), greedy(64))
        row[f"batch{batch}"] = batch * 64 / (time.perf_counter() - start)
    print(json.dumps(row), flush=True)
