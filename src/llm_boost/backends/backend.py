"""What an engine must be able to do for the service to serve it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from llm_boost.config.run_config import Resolved
    from llm_boost.engine.outputs import RequestOutput
    from llm_boost.engine.prompts import Prompt
    from llm_boost.engine.sampling_params import SamplingParams
    from llm_boost.engine.stats import EngineStats
    from llm_boost.tokenization import Tokenizer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Capabilities:
    """What requests may ask of an engine; the service refuses the rest by name before it reaches one."""

    logprobs: bool = False
    structured_output: bool = False
    embeddings: bool = False


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model, for metadata and limits."""

    max_model_len: int  # tokens of prompt and output together
    vocab_size: int
    dtype: str
    weight_bytes: int
    max_num_seqs: int  # sequences that run at the same time
    max_num_batched_tokens: int  # tokens that one step computes
    block_size: int  # tokens of a block of the KV cache


class Backend(Protocol):
    """A model in an engine. Methods without `async` are safe from any thread and do not wait."""

    name: ClassVar[str]
    capabilities: Capabilities

    @classmethod
    def probe(cls) -> str | None:
        """None when the engine can be used on this machine, else why not and what to install."""
        ...

    @classmethod
    def load(cls, run: Resolved, options: Mapping[str, Any], progress: Progress | None = None) -> Backend:
        """Loads the model that the run's configuration names; `options` are the engine's own limits.

        Raises:
            CheckpointError, ConfigError, TokenizerError: what stands in the way, in one line.
        """
        ...

    @property
    def model(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def default_sampling_params(self) -> SamplingParams:
        """What the model's own generation_config.json asks for."""
        ...

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **template_options: Any) -> Prompt:
        """A conversation through the model's chat template; may take milliseconds: call it in a thread."""
        ...

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
        """Outputs as they grow, the last one `finished`; closing the generator aborts.

        Each output holds all there is, its `delta` what is new to the reader: one that is slow sees fewer
        and larger outputs, and memory stays bounded. `priority`: lower comes first; `timeout` in seconds.

        Raises:
            RequestError: the prompt or a parameter is out of range. EngineError: the engine failed.
        """
        ...

    async def abort(self, request_id: str) -> bool:
        """Ends a request with the finish reason "abort"; False if it is not under way."""
        ...

    def stats(self) -> EngineStats: ...

    def check_health(self) -> None:
        """EngineError, with the reason, when the engine has ended."""
        ...

    @property
    def last_step_time(self) -> float:
        """When the engine last made progress, in monotonic seconds; now, while it has nothing to do."""
        ...

    async def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests and waits for those under way; False if some still are after `timeout` s."""
        ...

    def close(self) -> None:
        """Aborts what still runs and gives everything back."""
        ...
