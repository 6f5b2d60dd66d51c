"""Whatever a YAML file holds, it is read or refused with one line; it never ends in another exception."""

from __future__ import annotations

import tempfile
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_boost.config.llm_boost_yaml import read_llm_boost_yaml
from llm_boost.config.run_config import resolve
from llm_boost.config.shapes import contradictions, to_hf_config
from llm_boost.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.glob("*.yaml"))]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.binary(max_size=4),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


def key_paths(tree, prefix=()):
    for key, value in tree.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from key_paths(value, (*prefix, key))


def replaced(tree, path, value):
    if not path:
        return value
    return {**tree, path[0]: replaced(tree[path[0]], path[1:], value)}


@st.composite
def changed_files(draw):
    tree = draw(st.sampled_from(SHIPPED))
    return replaced(tree, draw(st.sampled_from(sorted(key_paths(tree)))), draw(values))


def check(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzzed.yaml"
        path.write_bytes(content)
        refusal = None
        try:
            read = read_llm_boost_yaml(path)
            resolve({"model": "m"}, read, {})
        except ConfigError as error:
            refusal = str(error)
        if refusal is not None:
            assert "fuzzed.yaml" in refusal
            assert "\n" not in refusal
            return
        to_hf_config(read)
        contradictions(read, {"architectures": ["LlamaForCausalLM"], "hidden_size": 1, "rope_theta": 1})


fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@fuzz
@given(changed_files())
def test_a_shipped_file_with_one_value_changed(tree):
    check(yaml.safe_dump(tree, allow_unicode=True).encode())


@fuzz
@given(values)
def test_any_yaml(value):
    check(yaml.safe_dump(value).encode())


@fuzz
@given(st.binary(max_size=60) | st.text("a:-[]{}&*!<>|?%@`'\"# \n\t", max_size=40).map(str.encode))
def test_any_bytes(content):
    check(content)
