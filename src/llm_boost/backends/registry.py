"""Backends by the name that `llm_backend` of a configuration gives them."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from llm_boost.backends.backend import Backend
from llm_boost.errors import ConfigError
from llm_boost.suggest import did_you_mean

ENTRY_POINTS = "llm_boost.backends"  # the group under which other packages offer theirs
_OWN = {"BuildIn": "llm_boost.backends.builtin:BuiltinBackend"}


def backend_class(name: str) -> type[Backend]:
    """The backend's class, imported now; ConfigError when there is none or it cannot be used here."""
    from importlib.metadata import entry_points  # slow to load

    others = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}
    known = {**others, **_OWN}
    if name not in known:
        raise ConfigError(
            f"llm_backend: got {name!r}, allowed: {', '.join(sorted(known))}{did_you_mean(name, known)}"
        )
    module, _, attribute = known[name].partition(":")
    found = cast("type[Backend]", getattr(import_module(module), attribute))
    reason = found.probe()
    if reason is not None:
        raise ConfigError(f"llm_backend: {name} cannot be used here: {reason}")
    return found
