"""Every road back and forth is exact to the bit, whatever the shapes, the heads and the type."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from convert_samples import config_of, differences, random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golden import GOLDEN_MODELS, model_dir
from llm_boost.checkpoint import open_checkpoint
from llm_boost.checkpoint.mindformers_names import LAYOUTS
from llm_boost.convert.convert import Options, convert
from llm_boost.convert.source import open_source

WAYS = ("hf", "mindspore-ckpt", "mindspore-safetensors", "gguf")


def via(source: Path, folder: Path, ways: list[str], layout: str | None = None) -> Path:
    """`source` converted from way to way; with `layout` concatenated whenever it is MindSpore's."""
    read_as = None
    for step, to in enumerate(ways):
        writes = layout if to.startswith("mindspore") else None
        opened = open_source(source, qkv_layout=read_as)
        source = convert(opened, folder / f"step{step}" / to, Options(to, qkv_layout=writes)).path
        read_as = writes
    return source


@st.composite
def models(draw):
    kv_heads = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    more = {"attention_bias": draw(st.booleans())} if kind == "llama" else {}
    return config_of(
        kind,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(2, 6)),
        layers=draw(st.integers(1, 2)),
        intermediate_size=draw(st.integers(1, 70)),
        tie_word_embeddings=draw(st.booleans()),
        **more,
    )


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(models(), st.sampled_from(["F32", "F16", "BF16"]), st.permutations(WAYS), st.integers(1, 40))
def test_there_and_back_is_exact(tmp_path_factory, config, dtype, ways, chunk):
    folder = tmp_path_factory.mktemp("roads")
    source = random_model(folder / "source", config, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_boost.convert.tensors.CHUNK_ELEMENTS", chunk * 8)  # rows come in pieces
        assert differences(source, via(source, folder, [*ways, "hf"])) == []


@pytest.mark.parametrize("name", GOLDEN_MODELS)
@pytest.mark.parametrize("way", WAYS[1:])
def test_the_config_survives(tmp_path, name, way):
    from llm_boost.models.config import ModelConfig

    back = via(model_dir(name), tmp_path, [way, "hf"])
    assert differences(model_dir(name), back) == []
    configs = [open_checkpoint(path).config for path in (model_dir(name), back)]
    one, other = (ModelConfig.from_hf(config, "") for config in configs)
    for field in ("architecture", "sliding_window", "bos_token_id", "pad_token_id", "eos_token_ids"):
        if way == "gguf":  # it calls a Mistral llama, and has the tokenizer's ids
            object.__setattr__(one, field, getattr(other, field))
    assert one.rms_norm_eps == pytest.approx(other.rms_norm_eps, rel=1e-6)
    object.__setattr__(one, "rms_norm_eps", other.rms_norm_eps)
    assert one == other
    assert configs[1]["model_type"] == (
        "llama" if (name, way) == ("mistral", "gguf") else configs[0]["model_type"]
    )


def test_gguf_to_gguf_keeps_its_metadata(tmp_path):
    from llm_boost.checkpoint.gguf_reader import GGUFFile

    there = via(model_dir("llama3"), tmp_path, ["gguf", "gguf"])
    assert differences(model_dir("llama3"), via(there, tmp_path / "back", ["hf"])) == []
    one, other = (GGUFFile(path).metadata for path in (tmp_path / "step0" / "gguf.gguf", there))
    assert set(one) == set(other)
    for key, value in one.items():
        np.testing.assert_array_equal(other[key], value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS[1:3])
def test_concatenated_and_taken_apart(tmp_path, layout, way):
    source = random_model(tmp_path / "source", config_of("qwen2", heads=6, kv_heads=2, head_dim=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_boost.convert.tensors.CHUNK_ELEMENTS", 130)
        there = via(source, tmp_path, [way], layout)
        assert differences(source, there, qkv_layout=layout) == []
        assert differences(source, via(source, tmp_path / "back", [way, "hf"], layout)) == []


def test_a_type_is_rounded_once(tmp_path):
    source = random_model(tmp_path / "source", config_of(), "F32")
    there = convert(open_source(source), tmp_path / "bf16", Options("hf", "bf16")).path
    before, after = open_checkpoint(source), open_checkpoint(there)
    for name in before.tensors:
        np.testing.assert_array_equal(after.read(name), before.read(name).astype(after.read(name).dtype))
    assert json.loads((there / "config.json").read_text())["dtype"] == "bfloat16"


def test_config_json_is_the_same_file_where_nothing_changes(tmp_path):
    there = convert(open_source(model_dir("qwen2")), tmp_path / "there", Options("hf")).path
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (there / name).read_bytes() == (model_dir("qwen2") / name).read_bytes()


def test_shards_and_their_index(tmp_path):
    there = convert(
        open_source(model_dir("llama")), tmp_path / "there", Options("hf", max_shard_size=60_000)
    ).path
    files = sorted(file.name for file in there.glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-0000{len(files)}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) == 3
    index = json.loads((there / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(
        open_checkpoint(there).read(name).nbytes for name in index["weight_map"]
    )
    assert differences(model_dir("llama"), there) == []
