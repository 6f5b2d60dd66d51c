"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from llm_boost.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
ALLOWED = "bytes, or a number with KB, MB, GB, TB (thousands) or KiB, MiB, GiB, TiB, as 2GB"
_BY_NAME = {name.lower(): size for name, size in _UNITS.items()}


def parse_memory_size(origin: str, text: object) -> int:
    """Bytes: 2GB is 2,000,000,000. For anything else a ConfigError that starts with `origin`."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", str(text), re.ASCII)
    unit = _BY_NAME.get(match[2].lower()) if match else None
    size = round(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ConfigError(f"{origin}: got {text!r}, allowed {ALLOWED}")
    return size
