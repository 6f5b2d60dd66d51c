"""ONNX Runtime GenAI, which does not batch; MODEL is a directory of `onnxruntime_genai.models.builder`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
from worker import Options, serve


class OnnxRuntime:
    version = f"onnxruntime-genai {genai.__version__}"

    def __init__(self, options: Options) -> None:
        config = genai.Config(options.model)
        config.overlay(json.dumps(_threads(options.threads)))
        self._model = genai.Model(config)
        self._vocab_size = json.loads(Path(options.model, "genai_config.json").read_text())["model"][
            "vocab_size"
        ]

    def _generator(self, length: int) -> genai.Generator:
        params = genai.GeneratorParams(self._model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        return genai.Generator(self._model, params)

    def single(self, prompt: list[int], new: int) -> tuple[float, float]:
        generator = self._generator(len(prompt) + new + 2)
        start = time.perf_counter()
        generator.append_tokens(np.array(prompt, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return first - start, time.perf_counter() - first

    def many(self, prompts: list[list[int]], new: int) -> None:
        return None

    def logits(self, tokens: list[int]) -> np.ndarray:
        generator = self._generator(len(tokens) + 2)
        generator.append_tokens(np.array(tokens[:-1], np.int32))
        logits = np.array(generator.get_output("logits"), np.float32)
        return logits.reshape(-1, self._vocab_size)[-(len(tokens) - 1) :]


def _threads(count: int) -> dict:
    return {"model": {"decoder": {"session_options": {"intra_op_num_threads": count}}}}


serve(OnnxRuntime)
