"""LLM: a model that answers, in vLLM's shape."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llm_boost.engine.batch import ModelRunner
from llm_boost.engine.draft_model import DraftModel
from llm_boost.engine.drafts import Speculator
from llm_boost.engine.engine import Engine, check_seed
from llm_boost.engine.output_stream import Outbox, OutputStream
from llm_boost.engine.outputs import Logprob, RequestOutput
from llm_boost.engine.plugin_params import parse_plugin_params
from llm_boost.engine.prompt_lookup import PromptLookup
from llm_boost.engine.prompts import Prompt, tokenize
from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.engine.scheduler_config import SchedulerConfig
from llm_boost.engine.speculative_config import SpeculativeConfig
from llm_boost.engine.vllm_options import check_vllm_options
from llm_boost.errors import CheckpointError, ConfigError, RequestError

if TYPE_CHECKING:
    from llm_boost.engine.beam_search import BeamSearchOutput, BeamSearchParams
    from llm_boost.models.config import ModelConfig
    from llm_boost.tokenization import Tokenizer

Message = Mapping[str, Any]
Progress = Callable[[int, int], None]


class LoadedRunner(ModelRunner, Protocol):
    """A runner with a model in it, that can say what it runs on."""

    @property
    def weight_bytes(self) -> int: ...

    @property
    def cache_bytes(self) -> int: ...

    @property
    def threads(self) -> int: ...

    @property
    def isa(self) -> str: ...

    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class Parts:
    """What an LLM is assembled from."""

    runner: LoadedRunner
    tokenizer: Tokenizer
    model_config: ModelConfig
    generation_config: Mapping[str, Any]
    generation_source: str = "generation_config.json"  # for messages


def load_parts(
    model: str | Path,
    *,
    vocab_file: str | Path | None,
    merges_file: str | Path | None,
    tokenizer_overrides: Mapping[str, Any] | None,
    hf_config: Mapping[str, Any] | None = None,
    src_strategy: str | Path | None = None,
    **runner_options: Any,
) -> Parts:
    """Opens the checkpoint; loads configuration, tokenizer and weights, the cheap before the expensive."""
    from llm_boost.checkpoint import open_checkpoint
    from llm_boost.engine.hardware import release_free_memory
    from llm_boost.engine.native_runner import NativeRunner
    from llm_boost.models.config import ModelConfig
    from llm_boost.tokenization import Tokenizer, load_tokenizer

    checkpoint = open_checkpoint(model, hf_config, src_strategy=src_strategy)
    is_gguf = checkpoint.format == "gguf"
    source = checkpoint.path if is_gguf else checkpoint.folder / "config.json"
    model_config = ModelConfig.from_hf(checkpoint.config, str(source), checkpoint.tensors)
    if is_gguf and not (vocab_file or merges_file or tokenizer_overrides):
        tokenizer = Tokenizer.from_gguf(checkpoint.metadata, source=str(checkpoint.path))
    else:
        tokenizer = load_tokenizer(
            checkpoint.folder,
            vocab_file=None if vocab_file is None else Path(vocab_file),
            merges_file=None if merges_file is None else Path(merges_file),
            overrides=tokenizer_overrides,
        )
    release_free_memory()
    runner = NativeRunner.load(checkpoint, model_config, **runner_options)
    settings = checkpoint.path if is_gguf else checkpoint.folder / "generation_config.json"
    return Parts(runner, tokenizer, model_config, checkpoint.generation_config, str(settings))


class LLM:
    """Loads a model once, then completes prompts and chats, many at a time.

    Not thread-safe: use an LLM from one thread. A prompt or parameter out of range raises RequestError before
    any prompt runs; a model that fails while it runs raises EngineError.

    Args:
        model: a Hugging Face directory, a GGUF file, or MindSpore's `.ckpt` or safetensors.
        dtype: of the weights: auto, float32, bfloat16, int8 or int4.
        kv_cache_dtype: of the KV cache: auto, float32, int16 or int8 (half the memory of int16).
        max_model_len: tokens of prompt and output together; by default what the model was made for.
        threads: by default one for each physical core.
        seed: for requests without a seed of their own.
        cache_dir: where packed weights are kept.
        block_size: of the KV cache, in tokens.
        num_blocks, kv_cache_memory: its size in blocks, or in bytes. By default it holds max_num_seqs
            sequences of max_model_len, or what fits in half of the memory that the weights leave free.
        max_num_seqs: sequences that run at the same time.
        max_num_batched_tokens: tokens that one step computes: larger is faster for prompts, smaller is
            smoother for the requests that run beside them.
        enable_prefix_caching: what the KV cache still holds of a prompt's beginning is not computed again.
            Prompts given as dictionaries may have a `cache_salt`: those of different salts share nothing.
        speculative_config: what is guessed ahead, as SpeculativeConfig or its fields; no text changes by it.
        plugin_params: MindIE's, which asks for the same in its own way.
        vocab_file, merges_file, tokenizer_overrides: a tokenizer other than the model directory's own.
        hf_config: config.json's keys, for a directory of safetensors without that file.
        src_strategy: of a checkpoint in rank folders, which is merged as it is read; a file or a folder.
        progress: called with (bytes done, bytes in all) while the weights are packed.
        options: the other fields of SchedulerConfig, MindIE's scheduling terms; and other arguments of
            vLLM's LLM, accepted at the values at which they ask for nothing.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        threads: int | None = None,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        block_size: int | None = None,
        num_blocks: int | None = None,
        kv_cache_memory: int | None = None,
        max_num_seqs: int = SchedulerConfig.max_num_seqs,
        max_num_batched_tokens: int = SchedulerConfig.max_num_batched_tokens,
        enable_prefix_caching: bool = SchedulerConfig.enable_prefix_caching,
        speculative_config: Mapping[str, Any] | SpeculativeConfig | None = None,
        plugin_params: str = "",
        vocab_file: str | Path | None = None,
        merges_file: str | Path | None = None,
        tokenizer_overrides: Mapping[str, Any] | None = None,
        hf_config: Mapping[str, Any] | None = None,
        src_strategy: str | Path | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        terms = {field.name for field in fields(SchedulerConfig)}
        scheduling_options = {name: options.pop(name) for name in terms & options.keys()}
        check_vllm_options(options, known=[*list(inspect.signature(LLM).parameters)[:-1], *terms])
        scheduling = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            **scheduling_options,
        )
        check_seed(seed)
        plugins = parse_plugin_params(plugin_params)
        plugins.check_template(scheduling.template_type)
        speculative = plugins.speculative
        if speculative_config is not None:
            if speculative is not None:
                raise ConfigError("speculative_config: given beside plugin_params that speculate: give one")
            speculative = SpeculativeConfig.from_options(speculative_config)
        self._parts = load_parts(
            model,
            vocab_file=vocab_file,
            merges_file=merges_file,
            tokenizer_overrides=tokenizer_overrides,
            hf_config=hf_config,
            src_strategy=src_strategy,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            threads=threads,
            cache_dir=cache_dir,
            max_model_len=max_model_len,
            block_size=block_size,
            num_blocks=num_blocks,
            kv_cache_memory=kv_cache_memory,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            progress=progress,
        )
        self.engine = Engine(
            self._parts.runner,
            self._parts.tokenizer,
            self._eos_token_ids(),
            scheduling,
            speculator=None
            if speculative is None
            else self._speculator(
                speculative,
                max_num_batched_tokens,
                threads=threads,
                cache_dir=cache_dir,
                max_num_seqs=max_num_seqs,
                progress=progress,
            ),
            seed=seed,
            threads=self._parts.runner.threads,
        )
        self._outbox = Outbox(self.engine)

    def _speculator(
        self, config: SpeculativeConfig, max_num_batched_tokens: int, **options: Any
    ) -> Speculator:
        """`options`: how a draft model is loaded."""
        if config.model is None:
            lookup = PromptLookup(config.prompt_lookup_min, config.prompt_lookup_max)
            return Speculator(lookup, config.num_speculative_tokens)
        options["dtype"] = config.dtype or self.dtype
        parts = load_parts(
            config.model,
            vocab_file=None,
            merges_file=None,
            tokenizer_overrides=None,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=self._parts.runner.block_size,
            **options,
        )
        check_same_vocabulary(config.model, parts, self._parts)
        model = DraftModel(parts.runner, self._parts.runner.vocab_size, max_num_batched_tokens)
        return Speculator(model, config.num_speculative_tokens)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._parts.tokenizer

    def get_tokenizer(self) -> Tokenizer:
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """See `default_sampling_params`; the name is vLLM's."""
        return self.default_sampling_params()

    @property
    def model_config(self) -> ModelConfig:
        return self._parts.model_config

    @property
    def max_model_len(self) -> int:
        return self._parts.runner.max_model_len

    @property
    def weight_bytes(self) -> int:
        """Size of the packed weights."""
        return self._parts.runner.weight_bytes

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens that the KV cache holds, of all sequences together."""
        return self._parts.runner.num_blocks * self._parts.runner.block_size

    @property
    def kv_cache_bytes(self) -> int:
        """Memory that a full KV cache takes; what is not used yet takes none."""
        return self._parts.runner.cache_bytes

    @property
    def threads(self) -> int:
        return self._parts.runner.threads

    @property
    def dtype(self) -> str:
        """Of the weights as they are computed with: what `auto` stands for, too."""
        return self._parts.runner.dtype

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._parts.runner.isa

    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for; it is what requests without parameters get.

        Raises:
            CheckpointError: the file holds a value that is out of range.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        config = self._parts.generation_config
        given = {name: config[name] for name in names if config.get(name) is not None}
        if config.get("max_new_tokens") is not None:
            given["max_tokens"] = config["max_new_tokens"]
        if config.get("do_sample") is False:
            given["temperature"] = 0.0
        try:
            return SamplingParams(**given)
        except RequestError as error:
            raise CheckpointError(f"{self._parts.generation_source}: {error}") from None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Completes the prompts, all at once; outputs are in the prompts' order.

        Args:
            use_tqdm: show a bar on stderr, where that is a terminal.
            priority: of all, or one a prompt; lower comes first.
        """
        ids = self._add(prompts, sampling_params, stream=False, priority=priority)
        outputs: Iterable[RequestOutput] = self._outbox.open(ids)
        if use_tqdm:
            outputs = _with_progress_bar(outputs, len(ids))
        finished = {output.request_id: output for output in outputs}
        return [finished[request_id] for request_id in ids]

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The most probable texts after each prompt, as transformers' beam search finds them.

        Raises:
            RequestError: a prompt is out of range, or too long for `params.max_tokens` more.
        """
        from llm_boost.engine.beam_search import NextTokenParams, beam_search

        vocab_size = self._parts.runner.vocab_size
        prompt_list: list[Any] = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
        beginnings = []
        for index, prompt in enumerate(prompt_list):
            ids = tokenize(prompt, self.tokenizer, vocab_size)[1].tolist()
            self._check_beam_search(f"prompts[{index}]", prompt, len(ids), params)
            beginnings.append(ids)

        def next_tokens(texts: Sequence[list[int]], count: int) -> list[dict[int, Logprob]]:
            asked = NextTokenParams(
                temperature=0,
                max_tokens=1,
                ignore_eos=True,
                detokenize=False,
                logprobs=min(count, vocab_size),
            )
            outputs = self.generate([{"prompt_token_ids": text} for text in texts], asked, use_tqdm=False)
            return [(output.outputs[0].logprobs or [{}])[0] for output in outputs]

        def decode(ids: list[int]) -> str:
            return self.tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)

        return beam_search(beginnings, params, frozenset(self._eos_token_ids()), next_tokens, decode)

    def _check_beam_search(self, where: str, prompt: Any, num_tokens: int, params: BeamSearchParams) -> None:
        runner = self._parts.runner
        limit = min(runner.max_model_len, runner.num_blocks * runner.block_size)
        if num_tokens + params.max_tokens > limit:
            raise RequestError(
                f"{where}: got {num_tokens} tokens and max_tokens {params.max_tokens}, "
                f"allowed {limit} together"
            )
        if isinstance(prompt, dict) and prompt.get("cache_salt") is not None:
            raise RequestError(f"{where}: cache_salt has no effect on beam search; leave it out")

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> OutputStream:
        """Like `generate`, but gives each request's output as it grows; `outputs[i].delta` is the new text.

        Closing the iterator early aborts what still runs.
        """
        return self._outbox.open(self._add(prompts, sampling_params, stream=True))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, or a list of them, through the model's chat template.

        With `continue_final_message` (and `add_generation_prompt=False`) the last message is the beginning of
        the answer, and goes on.
        """
        prompts = self.chat_prompts(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **(chat_template_kwargs or {}),
        )
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, priority=priority)

    def chat_prompts(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        continue_final_message: bool = False,
        **template_options: Any,
    ) -> list[Prompt]:
        """The prompts of one conversation or several, for `generate` or `stream`."""
        if continue_final_message and template_options.get("add_generation_prompt", True):
            raise RequestError(
                "continue_final_message: allowed with add_generation_prompt=False alone, "
                "for an answer either begins or goes on"
            )
        if not isinstance(messages, (list, tuple)) or not messages:
            raise RequestError("messages: got none, allowed a list of messages, or a list of such lists")
        conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = self.tokenizer.apply_chat_template(conversation, **template_options)
            if continue_final_message:
                text = _up_to_the_end_of(conversation[-1], text)
            ids = self.tokenizer.encode(text, add_special_tokens=False)  # the template writes its own
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return prompts

    def _add(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        stream: bool,
        priority: int | Sequence[int] = 0,
    ) -> list[str]:
        """Adds all requests or, when one is at fault, none."""
        prompt_list: list[Prompt] = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]  # type: ignore[list-item]
        ids: list[str] = []
        priorities = list(priority) if isinstance(priority, (list, tuple)) else [priority] * len(prompt_list)
        if len(priorities) != len(prompt_list):
            raise RequestError(
                f"priority: got {len(priorities)}, allowed one, or one a prompt ({len(prompt_list)})"
            )
        each = zip(prompt_list, self._params_for(prompt_list, params), priorities, strict=True)
        try:
            for prompt, own, urgency in each:
                ids.append(self.engine.add(prompt, own, stream=stream, priority=urgency))
        except BaseException as error:
            for request_id in ids:
                self.engine.abort(request_id)
            if isinstance(error, RequestError) and len(prompt_list) > 1:
                raise RequestError(f"prompts[{len(ids)}]: {error}") from None
            raise
        return ids

    def _params_for(
        self, prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.default_sampling_params()] * len(prompts)
        if not isinstance(params, (list, tuple)) or not all(isinstance(p, SamplingParams) for p in params):
            raise RequestError(
                f"sampling_params: got {type(params).__name__}, allowed SamplingParams or a list of them"
            )
        if len(params) != len(prompts):
            raise RequestError(
                f"sampling_params: got {len(params)}, allowed one, or one a prompt ({len(prompts)})"
            )
        return list(params)

    def _eos_token_ids(self) -> set[int]:
        """The tokenizer's and the generation config's ids that end a text, those of the vocabulary."""
        named = self._parts.generation_config.get("eos_token_id")
        ids = {*self.tokenizer.eos_token_ids, *(named if isinstance(named, (list, tuple)) else [named])}
        return {i for i in ids if isinstance(i, int) and 0 <= i < self._parts.runner.vocab_size}


