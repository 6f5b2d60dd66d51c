"""llama.cpp, through llama-cpp-python; MODEL is a GGUF file, whose own types are used."""

from __future__ import annotations

import ctypes
import time

import llama_cpp as api
import numpy as np
from worker import BATCH_NEW, BATCH_PROMPT, Options, serve

SILENCE = api.llama_log_callback(lambda level, text, data: None)
MAX_BATCH, MICRO_BATCH = 2048, 512


class LlamaCpp:
    version = f"llama-cpp-python {api.__version__}"

    def __init__(self, options: Options) -> None:
        api.llama_log_set(SILENCE, None)
        api.llama_backend_init()
        self._options = options
        params = api.llama_model_default_params()
        self._model = api.llama_model_load_from_file(options.model.encode(), params)
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._box = api.llama_batch_init(MAX_BATCH, 0, 1)
        self._one = self._context(options.longest + 8, sequences=1)
        length = BATCH_PROMPT + BATCH_NEW
        self._pool = self._context(options.batch * length, sequences=options.batch) if options.batch else None

    def _context(self, tokens: int, sequences: int):
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = tokens, MAX_BATCH, MICRO_BATCH
        params.n_seq_max, params.kv_unified = sequences, True
        params.n_threads = params.n_threads_batch = self._options.threads
        params.flash_attn_type = 1  # on
        return api.llama_init_from_model(self._model, params)

    def _clear(self, context) -> None:
        api.llama_memory_clear(api.llama_get_memory(context), True)

    def _decode(self, context, entries: list[tuple[int, int, int, bool]]) -> None:
        """Entries are (sequence, position, token, whether its logits are wanted)."""
        for first in range(0, len(entries), MAX_BATCH):
            part = entries[first : first + MAX_BATCH]
            self._box.n_tokens = len(part)
            for i, (sequence, position, token, wanted) in enumerate(part):
                self._box.token[i], self._box.pos[i], self._box.n_seq_id[i] = token, position, 1
                self._box.seq_id[i][0], self._box.logits[i] = sequence, wanted
            assert api.llama_decode(context, self._box) == 0

    def _greedy(self, context, row: int = -1) -> int:
        return int(self._rows(context, row, 1)[0].argmax())

    def _rows(self, context, first: int, count: int) -> np.ndarray:
        pointer = api.llama_get_logits_ith(context, first)
        flat = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(flat, (count, self._vocab_size))

    def single(self, prompt: list[int], new: int) -> tuple[float, float]:
        self._clear(self._one)
        start = time.perf_counter()
        last = len(prompt) - 1
        self._decode(self._one, [(0, i, token, i == last) for i, token in enumerate(prompt)])
        token = self._greedy(self._one)
        first = time.perf_counter()
        for step in range(new):
            self._decode(self._one, [(0, len(prompt) + step, token, True)])
            token = self._greedy(self._one)
        return first - start, time.perf_counter() - first

    def many(self, prompts: list[list[int]], new: int) -> float:
        self._clear(self._pool)
        start = time.perf_counter()
        self._decode(
            self._pool,
            [
                (s, p, token, p == len(ids) - 1)
                for s, ids in enumerate(prompts)
                for p, token in enumerate(ids)
            ],
        )
        # All prompts fit one batch, so that each sequence's last row has its logits.
        tokens = [self._greedy(self._pool, sum(map(len, prompts[: s + 1])) - 1) for s in range(len(prompts))]
        for step in range(new - 1):
            entries = [(s, len(ids) + step, tokens[s], True) for s, ids in enumerate(prompts)]
            self._decode(self._pool, entries)
            tokens = [self._greedy(self._pool, s) for s in range(len(prompts))]
        return time.perf_counter() - start

    def logits(self, tokens: list[int]) -> np.ndarray:
        self._clear(self._one)
        inputs = tokens[:-1]
        self._decode(self._one, [(0, i, token, True) for i, token in enumerate(inputs)])
        return self._rows(self._one, 0, len(inputs)).copy()


serve(LlamaCpp)
