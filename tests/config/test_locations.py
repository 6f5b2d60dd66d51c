"""A model by its path or its pulled name."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_boost.config.locations import cache_folder, find_model, is_model_name, pulled_models
from llm_boost.errors import CheckpointError


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "models/tiny").mkdir(parents=True)
    (tmp_path / "models/tiny/tiny.gguf").touch()
    (tmp_path / "models/owner/name").mkdir(parents=True)
    (tmp_path / "models/owner/name/config.json").touch()
    (tmp_path / "models/wheels").mkdir()
    return tmp_path


def test_cache_folder_precedence():
    assert cache_folder("/flag", {"LLM_BOOST_CACHE": "/env"}) == Path("/flag")
    assert cache_folder(None, {"LLM_BOOST_CACHE": "/env"}) == Path("/env")
    assert cache_folder(None, {}) == Path.home() / ".cache/llm-boost"


def test_pulled_models(cache):
    models = cache / "models"
    assert pulled_models(cache) == {"tiny": models / "tiny/tiny.gguf", "owner/name": models / "owner/name"}
    assert find_model("tiny", cache) == models / "tiny/tiny.gguf"
    assert find_model("owner/name", cache) == models / "owner/name"


def test_a_path_comes_before_a_name(cache, monkeypatch):
    monkeypatch.chdir(cache)
    (cache / "tiny").mkdir()
    (cache / "tiny/config.json").touch()
    assert find_model("tiny", cache) == Path("tiny")


def test_a_file_is_given_on_as_it_is(cache):
    path = cache / "models/tiny/tiny.gguf"
    assert find_model(str(path), cache) == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "model 'tinny': no such directory or file, nor a pulled model; did you mean 'tiny'?"),
        ("absent", r"\(pulled: owner/name, tiny; `llm-boost pull` fetches one\)"),
        ("/nowhere/model", "/nowhere/model: no such model directory or file"),
        ("../tiny", "no such model directory or file"),
    ],
)
def test_what_is_not_there(cache, name, message):
    with pytest.raises(CheckpointError, match=message):
        find_model(name, cache)


def test_an_empty_directory(tmp_path):
    with pytest.raises(CheckpointError, match="the model directory is empty"):
        find_model(str(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["..", "a/../b", "a/b/c", "/etc", "a//b", "-x", "a\n", ""])
def test_names_that_are_none(name):
    assert not is_model_name(name)
