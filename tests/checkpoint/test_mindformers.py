"""Checkpoints with MindFormers' names: the table both ways, concatenated rows, the engine on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_samples import one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from golden import GOLDEN_MODELS, load_golden, model_dir
from llm_boost import LLM, SamplingParams
from llm_boost.checkpoint import open_checkpoint
from llm_boost.checkpoint.mindformers_names import (
    LAYOUTS,
    concatenated_name,
    concatenated_parts,
    hf_name,
    mindformers_name,
    row_order,
)
from llm_boost.checkpoint.mindspore_ckpt import write_ckpt
from llm_boost.checkpoint.safetensors_reader import DTYPES
from llm_boost.checkpoint.safetensors_writer import TensorSpec
from llm_boost.errors import CheckpointError

CODES = {dtype: code for code, dtype in DTYPES.items()}


def mindformers_tensors(name: str) -> dict[str, np.ndarray]:
    source = open_checkpoint(model_dir(name))
    model_type = source.config["model_type"]
    return {str(mindformers_name(each, model_type)): source.read(each) for each in source.tensors}


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(name, CODES[array.dtype], array.shape) for name, array in tensors.items()]
    write_ckpt(path, specs, iter(tensors.items()))
    return path


def companions(name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in model_dir(name).iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_every_name_crosses_and_comes_back(name):
    source = open_checkpoint(model_dir(name))
    crossed = [mindformers_name(each, source.config["model_type"]) for each in source.tensors]
    assert None not in crossed
    assert not set(crossed) & set(source.tensors) - {"lm_head.weight"}
    assert [hf_name(str(each)) for each in crossed] == list(source.tensors)


def test_names_of_the_original():
    assert (
        mindformers_name("model.layers.12.self_attn.q_proj.bias", "qwen2")
        == "model.layers.12.attention.wq.bias"
    )
    assert (
        mindformers_name("model.layers.0.mlp.up_proj.weight", "llama")
        == "model.layers.0.feed_forward.w3.weight"
    )
    assert hf_name("model.tok_embeddings.embedding_weight") == "model.embed_tokens.weight"
    assert hf_name("decoder.layers.3.mlp.linear_fc2.weight") == "model.layers.3.mlp.down_proj.weight"
    assert mindformers_name("model.layers.0.self_attn.rotary_emb.inv_freq", "llama") is None
    assert hf_name("adam_m.model.layers.0.attention.wq.weight") is None
    assert concatenated_name("model.layers.7.self_attn.v_proj.bias") == "model.layers.7.attention.w_qkv.bias"
    assert concatenated_parts("model.layers.7.feed_forward.w_gate_hidden.weight") == (
        "model.layers.7.mlp.gate_proj.weight",
        "model.layers.7.mlp.up_proj.weight",
    )


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_the_rows_of_a_group_stand_together(kv_heads, repeat, head_dim):
    """Against the reshapes of MindFormers' recipe."""
    heads = kv_heads * repeat
    q = np.arange(heads * head_dim)
    k, v = (1000 * part + np.arange(kv_heads * head_dim) for part in (1, 2))
    grouped = [part.reshape(kv_heads, -1) for part in (q, k, v)]
    order = row_order("w_qkv.weight", "grouped", (len(q), len(k), len(v)), head_dim)
    np.testing.assert_array_equal(1000 * order.part + order.row, np.concatenate(grouped, axis=1).reshape(-1))
    plain = row_order("w_qkv.bias", "grouped_plain_bias", (len(q), len(k), len(v)), head_dim)
    np.testing.assert_array_equal(1000 * plain.part + plain.row, np.concatenate([q, k, v]))
    gate_up = row_order("w_gate_hidden.weight", "grouped", (len(k), len(k)), head_dim)
    np.testing.assert_array_equal(
        1000 * gate_up.part + gate_up.row, np.stack([k - 1000, v - 1000], axis=1).reshape(-1)
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("form", ["file", "folder", "rank_0", "safetensors"])
def test_the_engine_reads_it_as_it_reads_the_original(tmp_path, name, form):
    tensors = mindformers_tensors(name)
    companions(name, tmp_path / "model")
    path = tmp_path / "model"
    if form == "safetensors":
        save_file(tensors, path / "model.safetensors", {"format": "ms"})
    else:
        file = write(path / ("weights/rank_0/m.ckpt" if form == "rank_0" else "m.ckpt"), tensors)
        path = {"file": file, "folder": path, "rank_0": path / "weights"}[form]
    checkpoint = open_checkpoint(path)
    source = open_checkpoint(model_dir(name))
    assert checkpoint.format == "mindspore"
    assert checkpoint.folder == tmp_path / "model"
    assert dict(checkpoint.tensors) == dict(source.tensors)
    golden = load_golden(name, 17)
    llm = LLM(model=path, dtype="float32", threads=1, cache_dir=tmp_path / "cache", max_model_len=512)
    output = llm.generate(
        {"prompt_token_ids": golden.prompt}, SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    )
    assert list(output[0].outputs[0].token_ids) == golden.greedy


@pytest.mark.parametrize("layout", LAYOUTS)
def test_concatenated_weights_are_read_in_the_order_that_is_named(tmp_path, layout):
    source = open_checkpoint(model_dir("qwen2"))
    tensors, joined = mindformers_tensors("qwen2"), {}
    head_dim = source.config["hidden_size"] // source.config["num_attention_heads"]
    for each in source.tensors:
        whole = concatenated_name(each)
        if whole is None or whole in joined:
            continue
        parts = [source.read(part) for part in concatenated_parts(whole)]
        order = row_order(whole, layout, tuple(len(part) for part in parts), head_dim)
        joined[whole] = np.stack([parts[p][r] for p, r in zip(order.part, order.row, strict=True)])
        for part in concatenated_parts(whole):
            del tensors[str(mindformers_name(part, "qwen2"))]
    path = write(tmp_path / "m.ckpt", {**tensors, **joined})
    shutil.copy(model_dir("qwen2") / "config.json", tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "weight is concatenated, in an order that the file does not tell" in one_line(caught.value, path)
    checkpoint = open_checkpoint(path, qkv_layout=layout)
    assert set(checkpoint.tensors) == set(source.tensors)
    for each, info in source.tensors.items():
        assert checkpoint.tensors[each].shape == info.shape
        np.testing.assert_array_equal(checkpoint.read(each), source.read(each))
        rows = info.shape[0]
        np.testing.assert_array_equal(
            checkpoint.read_rows(each, rows // 3, rows - 1), source.read(each)[rows // 3 : rows - 1]
        )
        assert checkpoint.read_rows(each, 1, 1).shape == (0, *info.shape[1:])


def test_what_is_wrong_is_named(tmp_path):
    tensors = {"model.norm_out.weight": np.ones(4, np.float32)}

    def refused(path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        return one_line(caught.value, path)

    file = write(tmp_path / "a.ckpt", tensors)
    assert "put the model's config.json beside it, or give an llm_boost YAML" in refused(file)
    write(tmp_path / "b.ckpt", tensors)
    assert "holds 2 .ckpt files; name the one to use: ['a.ckpt', 'b.ckpt']" in refused(tmp_path)
    for rank in (0, 1):
        write(tmp_path / "split" / f"rank_{rank}" / "checkpoint.ckpt", tensors)
    assert "a split checkpoint without its strategy: give it as src_strategy_path_or_dir" in refused(
        tmp_path / "split"
    )
    (tmp_path / "empty" / "rank_0").mkdir(parents=True)
    assert "no .ckpt or .safetensors file there" in refused(tmp_path / "empty")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_size": 8}))
    joined = {"model.layers.0.attention.w_qkv.weight": np.ones((25, 8), np.float32)}
    with pytest.raises(CheckpointError, match="has 25 rows; 2 heads and twice 2 key heads of 4 make 24"):
        open_checkpoint(write(tmp_path / "c.ckpt", joined), qkv_layout="plain")
    double = {**tensors, "decoder.final_layernorm.weight": np.ones(4, np.float32)}
    assert "two parameters mean the same tensor 'model.norm.weight'" in refused(
        write(tmp_path / "d.ckpt", double)
    )
