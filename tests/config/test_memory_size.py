from __future__ import annotations

import pytest

from llm_boost.config.memory_size import parse_memory_size
from llm_boost.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2_000_000_000),
        ("2 gb", 2_000_000_000),
        ("1.5GiB", 3 << 29),
        ("512MiB", 512 << 20),
        ("100kb", 100_000),
        ("1TB", 10**12),
        ("123", 123),
        (" 7 B ", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_memory_size("--kv_cache_memory", text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "2G", "-1GB", "1e9", "0", "0.0GB", "2GB2", "二GB", "9" * 40, "nan", "²"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--kv_cache_memory: got .*, allowed bytes, or a number with KB"):
        parse_memory_size("--kv_cache_memory", text)