def check_same_vocabulary(model: str, draft: Parts, target: Parts) -> None:
    """ConfigError unless a draft model's tokens are the target's."""
    theirs, ours = draft.runner.vocab_size, target.runner.vocab_size
    if theirs < ours:
        raise ConfigError(
            f"speculative_config.model: {model} has {theirs} tokens, allowed at least the model's {ours}: "
            "both need the same vocabulary"
        )
    for text in ("The quick brown fox, 1234.", "def f(x):\n    return x\n", "你好，世界"):
        if draft.tokenizer.encode(text) != target.tokenizer.encode(text):
            raise ConfigError(
                f"speculative_config.model: {model} cuts {text!r} into other tokens than the model: "
                "both need the same tokenizer"
            )


def _with_progress_bar(outputs: Iterable[RequestOutput], total: int) -> Iterator[RequestOutput]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)  # stdout belongs to the program that asks
    bar = track(
        outputs,
        description="prompts",
        total=total,
        transient=True,
        console=console,
        disable=not console.is_terminal,
    )
    return iter(bar)


def _up_to_the_end_of(message: Message, text: str) -> str:
    """A rendered chat without what the template writes after its last message."""
    content = message.get("content")
    said = content.rstrip() if isinstance(content, str) else ""
    at = text.rfind(said) if said else -1
    if at < 0:
        raise RequestError(
            "continue_final_message: the chat template does not show the last message's content as it is"
        )
    return text[: at + len(said)]
