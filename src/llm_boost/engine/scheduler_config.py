"""How requests share the engine: limits of a step, and MindIE's scheduling terms under their own names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from llm_boost.errors import ConfigError

MAX_BATCHED_TOKENS = 1 << 20
TemplateType = Literal["Mix", "Standard"]

FIRST_COME = 0  # by arrival alone
BY_PRIORITY = 2  # by arrival and the request's priority; without priorities the same
_POLICIES = (FIRST_COME, BY_PRIORITY)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """LLM and AsyncLLM take these as keyword arguments. The names in brackets are config.json's of MindIE.

    Args:
        max_num_seqs: sequences that run at the same time. [maxBatchSize]
        max_num_batched_tokens: tokens that one step computes: larger is faster for prompts, smaller is
            smoother for the requests that run beside them.
        enable_prefix_caching: tokens of a prompt that the cache still holds are not computed again.
        template_type: "Mix" decodes and computes chunks of prompts in one step; "Standard" computes a batch
            of whole prompts, or decodes. [templateType]
        max_prefill_batch_size: prompts in such a batch, in Mix those under way at a time; 0: max_num_seqs.
            [maxPrefillBatchSize]
        max_prefill_tokens: tokens of a batch of prompts (one prompt may have more), in Mix those of prompts
            in a step; None: as many as there are. [maxPrefillTokens]
        max_iter_times: the most tokens that a request may generate, whatever it asks; None: what fits.
            [maxIterTimes]
        max_first_token_wait_time: milliseconds that a request waits for its first token before it may take
            the memory of the newest running one, if `max_preempt_count` allows. [maxFirstTokenWaitTime]
        max_preempt_count: sequences that are set aside for waiting ones at a time; 0: none. Those whose
            blocks the older ones need to go on are not counted. [maxPreemptCount]
        support_select_batch: Standard weighs the two costs below before it interrupts decoding for a batch
            of prompts; else a batch of prompts goes first once it is due. [supportSelectBatch]
        prefill_time_ms_per_req: what a batch of prompts costs each running sequence. [prefillTimeMsPerReq]
        decode_time_ms_per_req: what a decode costs for each place in it that is empty. [decodeTimeMsPerReq]
        max_queue_delay_microseconds: in Standard a batch of prompts is due when the oldest has waited this
            long, or the batch is full, or nothing runs. [maxQueueDelayMicroseconds]
        prefill_policy_type: who comes first of those that wait: 0 the first to arrive, 2 by priority.
            [prefillPolicyType]
        decode_policy_type: who keeps its memory of those that run, by the same rules. [decodePolicyType]

    Raises:
        ConfigError: a value out of its range, or at odds with another.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    enable_prefix_caching: bool = True
    template_type: TemplateType = "Mix"
    max_prefill_batch_size: int = 0
    max_prefill_tokens: int | None = None
    max_iter_times: int | None = None
    max_first_token_wait_time: int = 2500
    max_preempt_count: int = 0
    support_select_batch: bool = False
    prefill_time_ms_per_req: int = 150
    decode_time_ms_per_req: int = 50
    max_queue_delay_microseconds: int = 5000
    prefill_policy_type: int = BY_PRIORITY
    decode_policy_type: int = BY_PRIORITY

    def __post_init__(self) -> None:
        self._integer("max_num_batched_tokens", 1, MAX_BATCHED_TOKENS)
        self._integer("max_num_seqs", 1, self.max_num_batched_tokens)  # each needs a token a step
        self._integer("max_prefill_batch_size", 0, self.max_num_seqs)
        self._integer("max_prefill_tokens", 1, 4_194_304, optional=True)
        self._integer("max_iter_times", 1, 2**31 - 1, optional=True)
        self._integer("max_first_token_wait_time", 0, 3_600_000)
        self._integer("max_preempt_count", 0, self.max_num_seqs)
        self._integer("prefill_time_ms_per_req", 0, 1000)
        self._integer("decode_time_ms_per_req", 0, 1000)
        self._integer("max_queue_delay_microseconds", 500, 1_000_000)
        self._one_of("enable_prefix_caching", (True, False))
        self._one_of("support_select_batch", (True, False))
        self._one_of("template_type", get_args(TemplateType))
        self._one_of("prefill_policy_type", _POLICIES)
        self._one_of("decode_policy_type", _POLICIES)

    @property
    def prefill_batch_size(self) -> int:
        """Prompts in a batch, or under way at a time."""
        return self.max_prefill_batch_size or self.max_num_seqs

    def _integer(self, name: str, low: int, high: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{name}: got {value!r}, allowed an integer from {low} to {high}")

    def _one_of(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            raise ConfigError(f"{name}: got {value!r}, allowed {' or '.join(map(repr, allowed))}")
