"""OpenVINO GenAI; MODEL is a directory that `optimum-cli export openvino` wrote."""

from __future__ import annotations

import time

import numpy as np
import openvino
import openvino_genai as genai
from worker import BATCH_NEW, BATCH_PROMPT, Options, serve

CACHE_GB = 1


class OpenVino:
    version = f"openvino-genai {genai.__version__.split('-')[0]}"

    def __init__(self, options: Options) -> None:
        self._options = options
        threads = {"INFERENCE_NUM_THREADS": options.threads}
        self._pipe = genai.LLMPipeline(options.model, "CPU", **threads)
        self._pool = None
        if options.batch:
            schedule = genai.SchedulerConfig()
            schedule.max_num_seqs = options.batch
            schedule.max_num_batched_tokens = options.batch * (BATCH_PROMPT + BATCH_NEW)
            schedule.cache_size, schedule.enable_prefix_caching = CACHE_GB, False
            self._pool = genai.ContinuousBatchingPipeline(options.model, schedule, "CPU", threads)
        self._request = None

    def single(self, prompt: list[int], new: int) -> tuple[float, float]:
        metrics = self._pipe.generate(_tensor(prompt), _greedy(new + 1)).perf_metrics
        return metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3 * new

    def many(self, prompts: list[list[int]], new: int) -> float:
        start = time.perf_counter()
        self._pool.generate([_tensor(prompt) for prompt in prompts], [_greedy(new)] * len(prompts))
        return time.perf_counter() - start

    def logits(self, tokens: list[int]) -> np.ndarray:
        """The pipelines keep their logits to themselves: the same model, compiled once more."""
        if self._request is None:
            settings = {"INFERENCE_NUM_THREADS": self._options.threads}
            model = openvino.Core().compile_model(
                f"{self._options.model}/openvino_model.xml", "CPU", settings
            )
            self._request = model.create_infer_request()
        self._request.reset_state()
        ids = np.array([tokens[:-1]], np.int64)
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.size, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return self._request.infer(inputs)["logits"][0].copy()


def _tensor(ids: list[int]) -> openvino.Tensor:
    return openvino.Tensor(np.array([ids], np.int64))


def _greedy(tokens: int) -> genai.GenerationConfig:
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
    return config


serve(OpenVino)
