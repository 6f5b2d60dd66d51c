"""Strategies: the files both ways, and how a decoder's heads and sizes lie on the ranks."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from checkpoint_samples import assert_refused_or_read, one_line
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from parallel_samples import cut, layouts

from llm_boost.checkpoint.parallel.layout import Layout
from llm_boost.checkpoint.parallel.strategy import Strategy
from llm_boost.checkpoint.parallel.strategy_files import (
    read_strategy,
    write_merged_strategy,
    write_rank_strategies,
    write_strategy,
)
from llm_boost.checkpoint.parallel.tensor_parallel import Heads, Mesh, decoder_strategy
from llm_boost.errors import CheckpointError
from llm_boost.protobuf import bytes_field, integer_field


def decoder(layers=2, heads=8, kv_heads=2, head_dim=4, inner=96, vocab=64, bias=True):
    """The shapes of a Qwen2, by MindFormers' names."""
    hidden = heads * head_dim
    shapes = {"model.tok_embeddings.embedding_weight": (vocab, hidden)}
    for layer in (f"model.layers.{i}." for i in range(layers)):
        for name, rows in (("wq", hidden), ("wk", kv_heads * head_dim), ("wv", kv_heads * head_dim)):
            shapes[f"{layer}attention.{name}.weight"] = (rows, hidden)
            if bias:
                shapes[f"{layer}attention.{name}.bias"] = (rows,)
        shapes[f"{layer}attention.wo.weight"] = (hidden, hidden)
        shapes[f"{layer}feed_forward.w1.weight"] = (inner, hidden)
        shapes[f"{layer}feed_forward.w3.weight"] = (inner, hidden)
        shapes[f"{layer}feed_forward.w2.weight"] = (hidden, inner)
        shapes[f"{layer}attention_norm.weight"] = (hidden,)
        shapes[f"{layer}ffn_norm.weight"] = (hidden,)
    return {**shapes, "model.norm_out.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


@st.composite
def strategies(draw):
    ranks = draw(st.sampled_from([1, 2, 6, 8]))
    stages = []
    for _ in range(draw(st.integers(1, 3))):
        stage = {}
        for index in range(draw(st.integers(1, 4))):
            dimensions = draw(st.integers(0, 3))
            layout = draw(layouts(ranks, dimensions))
            shape = tuple(draw(st.integers(0, 1 << 40)) for _ in range(dimensions))
            stage[f"p.{index}"] = Layout(layout.dev_matrix, layout.axes, shape, layout.optimizer_shards)
        stages.append(stage)
    return Strategy(tuple(stages), "made")


@settings(max_examples=60, deadline=None)
@given(strategies(), st.sampled_from([".ckpt", ".json"]))
def test_what_is_written_is_read(strategy, suffix):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        folder = Path(name) / "strategy"
        files = write_rank_strategies(folder, strategy, suffix)
        assert [file.name for file in files] == [
            f"ckpt_strategy_rank_{rank}{suffix}" for rank in range(strategy.ranks)
        ]
        assert read_strategy(folder).stages == strategy.stages
        merged = Path(name) / "merged.ckpt"
        write_merged_strategy(merged, strategy)
        assert read_strategy(merged).stages == strategy.stages


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 3, 4, 6, 8, 12]), st.integers(1, 3))
def test_a_box_is_where_numpy_cuts(data, ranks, dimensions):
    layout = data.draw(layouts(ranks, dimensions))
    shape = tuple(n * data.draw(st.integers(1, 3)) for n in layout.parts)
    tensor = np.arange(np.prod(shape)).reshape(shape)
    for rank in range(ranks):
        box = layout.box(rank, shape)
        part = tensor[tuple(slice(a, b) for a, b in box)]
        assert np.array_equal(part, cut(tensor, layout, rank))
        assert part.shape == layout.local_shape(shape)
        assert layout.whole_shape(part.shape) == shape


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
def test_each_rank_has_the_key_heads_of_its_queries(kv_heads, group, head_dim, ranks):
    heads = kv_heads * group
    assume(heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0))
    shapes = decoder(1, heads, kv_heads, head_dim, inner=ranks * 3, vocab=ranks * 2)
    layouts = decoder_strategy(shapes, Heads(heads, kv_heads), Mesh(ranks)).stages[0]
    wq, wk = (f"model.layers.0.attention.{name}.weight" for name in ("wq", "wk"))
    for rank in range(ranks):
        (first, last), _ = layouts[wq].box(rank, shapes[wq])
        queries = range(first // head_dim, last // head_dim)
        assert (first % head_dim, last % head_dim) == (0, 0)
        (first, last), _ = layouts[wk].box(rank, shapes[wk])
        keys = range(first // head_dim, last // head_dim)
        assert (first % head_dim, last % head_dim) == (0, 0)
        assert set(keys) == {query // group for query in queries}


def test_qwen2_7b_on_four_ranks():
    """28 heads of 128 over 4 key heads, MLP of 18944: the sizes that MindFormers' generator got wrong."""
    shapes = decoder(1, 28, 4, 128, 18944, 152064)
    found = decoder_strategy(shapes, Heads(28, 4), Mesh(4)).stages[0]
    layer = "model.layers.0."
    assert {name: each.split_shape for name, each in found.items()} == {
        "model.tok_embeddings.embedding_weight": (152064, 896),  # 128,256 tokens or more: cut by columns
        f"{layer}attention.wq.weight": (896, 3584),
        f"{layer}attention.wq.bias": (896,),
        f"{layer}attention.wk.weight": (128, 3584),
        f"{layer}attention.wk.bias": (128,),
        f"{layer}attention.wv.weight": (128, 3584),
        f"{layer}attention.wv.bias": (128,),
        f"{layer}attention.wo.weight": (3584, 896),
        f"{layer}feed_forward.w1.weight": (4736, 3584),
        f"{layer}feed_forward.w3.weight": (4736, 3584),
        f"{layer}feed_forward.w2.weight": (3584, 4736),
        f"{layer}attention_norm.weight": (3584,),
        f"{layer}ffn_norm.weight": (3584,),
        "model.norm_out.weight": (3584,),
        "lm_head.weight": (38016, 3584),
    }
    wq = found[f"{layer}attention.wq.weight"]
    assert (wq.dev_matrix, wq.tensor_map) == ((4, 1), [1, 0])
    assert found[f"{layer}attention_norm.weight"].tensor_map == [-1]


def test_more_ranks_than_key_heads_repeat_them_among_neighbours():
    found = decoder_strategy(decoder(), Heads(8, 2), Mesh(8)).stages[0]
    wk = found["model.layers.0.attention.wk.weight"]
    assert (wk.dev_matrix, wk.tensor_map, wk.split_shape) == ((2, 1, 4), [2, 1], (4, 32))
    assert [wk.box(rank, (8, 32))[0] for rank in range(8)] == [(0, 4)] * 4 + [(4, 8)] * 4


def test_data_parallel_ranks_repeat_and_stages_follow_each_other():
    strategy = decoder_strategy(decoder(), Heads(8, 2), Mesh(2, data=3, stages=2))
    assert (strategy.ranks, strategy.stage_ranks) == (12, 6)
    for number, stage in enumerate(strategy.stages):
        assert {name.split(".")[2] for name in stage if ".layers." in name} == {str(number)}
    assert "model.tok_embeddings.embedding_weight" in strategy.stages[0]
    assert {"model.norm_out.weight", "lm_head.weight"} <= set(strategy.stages[1])
    wq = strategy.stages[0]["model.layers.0.attention.wq.weight"]
    assert [wq.box(rank, (32, 32))[0] for rank in range(6)] == [(0, 16), (16, 32)] * 3


def test_vocab_emb_dp_keeps_the_head_whole():
    heads = Heads(8, 2)
    assert decoder_strategy(decoder(), heads, Mesh(4)).stages[0]["lm_head.weight"].parts == (4, 1)
    assert decoder_strategy(decoder(), heads, Mesh(4), vocab_emb_dp=True).stages[0][
        "lm_head.weight"
    ].parts == (1, 1)


@pytest.mark.parametrize(
    ("shapes", "heads", "mesh", "message"),
    [
        (
            decoder(),
            Heads(8, 2),
            Mesh(3),
            "3 ranks: num_attention_heads 8 do not divide among them; 1, 2, 4, 8",
        ),
        (
            decoder(heads=12, kv_heads=4),
            Heads(12, 4),
            Mesh(6),
            "num_key_value_heads 4 neither divide among them nor can be repeated evenly; 1, 2, 4",
        ),
        (
            decoder(inner=6),
            Heads(8, 2),
            Mesh(4),
            "w1.weight [6, 32] does not divide into 4 along axis 0; 1, 2",
        ),
        (
            decoder(vocab=63),
            Heads(8, 2),
            Mesh(2),
            "lm_head.weight [63, 32] does not divide into 2 along axis 0; 1",
        ),
        (
            {"model.layers.0.attention.w_qkv.weight": (48, 32)},
            Heads(8, 2),
            Mesh(4),
            "joins 2 key heads with their queries, and cannot repeat them",
        ),
        (
            decoder(layers=3),
            Heads(8, 2),
            Mesh(2, stages=2),
            "pipeline_stage 2: 3 layers do not divide; they do into 1, 3 stages",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(shapes, heads, mesh, message):
    with pytest.raises(CheckpointError) as caught:
        decoder_strategy(shapes, heads, mesh)
    text = str(caught.value).replace("this model divides among ", "")
    assert message in text


ONE = {"a": Layout((2,), ((0,),))}
OTHER = {"a": Layout((2,), ((),))}


def refused(path):
    with pytest.raises(CheckpointError) as caught:
        read_strategy(path)
    return one_line(caught.value, path)


def test_files_that_contradict_each_other(tmp_path):
    write_strategy(tmp_path / "r0.ckpt", ONE)
    write_strategy(tmp_path / "r1.ckpt", OTHER)
    with pytest.raises(CheckpointError, match=r"r1.ckpt: contradicts r0.ckpt about pipeline stage 0"):
        read_strategy(tmp_path)
    write_strategy(tmp_path / "r1.json", ONE)
    assert "holds strategies as .ckpt and as .json" in refused(tmp_path)


def test_a_stage_that_is_missing(tmp_path):
    write_strategy(tmp_path / "r0.ckpt", ONE)
    write_strategy(tmp_path / "r2.ckpt", ONE, stage=2)
    assert "the strategy of pipeline stage 1 is missing, that of stage 2 is there" in refused(tmp_path)


def test_an_earlier_strategy_does_not_stay_beside_a_new_one(tmp_path):
    write_rank_strategies(tmp_path, Strategy(({"a": Layout((4,), ((),))},), "four"), ".json")
    (tmp_path / "mine.txt").touch()
    write_rank_strategies(tmp_path, Strategy((ONE,), "two"))
    assert sorted(os.listdir(tmp_path)) == [
        "ckpt_strategy_rank_0.ckpt",
        "ckpt_strategy_rank_1.ckpt",
        "mine.txt",
    ]


def layout_item(name=b"a", matrix=(2,), tensor_map=(0,), shards=0):
    def dims(values):
        return b"".join(integer_field(1, value) for value in values)

    body = bytes_field(1, dims(matrix)) + bytes_field(2, dims(tensor_map)) + integer_field(7, shards)
    return bytes_field(3, bytes_field(1, name) + bytes_field(2, body))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "names no parameter"),
        (b"no strategy", "not a strategy file: "),
        (layout_item() * 2, "parameter 'a' stands there twice"),
        (layout_item(matrix=()), "parameter 'a': dev_matrix []"),
        (layout_item(matrix=(2, 0)), "its sizes must be 1 or more"),
        (layout_item(matrix=(1 << 20, 1 << 20)), "up to 1048576 ranks are allowed"),
        (layout_item(tensor_map=(3,)), "tensor_map [3] names an axis that dev_matrix [2] lacks"),
        (layout_item(tensor_map=(0, 0)), "cuts two dimensions along one axis of dev_matrix [2]"),
        (layout_item(matrix=(4, 2), shards=3), "opt_weight_shard_size 3 does not divide the 4 ranks"),
        (layout_item() + layout_item(b"b", (4,)), "parameter 'b' is laid on 4 ranks, others on 2"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, data, message):
    (tmp_path / "s.ckpt").write_bytes(data)
    assert message in refused(tmp_path / "s.ckpt")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "names no parameter"),
        ({"parallel_layout_item": []}, "parallel_layout_item is []; it must be an object"),
        (
            {"parallel_layout_item": {"a": {"dev_matrix": 2}}},
            "parameter 'a': dev_matrix is 2; it must be a list",
        ),
        (
            {"parallel_layout_item": {"a": {"dev_matrix": ["x"]}}},
            "dev_matrix is 'x'; it must be a whole number",
        ),
    ],
)
def test_a_wrong_json_file_is_named(tmp_path, table, message):
    (tmp_path / "s.json").write_text(json.dumps(table))
    assert message in refused(tmp_path / "s.json")


def test_an_optimizer_shard_of_all_is_minus_one(tmp_path):
    (tmp_path / "s.ckpt").write_bytes(layout_item(matrix=(4, 2), shards=-1))
    assert read_strategy(tmp_path / "s.ckpt").stages[0]["a"].optimizer_shards == 4


def test_absent_and_empty(tmp_path):
    assert "no strategy can be read there (No such file" in refused(tmp_path / "absent")
    assert "no strategy file there (*.ckpt or *.json)" in refused(tmp_path)


def test_no_damage_gets_through_unseen_or_takes_memory(tmp_path):
    path = tmp_path / "s.ckpt"
    write_merged_strategy(path, decoder_strategy(decoder(1), Heads(8, 2), Mesh(2)))
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(good[: rng.integers(len(good) // 2, len(good) + 1)])
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        assert_refused_or_read(lambda: read_strategy(path), len(data))
