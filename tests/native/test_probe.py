"""The probes measure something possible: a loop that the compiler threw away would be too fast."""

from __future__ import annotations

import pytest

from llm_boost import _native

# Two instructions a cycle at 6 GHz, more than any processor of today does: operations/s of one thread.
FASTEST = {"int8": 2 * 128 * 6e9, "bf16": 2 * 64 * 6e9, "fp32": 2 * 32 * 6e9}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["int8", "bf16", "fp32"])
def test_dot_rate_is_possible(kind: str, threads: int) -> None:
    rate = _native.probe_dot_rate(kind, threads)
    if rate is None:
        assert kind == "bf16"
    else:
        assert 1e7 < rate < threads * FASTEST[kind]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bandwidth_is_possible(threads: int) -> None:
    assert 1e7 < _native.probe_bandwidth(threads, 16) < threads * 1e12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _native.probe_dot_rate("fp16", 1), "kind is 'fp16'; allowed: int8, bf16, fp32"),
        (lambda: _native.probe_dot_rate("int8", 0), "threads is 0; allowed: 1 to 1024"),
        (lambda: _native.probe_bandwidth(1025, 1), "threads is 1025; allowed: 1 to 1024"),
        (lambda: _native.probe_bandwidth(1, 0), "megabytes is 0; allowed: 1 to 1048576"),
    ],
)
def test_wrong_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()
