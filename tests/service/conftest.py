"""Real services on loopback: a golden model behind every plane."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from live_service import Live, Serve, golden_loader

from golden import model_dir
from llm_boost.config.service_config import service_config


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


@pytest.fixture
def serve(packed: Path) -> Iterator[Serve]:
    """serve(model="qwen2", load=..., before_step=..., **flags): a service of the test's own."""
    started: list[Live] = []

    def start(model: str = "qwen2", load: Any = None, changes: Any = None, **flags: Any) -> Live:
        engine = {k: flags.pop(k) for k in ("max_num_seqs", "num_blocks", "before_step") if k in flags}
        config = service_config({"model": str(model_dir(model)), "port": 0, **flags}, {})
        live = Live(replace(config, **(changes or {})), load or golden_loader(model, packed, **engine))
        started.append(live)
        return live

    yield start
    for live in started:
        live.stop()


@pytest.fixture(scope="session")
def live(packed: Path) -> Iterator[Live]:
    """One service for all tests that only ask it things."""
    config = service_config({"model": str(model_dir("qwen2")), "port": 0}, {})
    running = Live(config, golden_loader("qwen2", packed))
    yield running
    assert running.idle(), "a test has left something behind"
    assert running.stop() == 0
