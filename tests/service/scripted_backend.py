"""A backend of another kind: it says what it was told to say, a few characters a step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from golden import model_dir
from llm_boost.backends import Capabilities, ModelInfo
from llm_boost.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.engine.stats import EngineStats
from llm_boost.tokenization import load_tokenizer


class ScriptedBackend:
    """Has no engine at all; all that the service knows of it is the Backend protocol."""

    name = "Scripted"
    capabilities = Capabilities()

    def __init__(self, script: str, step: int = 7) -> None:
        self.script, self._step = script, step
        self.tokenizer = load_tokenizer(model_dir("qwen2"))
        self.model = ModelInfo(4096, 512, "float32", 0, 8, 512, 16)
        self.prompts: list[Any] = []
        self.params: list[SamplingParams] = []

    def default_sampling_params(self) -> SamplingParams:
        return SamplingParams()

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **template_options: Any) -> Any:
        self.prompts.append((messages, template_options))
        return {"prompt": "chat", "prompt_token_ids": [1, 2, 3]}

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self.params.append(params)
        metrics = RequestMetrics(time.monotonic(), num_prompt_tokens=len(prompt["prompt_token_ids"]))
        ends = [*range(self._step, len(self.script), self._step), len(self.script)]
        start = 0
        for end in ends:
            await asyncio.sleep(0)
            finished = end == ends[-1]
            if options["stream"] or finished:
                text, delta = self.script[:end], self.script[start:end]
                ids = list(range(1, end + 1))
                reason: Any = "stop" if finished else None
                outputs = [
                    CompletionOutput(i, text, ids, None, None, reason, None, delta) for i in range(params.n)
                ]
                yield RequestOutput(request_id, None, prompt["prompt_token_ids"], outputs, finished, metrics)
                start = end

    async def abort(self, request_id: str) -> bool:
        return False

    def stats(self) -> EngineStats:
        return EngineStats(**dict.fromkeys(EngineStats.__dataclass_fields__, 0))

    def check_health(self) -> None:
        pass

    @property
    def last_step_time(self) -> float:
        return time.monotonic()

    async def drain(self, timeout: float | None = None) -> bool:
        return True

    def close(self) -> None:
        pass
