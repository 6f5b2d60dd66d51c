"""llama.cpp (llama-cpp-python) for compare.py: argv = MODEL.gguf DTYPE PROMPT NEW BATCH THREADS."""

import json
import sys
import time

import llama_cpp as api
import numpy as np

model, _, *numbers = sys.argv[1:]
prompt, new, batch, threads = map(int, numbers)
llama = api.Llama(
    model,
    n_ctx=prompt + new + 8,
    n_batch=2048,
    n_ubatch=512,
    n_threads=threads,
    n_threads_batch=threads,
    flash_attn=True,
    verbose=False,
)
rng = np.random.default_rng(0)


def prompts(count: int, length: int) -> list[list[int]]:
    return [[int(t) for t in rng.integers(10, 40000, length)] for _ in range(count)]


def batched_context():
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_seq_max = batch * 256, 2048, batch
    params.n_threads = params.n_threads_batch = threads
    return api.llama_init_from_model(llama._model.model, params)


def run_batch(context, many: list[list[int]], steps: int) -> None:
    api.llama_memory_clear(api.llama_get_memory(context), True)
    box = api.llama_batch_init(2048, 0, 1)
    tokens = [(s, p, t) for s, ids in enumerate(many) for p, t in enumerate(ids)]
    decode(context, box, [(s, p, t, p == len(many[s]) - 1) for s, p, t in tokens])
    for step in range(steps - 1):
        decode(context, box, [(s, len(ids) + step, ids[step], True) for s, ids in enumerate(many)])
    api.llama_batch_free(box)


def decode(context, box, entries: list[tuple[int, int, int, bool]]) -> None:
    box.n_tokens = len(entries)
    for i, (sequence, position, token, wants_logits) in enumerate(entries):
        box.token[i], box.pos[i], box.n_seq_id[i] = token, position, 1
        box.seq_id[i][0], box.logits[i] = sequence, wants_logits
    assert api.llama_decode(context, box) == 0


pool = batched_context() if batch else None
for _ in sys.stdin:
    (ids,) = prompts(1, prompt)
    llama.reset()
    start = time.perf_counter()
    llama.eval(ids)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for token in ids[:new]:
        llama.eval([token])
    row = {f"pp{prompt}": prompt / prefill, f"tg{new}": new / (time.perf_counter() - start)}
    if pool:
        start = time.perf_counter()
        run_batch(pool, prompts(batch, 128), 64)
        row[f"batch{batch}"] = batch * 64 / (time.perf_counter() - start)
    print(json.dumps(row), flush=True)
