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
    from llm_boost.config.run_config import Resolved, RunConfig
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
        llm = load_llm(run, progress, **_fitted(run, options))
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


def _fitted(run: Resolved, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with wishes cut to what the model and this machine have; what was cut is noted."""
    from llm_boost.engine.hardware import available_memory

    fitted = dict(options)
    length = fitted.pop("max_model_len_at_most", None)
    if length is not None and "max_model_len" not in fitted:
        most = min(_longest(run), run.config.seq_length or length)
        fitted["max_model_len"] = min(length, most)
        if length > most:
            run.notes.append(f"maxSeqLen {length} is cut to {most}, which the model is made for")
    memory = fitted.pop("kv_cache_memory_at_most", None)
    if memory is not None:
        if memory <= available_memory() // 2:
            fitted["kv_cache_memory"] = memory
        else:
            run.notes.append(
                f"npuMemSize {memory >> 30} GB is more than half of the free memory: "
                "the KV cache is sized automatically"
            )
    return fitted


def _longest(run: Resolved) -> int:
    """Tokens of prompt and output that the model was made for."""
    from llm_boost.checkpoint import open_checkpoint
    from llm_boost.models.config import ModelConfig

    hf_config = None
    if run.yaml is not None:
        from llm_boost.config.shapes import to_hf_config

        hf_config = to_hf_config(run.yaml)
    checkpoint = open_checkpoint(find_model(run.config.model, run.config.cache_dir), hf_config)
    try:
        return ModelConfig.from_hf(checkpoint.config, str(checkpoint.path)).max_model_len
    finally:
        checkpoint.close()


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
    _check_ranks(resolved, path)
    if resolved.yaml is not None and hf_config is not None:
        _check_against_checkpoint(resolved.yaml, path, hf_config, config.src_strategy)
    overrides = config.tokenizer_overrides
    if overrides and path.suffix == ".gguf" and config.vocab_file is None and config.merges_file is None:
        resolved.notes.append(
            "processor.tokenizer of the YAML is without effect: the GGUF file holds its own tokenizer"
        )
        overrides = {}
    from llm_boost.engine.llm import LLM

    options: dict[str, Any] = {
        "dtype": config.dtype,
        "kv_cache_dtype": config.kv_cache_dtype,
        "max_model_len": config.seq_length,
        "threads": config.threads,
        "seed": config.seed,
        "cache_dir": config.cache_dir,
        "block_size": config.block_size,
        "num_blocks": config.num_blocks,
        "kv_cache_memory": config.kv_cache_memory,
        "speculative_config": _speculation(config),
        "vocab_file": config.vocab_file,
        "merges_file": config.merges_file,
        "tokenizer_overrides": overrides or None,
        "src_strategy": config.src_strategy,
        "hf_config": hf_config,
        "progress": progress,
    }
    with naming_origins(resolved):
        return LLM(model=path, **{**options, **engine_options})


def _speculation(config: RunConfig) -> dict[str, Any] | None:
    """The speculative_config, in which a pulled model's name has become its path."""
    said = config.speculation()
    if said and said.get("model"):
        said["model"] = str(find_model(said["model"], config.cache_dir))
    return said


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


def _check_ranks(resolved: Resolved, path: Path) -> None:
    """A checkpoint in rank folders is merged as it is read, unless auto_trans_ckpt says that it must fit."""
    from llm_boost.checkpoint.parallel.split_weights import is_split

    config, origins = resolved.config, resolved.origins
    if not is_split(path):
        if config.src_strategy is not None:
            resolved.notes.append(
                f"{origins.get('src_strategy')}: without effect, since {path} is not split into ranks"
            )
    elif config.auto_trans_ckpt is False:
        raise ConfigError(
            f"{origins.get('auto_trans_ckpt')}: got False, but {path} is split into ranks and this is one: "
            "set it to True, or merge the checkpoint with llm-boost transform"
        )


def _check_against_checkpoint(
    yaml_config: LlmBoostYaml, path: Path, hf_config: dict[str, Any], src_strategy: Path | None
) -> None:
    from llm_boost.checkpoint.checkpoint import open_checkpoint
    from llm_boost.config.shapes import check_shapes

    checkpoint = open_checkpoint(path, hf_config, src_strategy=src_strategy)
    try:
        config_file = path if checkpoint.format == "gguf" else checkpoint.folder / "config.json"
        check_shapes(yaml_config, checkpoint.config, config_file)
    finally:
        checkpoint.close()
