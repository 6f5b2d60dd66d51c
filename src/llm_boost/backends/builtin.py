"""The built-in engine as a backend: AsyncLLM, and the way from a run's configuration to a loaded model."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llm_boost.backends.backend import Capabilities, ModelInfo, Progress
from llm_boost.config.locations import find_model
from llm_boost.errors import ConfigError, LLMBoostError, TokenizerError

if TYPE_CHECKING:
    from llm_boost.config.llm_boost_yaml import LlmBoostYaml
    from llm_boost.config.run_config import Resolved
    from llm_boost.engine.llm import LLM
    from llm_boost.engine.outputs import RequestOutput
    from llm_boost.engine.prompts import Prompt
    from llm_boost.engine.sampling_params import SamplingParams
    from llm_boost.engine.stats import EngineStats
    from llm_boost.tokenization import Tokenizer


class BuiltinBackend:
    """Many requests at a time, in a thread of its own."""

    name: ClassVar[str] = "BuildIn"
    capabilities = Capabilities(logprobs=True, structured_output=True)

    def __init__(self, llm: LLM) -> None:
        from llm_boost.engine.async_llm import AsyncLLM

        self._llm = llm
        self._engine = AsyncLLM(llm)
        runner = llm.engine.runner
        self.model = ModelInfo(
            max_model_len=llm.max_model_len,
            vocab_size=runner.vocab_size,
            dtype=llm.dtype,
            weight_bytes=llm.weight_bytes,
            max_num_seqs=llm.engine.scheduler.config.max_num_seqs,
            max_num_batched_tokens=llm.engine.scheduler.config.max_num_batched_tokens,
            block_size=runner.block_size,
        )

    @classmethod
    def probe(cls) -> str | None:
        return None  # it is part of this package

    @classmethod
    def load(
        cls, run: Resolved, options: Mapping[str, Any], progress: Progress | None = None
    ) -> BuiltinBackend:
        llm = load_llm(run, progress, **options)
        if llm.tokenizer.chat_template is not None:
            with contextlib.suppress(
                LLMBoostError
            ):  # the first chat need not wait for the template's process
                llm.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
        return cls(llm)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._llm.tokenizer

    def default_sampling_params(self) -> SamplingParams:
        return self._llm.default_sampling_params()

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **template_options: Any) -> Prompt:
        return self._llm.chat_prompts(list(messages), **template_options)[0]

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        timeout: float | None = None,
        stream: bool = True,
    ) -> AsyncGenerator[RequestOutput, None]:
        return self._engine.generate(
            prompt, params, request_id, priority=priority, timeout=timeout, stream=stream
        )

    async def abort(self, request_id: str) -> bool:
        return await self._engine.abort(request_id)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def check_health(self) -> None:
        self._engine.check_health()

    @property
    def last_step_time(self) -> float:
        return self._engine.last_step_time

    async def drain(self, timeout: float | None = None) -> bool:
        return await self._engine.drain(timeout)

    def close(self) -> None:
        self._engine.close()


def load_llm(resolved: Resolved, progress: Progress | None = None, **engine_options: Any) -> LLM:
    """Loads the model that the configuration names; raises CheckpointError or ConfigError.

    `engine_options` are LLM's own, beyond what a run's configuration says. What the user should know of the
    choice of a tokenizer is added to `resolved.notes`.
    """
    config = resolved.config
    path = find_model(config.model, config.cache_dir)
    hf_config = None
    if resolved.yaml is not None:
        from llm_boost.config.shapes import to_hf_config

        hf_config = to_hf_config(resolved.yaml)
        _check_against_checkpoint(resolved.yaml, path, hf_config)
    overrides = config.tokenizer_overrides
    if overrides and path.suffix == ".gguf" and config.vocab_file is None and config.merges_file is None:
        resolved.notes.append(
            "processor.tokenizer of the YAML is without effect: the GGUF file holds its own tokenizer"
        )
        overrides = {}
    from llm_boost.engine.llm import LLM

    options: dict[str, Any] = {
        "dtype": config.dtype,
        "max_model_len": config.seq_length,
        "threads": config.threads,
        "seed": config.seed,
        "cache_dir": config.cache_dir,
        "block_size": config.block_size,
        "num_blocks": config.num_blocks,
        "kv_cache_memory": config.kv_cache_memory,
        "vocab_file": config.vocab_file,
        "merges_file": config.merges_file,
        "tokenizer_overrides": overrides or None,
        "hf_config": hf_config,
        "progress": progress,
    }
    with naming_origins(resolved):
        return LLM(model=path, **{**options, **engine_options})


@contextlib.contextmanager
def naming_origins(resolved: Resolved) -> Iterator[None]:
    """The engine names a setting; the user is told the flag, the variable or the file that it came from."""
    try:
        yield
    except ConfigError as error:
        name = str(error).partition(":")[0]
        origin = resolved.origins.get("seq_length" if name == "max_model_len" else name, name)
        raise ConfigError(str(error).replace(name, origin, 1)) from None
    except TokenizerError as error:
        if resolved.yaml is None or not str(error).startswith("processor.tokenizer"):
            raise
        raise TokenizerError(f"{resolved.yaml.path}: {error}") from None


def _check_against_checkpoint(yaml_config: LlmBoostYaml, path: Path, hf_config: dict[str, Any]) -> None:
    from llm_boost.checkpoint.checkpoint import open_checkpoint
    from llm_boost.config.shapes import check_shapes

    checkpoint = open_checkpoint(path, hf_config)
    try:
        config_file = path if checkpoint.format == "gguf" else checkpoint.folder / "config.json"
        check_shapes(yaml_config, checkpoint.config, config_file)
    finally:
        checkpoint.close()
