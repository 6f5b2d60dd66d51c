from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine_fakes import FakeRunner, fake_parts

from llm_boost.engine import llm as llm_module
from llm_boost.engine.llm import LLM


@pytest.fixture
def make_llm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    """LLMs on a fake runner."""

    def make(
        runner: FakeRunner | None = None, generation_config: dict[str, Any] | None = None, **kwargs: Any
    ) -> LLM:
        parts = fake_parts(runner, **(generation_config or {}))
        monkeypatch.setattr(llm_module, "load_parts", lambda model, **options: parts)
        return LLM("model", **kwargs)

    return make
