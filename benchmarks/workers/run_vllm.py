"""vLLM for CPUs; MODEL is a Hugging Face directory, in bfloat16. Its first start compiles for a minute."""

from __future__ import annotations

import os
import time

import numpy as np
from worker import BATCH_NEW, BATCH_PROMPT, Options, serve

CACHE_GB = 1


class Vllm:
    def __init__(self, options: Options) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(CACHE_GB)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{options.threads - 1}"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
        import vllm

        self.version = f"vllm {vllm.__version__}"
        self._sampling = vllm.SamplingParams
        self._llm = vllm.LLM(
            options.model,
            dtype="bfloat16",
            max_model_len=max(options.longest, BATCH_PROMPT + BATCH_NEW) + 8,
            max_num_seqs=max(options.batch, 1),
            enable_prefix_caching=False,
        )
        self._requests = 0

    def _run(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        """Seconds to the first output, and to the end."""
        engine, params = self._llm.llm_engine, self._sampling(max_tokens=new, ignore_eos=True, temperature=0)
        start, first = time.perf_counter(), None
        for prompt in prompts:
            self._requests += 1
            engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            if engine.step() and first is None:
                first = time.perf_counter()
        return first - start, time.perf_counter() - start

    def single(self, prompt: list[int], new: int) -> tuple[float, float]:
        first, end = self._run([prompt], new + 1)
        return first, end - first

    def many(self, prompts: list[list[int]], new: int) -> float:
        return self._run(prompts, new)[1]

    def logits(self, tokens: list[int]) -> np.ndarray:
        """What the model computes on the way to a prompt's log-probabilities, which vLLM returns singly."""
        seen: list[np.ndarray] = []
        params = self._sampling(max_tokens=1, prompt_logprobs=0, temperature=0)

        def watch(model) -> None:
            compute = type(model).compute_logits

            def compute_logits(hidden_states, *rest):
                logits = compute(model, hidden_states, *rest)
                seen.append(logits.float().numpy().copy())
                return logits

            model.compute_logits = compute_logits

        def unwatch(model) -> None:
            del model.compute_logits

        self._llm.apply_model(watch)
        try:
            self._llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        finally:
            self._llm.apply_model(unwatch)
        rows = [logits for logits in seen if len(logits) > 1]
        logits = np.concatenate(rows)
        assert len(logits) == len(tokens) - 1, [x.shape for x in seen]
        return logits


serve(Vllm)
