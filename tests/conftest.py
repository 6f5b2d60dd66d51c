"""Fixtures that several rooms share, and the conditions of the marked tests."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from golden import LoadRunner, model_dir
from llm_boost.engine.batch import ModelRunner


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_reference = not all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    no_mindspore = importlib.util.find_spec("mindspore") is None
    no_llama_cpp = importlib.util.find_spec("llama_cpp") is None
    no_clients = not all(importlib.util.find_spec(name) for name in ("litellm", "schemathesis"))
    no_models = "LLM_BOOST_MODELS" not in os.environ
    no_quality = "LLM_BOOST_QUALITY_MODEL" not in os.environ
    for item in items:
        if no_quality and item.get_closest_marker("quality"):
            item.add_marker(pytest.mark.skip(reason="`make quality` fetches its model and runs it"))
        if no_reference and item.get_closest_marker("reference"):
            item.add_marker(pytest.mark.skip(reason="needs the reference extra: torch and transformers"))
        if no_mindspore and item.get_closest_marker("mindspore"):
            item.add_marker(pytest.mark.skip(reason="needs the mindspore extra"))
        if no_llama_cpp and item.get_closest_marker("llama_cpp"):
            item.add_marker(pytest.mark.skip(reason="needs llama-cpp-python"))
        if no_clients and item.get_closest_marker("clients"):
            item.add_marker(pytest.mark.skip(reason="needs the clients extra: litellm and schemathesis"))
        if no_models and item.get_closest_marker("models"):
            item.add_marker(pytest.mark.skip(reason="needs LLM_BOOST_MODELS, the folder of real checkpoints"))


@pytest.fixture(scope="session")
def load_runner(tmp_path_factory: pytest.TempPathFactory) -> LoadRunner:
    """load_runner(name, dtype): a golden checkpoint on two threads, loaded once a session."""
    runners: dict[tuple[str, str], ModelRunner] = {}
    cache_dir: Path = tmp_path_factory.mktemp("packed")

    def load(name: str, dtype: str) -> ModelRunner:
        from llm_boost.checkpoint import open_checkpoint
        from llm_boost.engine.native_runner import NativeRunner
        from llm_boost.models.config import ModelConfig

        if (name, dtype) not in runners:
            checkpoint = open_checkpoint(model_dir(name))
            config = ModelConfig.from_hf(checkpoint.config, source=str(model_dir(name)))
            runners[name, dtype] = NativeRunner.load(
                checkpoint, config, dtype=dtype, threads=2, cache_dir=cache_dir, max_model_len=512
            )
        return runners[name, dtype]

    return load
