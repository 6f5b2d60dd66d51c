"""The scheduler's settings: every range is held, and the message says which."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from llm_boost.engine.scheduler_config import SchedulerConfig
from llm_boost.errors import ConfigError

REFUSED = [
    ({"max_num_batched_tokens": 0}, "max_num_batched_tokens: got 0, allowed an integer from 1 to 1048576"),
    ({"max_num_batched_tokens": 1.5}, "max_num_batched_tokens: got 1.5"),
    ({"max_num_seqs": 0}, "max_num_seqs: got 0, allowed an integer from 1 to 512"),
    ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_seqs: got 9, allowed an integer from 1 to 8"),
    ({"max_prefill_batch_size": 65}, "max_prefill_batch_size: got 65, allowed an integer from 0 to 64"),
    ({"max_prefill_tokens": 0}, "max_prefill_tokens: got 0, allowed an integer from 1 to 4194304"),
    ({"max_iter_times": 0}, "max_iter_times: got 0"),
    ({"max_first_token_wait_time": 3_600_001}, "allowed an integer from 0 to 3600000"),
    ({"max_preempt_count": 65}, "max_preempt_count: got 65, allowed an integer from 0 to 64"),
    (
        {"prefill_time_ms_per_req": 1001},
        "prefill_time_ms_per_req: got 1001, allowed an integer from 0 to 1000",
    ),
    ({"decode_time_ms_per_req": -1}, "decode_time_ms_per_req: got -1"),
    ({"max_queue_delay_microseconds": 499}, "got 499, allowed an integer from 500 to 1000000"),
    ({"enable_prefix_caching": 1}, "enable_prefix_caching: got 1, allowed True or False"),
    ({"support_select_batch": "yes"}, "support_select_batch: got 'yes', allowed True or False"),
    ({"template_type": "mix"}, "template_type: got 'mix', allowed 'Mix' or 'Standard'"),
    ({"prefill_policy_type": 3}, "prefill_policy_type: got 3, allowed 0 or 2"),
    ({"decode_policy_type": True}, "decode_policy_type: got True, allowed 0 or 2"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_a_value_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**options)


def test_an_empty_prefill_batch_size_means_all() -> None:
    assert SchedulerConfig(max_num_seqs=7).prefill_batch_size == 7
    assert SchedulerConfig(max_num_seqs=7, max_prefill_batch_size=3).prefill_batch_size == 3


def test_settings_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        SchedulerConfig().max_num_seqs = 3  # type: ignore[misc]
