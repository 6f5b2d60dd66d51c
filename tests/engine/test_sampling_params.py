from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.errors import RequestError

NAN, INF = float("nan"), float("inf")

REFUSED = [
    *(("n", v) for v in (0, -1, 129, 1.0, True, None, "1")),
    *(("temperature", v) for v in (-0.1, NAN, INF, -INF, 101, "1", None, True, 1j)),
    *(("top_p", v) for v in (0, -0.5, 1.01, NAN, "0.5", None)),
    *(("top_k", v) for v in (-2, 1.5, NAN, 2**31, None, True)),
    *(("min_p", v) for v in (-0.1, 1.1, NAN)),
    *(("repetition_penalty", v) for v in (0, -1, NAN, INF, 1e9)),
    *(("presence_penalty", v) for v in (-2.1, 2.1, NAN)),
    *(("frequency_penalty", v) for v in (-2.1, 2.1, NAN)),
    *(("seed", v) for v in (1.5, "7", True, 2**64, -(2**63) - 1)),
    *(("stop", v) for v in ("", ["a", ""], [1], 5, ["x"] * 65, "x" * 1001, {"a": 1})),
    *(("stop_token_ids", v) for v in ([-1], [1.5], ["a"], 5, "12", [True], [2**31], list(range(1025)))),
    *(("logit_bias", v) for v in ([1], {-1: 0}, {1.5: 0}, {"1": 0}, {1: NAN}, {1: 101}, {1: -101}, {1: "x"})),
    ("logit_bias", dict.fromkeys(range(1025), 0.0)),
    *(("max_tokens", v) for v in (0, -1, 1.5, NAN, "16", True)),
    *(("min_tokens", v) for v in (-1, 1.5, None)),
    *(("logprobs", v) for v in (-1, 21, 1.5, True)),
    *(("ignore_eos", v) for v in (1, None, "yes")),
    *(("include_stop_str_in_output", v) for v in (0, None)),
    *(("skip_special_tokens", v) for v in (1, "no")),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda v: repr(v)[:30])
def test_a_value_out_of_range_is_refused_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name}.*: got .*, allowed ") as raised:
        SamplingParams(**{name: value})
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 250


def test_min_tokens_is_at_most_max_tokens() -> None:
    SamplingParams(min_tokens=8, max_tokens=8)
    SamplingParams(min_tokens=1000, max_tokens=None)
    with pytest.raises(RequestError, match=r"min_tokens: got 9, allowed 0\.\.max_tokens \(8\)"):
        SamplingParams(min_tokens=9, max_tokens=8)


def test_values_are_brought_to_one_form() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams()
    assert SamplingParams(temperature=1e-6).temperature == 0
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    bias = {5: 1}
    params = SamplingParams(logit_bias=bias, temperature=np.float32(0.5), top_k=np.int64(3))
    bias[6] = 2
    assert params.logit_bias == {5: 1.0}
    assert type(params.temperature) is float
    assert type(params.top_k) is int


anything = (
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.floats()
    | st.sampled_from(["", "a", [1], [-1], ["b"]])
)


@given(
    st.lists(
        st.tuples(st.sampled_from([field.name for field in fields(SamplingParams)]), anything), max_size=4
    )
)
@settings(deadline=None)
def test_whatever_is_asked_is_kept_or_refused(asked: list[tuple[str, Any]]) -> None:
    values = dict(asked)
    try:
        params = SamplingParams(**values)
    except RequestError:
        return
    assert SamplingParams(**{name: getattr(params, name) for name in values}) == params
