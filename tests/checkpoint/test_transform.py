"""Split, merge and re-split against numpy's own cuts: every mesh and format to the bit, every fault named."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_samples import cases, cut, read, same, split, write, write_ranks

from golden import model_dir
from llm_boost import LLM, SamplingParams
from llm_boost.checkpoint import open_checkpoint
from llm_boost.checkpoint.mindformers_names import mindformers_name, row_order
from llm_boost.checkpoint.parallel.layout import Layout
from llm_boost.checkpoint.parallel.lora import LoraSource
from llm_boost.checkpoint.parallel.source import open_source
from llm_boost.checkpoint.parallel.split_weights import verify_ranks
from llm_boost.checkpoint.parallel.strategy import Strategy
from llm_boost.checkpoint.parallel.strategy_files import read_strategy, write_rank_strategies
from llm_boost.checkpoint.parallel.tensor_parallel import Heads, Mesh, decoder_strategy
from llm_boost.checkpoint.parallel.transform import check_vacant, plan, transform
from llm_boost.checkpoint.parallel.unified import unify
from llm_boost.errors import CheckpointError

MINDSPORE = Path(__file__).parent.parent / "goldens" / "mindspore_parallel"
FORMATS = st.sampled_from(["ckpt", "safetensors"])


def run(source, strategy, folder, *, by_rank=False, workers=1, src_strategy=None, qkv_layout=None, **options):
    """Transforms and reads what every rank then holds."""
    opened, joined = open_source(source, src_strategy, qkv_layout)
    shares = plan(opened, strategy, folder, joined=joined, **options)
    check_vacant(folder, len(shares), opened)
    transform(opened, shares, by_rank=by_rank, workers=workers)
    return [read(share.file) for share in shares]


@settings(max_examples=50, deadline=None)
@given(cases(), FORMATS, FORMATS, st.booleans(), st.integers(1, 3), st.integers(1, 64))
def test_every_road_is_what_numpy_makes_of_it(case, first, second, by_rank, workers, chunk):
    tensors, (one, other) = case
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_boost.checkpoint.parallel.pieces.CHUNK_BYTES", chunk)
        patch.setattr("os.fsync", lambda file: None)
        folder = Path(name)
        options = {"by_rank": by_rank, "workers": workers, "output_format": second}
        whole = write(folder / f"whole.{first}", tensors)
        ranks = write_ranks(folder / "ranks", split(tensors, one), f".{first}")
        for found, expected in (
            (run(whole, one, folder / "from_whole", **options), split(tensors, one)),
            (run(ranks, other, folder / "again", src_strategy=one, **options), split(tensors, other)),
            (run(folder / "again", one, folder / "back", **options), split(tensors, one)),
            (run(folder / "back", None, folder / "complete", **options), [tensors]),
        ):
            assert all(same(*each) for each in zip(found, expected, strict=True))
        assert not list(folder.rglob("*.tmp"))


# ---- what MindSpore made (tests/goldens/make_mindspore_strategies.py)


@pytest.mark.parametrize("source_strategy", ["source.ckpt", "source.json"])
def test_mindspores_strategies_and_what_it_made_by_them(tmp_path, source_strategy):
    source, target = read_strategy(MINDSPORE / source_strategy), read_strategy(MINDSPORE / "target.ckpt")
    assert [(each.ranks, len(each.stages)) for each in (source, target)] == [(8, 2), (4, 1)]
    with np.load(MINDSPORE / "whole.npz") as arrays:
        whole = {name: arrays[name] for name in arrays.files if name != "version"}
    for rank in range(8):
        (tmp_path / f"ranks/rank_{rank}").mkdir(parents=True)
        shutil.copy(MINDSPORE / f"source_{rank}.ckpt", tmp_path / f"ranks/rank_{rank}")
    made = run(tmp_path / "ranks", target, tmp_path / "made", src_strategy=source)
    for rank, found in enumerate(made):
        assert same(found, read(MINDSPORE / f"target_{rank}.ckpt"))
    (merged,) = run(tmp_path / "ranks", None, tmp_path / "one", src_strategy=source)
    assert same(merged, whole)
    assert same(merged, read(MINDSPORE / "whole.ckpt"))


# ---- models


def mindformers_tensors(name):
    source = open_checkpoint(model_dir(name))
    model_type = source.config["model_type"]
    return {mindformers_name(each, model_type): source.read(each) for each in source.tensors}


def strategy_of(tensors, heads, ranks):
    return decoder_strategy({n: t.shape for n, t in tensors.items()}, heads, Mesh(ranks))


@pytest.mark.parametrize(("name", "ranks"), [("llama", 2), ("llama", 4), ("qwen2", 4), ("qwen3", 3)])
@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_a_model_answers_the_same_from_its_ranks(tmp_path, name, ranks, form):
    tensors = mindformers_tensors(name)
    config = open_checkpoint(model_dir(name)).config
    heads = Heads(config["num_attention_heads"], config["num_key_value_heads"])
    strategy = strategy_of(tensors, heads, ranks)
    held = run(model_dir(name), strategy, tmp_path / "split", output_format=form)
    assert all(same(*each) for each in zip(held, split(tensors, strategy), strict=True))
    for file in model_dir(name).iterdir():
        if file.suffix == ".json":
            shutil.copy(file, tmp_path / "split")
    prompt = [1, 17, 99, 4, 200]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    answers = [
        LLM(model=model, dtype="float32", cache_dir=tmp_path).generate([{"prompt_token_ids": prompt}], params)
        for model in (model_dir(name), tmp_path / "split")
    ]
    assert answers[0][0].outputs[0].token_ids == answers[1][0].outputs[0].token_ids


def test_a_split_checkpoint_has_a_fingerprint_of_its_strategy_too(tmp_path):
    tensors = {"a": np.arange(8, dtype=np.float32)}
    folder = write_ranks(tmp_path / "ranks", split(tensors, cut_in(2)))
    (folder / "config.json").write_text("{}")
    prints = set()
    for strategy in (cut_in(2), whole_on(2)):
        write_rank_strategies(tmp_path / "strategy", strategy)
        prints.add(open_checkpoint(folder).fingerprint())
    assert len(prints) == 2


@pytest.mark.parametrize("layout", ["grouped", "plain", "grouped_plain_bias"])
@pytest.mark.parametrize("suffix", ["weight", "bias"])
def test_concatenated_parameters_are_cut_by_heads(tmp_path, layout, suffix):
    """2 ranks, 4 heads over 2 key heads of 3: a rank's rows are its own q, k and v, in the layout."""
    rng = np.random.default_rng(0)
    columns = (5,) if suffix == "weight" else ()
    parts = [rng.normal(size=(rows, *columns)).astype(np.float32) for rows in (12, 6, 6)]
    name = f"model.layers.0.attention.w_qkv.{suffix}"

    def joined(parts):
        order = row_order(name, layout, tuple(len(part) for part in parts), 3)
        return np.stack([parts[p][r] for p, r in zip(order.part, order.row, strict=True)])

    source = write(tmp_path / "whole.ckpt", {name: joined(parts)})
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4, "num_key_value_heads": 2}))
    axes = ((0,), *((),) * len(columns))
    strategy = Strategy(({name: Layout((2,), axes)},), "two")
    found = run(source, strategy, tmp_path / "split", qkv_layout=layout)
    for rank, held in enumerate(found):
        assert np.array_equal(held[name], joined([np.split(part, 2)[rank] for part in parts]))
    shutil.copy(tmp_path / "config.json", tmp_path / "split")
    (back,) = run(tmp_path / "split", None, tmp_path / "back", qkv_layout=layout)
    assert np.array_equal(back[name], joined(parts))
    with pytest.raises(
        CheckpointError, match="concatenated, in an order that no file tells, and cut by rows"
    ):
        run(source, strategy, tmp_path / "no")
    four = Strategy(({name: Layout((4,), axes)},), "four")
    with pytest.raises(CheckpointError, match=r"4 ranks cannot share by key heads \(2 of them\)"):
        run(source, four, tmp_path / "no", qkv_layout=layout)
    assert not (tmp_path / "no").exists()


def test_lora_adapters_are_merged(tmp_path):
    rng = np.random.default_rng(0)
    weight, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 4), (2, 4), (6, 2)))
    name = "model.layers.0.attention.wq"
    tensors = {f"{name}.weight": weight, f"{name}.mindpet_delta_lora_a": a, f"{name}.mindpet_delta_lora_b": b}
    source, joined = open_source(write(tmp_path / "a.ckpt", tensors))
    merged = LoraSource(source, 0.5)
    (share,) = shares = plan(merged, None, tmp_path / "out", joined=joined)
    transform(merged, shares)
    found = read(share.file)
    assert found.keys() == {f"{name}.weight"}
    np.testing.assert_allclose(found[f"{name}.weight"], weight + 0.5 * (b @ a), rtol=1e-6)
    with pytest.raises(CheckpointError, match="has no LoRA adapters"):
        LoraSource(open_source(share.file)[0], 1.0)


def test_unified_safetensors_are_balanced_parts_and_a_map(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_boost.checkpoint.parallel.unified.PART_BYTES", 100)
    tensors = {f"t{i}": np.full((i + 1, 4), i, np.float32) for i in range(6)}
    tensors["accu_grads.t0"] = np.zeros((1, 4), np.float32)
    strategy = Strategy(({name: Layout((2,), ((), (0,))) for name in tensors},), "two")
    ranks = split(tensors, strategy)
    for rank in ranks:
        rank["global_step"] = np.array([7], np.int32)
    source, _ = open_source(write_ranks(tmp_path / "ranks", ranks, ".safetensors"), strategy)
    folder, size, parts = unify(source, tmp_path / "out", "1_1")
    assert folder == tmp_path / "out/1_1_ckpt_convert/unified_safe"
    assert (size, parts) == (21 * 16, 4)
    table = json.loads((folder / "param_name_map.json").read_text())
    assert table["metadata"] == {"total_size": size}
    held = {f"part{i}.safetensors": read(folder / f"part{i}.safetensors") for i in range(parts)}
    assert {n: file for file, each in held.items() for n in each} == table["weight_map"]
    assert same(
        {n: t for each in held.values() for n, t in each.items()},
        {f"t{i}": tensors[f"t{i}"] for i in range(6)},
    )
    assert max(sum(t.nbytes for t in each.values()) for each in held.values()) <= 6 * 16
    assert read(folder / "hyper_param.safetensors")["global_step"] == 7
    assert read_strategy(tmp_path / "out/1_1_ckpt_convert/merge_strategy").stages == strategy.stages
    with pytest.raises(CheckpointError, match="is there, and not empty"):
        unify(source, tmp_path / "out", "1_1")


# ---- faults


def cut_in(ranks, name="a"):
    return Strategy(({name: Layout((ranks,), ((0,),))},), f"cut in {ranks}")


def whole_on(ranks, name="a"):
    return Strategy(({name: Layout((ranks,), ((),))},), f"whole on {ranks}")


TENSORS = {"a": np.arange(24, dtype=np.float32), "b": np.arange(6, dtype=np.float16)}


@pytest.fixture
def made(tmp_path):
    """A split in two, with its manifests."""
    run(write(tmp_path / "whole.ckpt", TENSORS), cut_in(2), tmp_path / "made")
    return tmp_path / "made"


def refused(source, strategy=None, src_strategy=None, **options):
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        run(source, strategy, source.parent / "out", src_strategy=src_strategy, **options)
    assert not list((source.parent / "out").rglob("*.ckpt"))
    assert [each for each in before if not each.exists()] == []
    text = str(caught.value)
    assert "\n" not in text
    assert len(text.replace(str(source.parent), "")) < 300
    return text


def test_rank_folders_that_are_missing_or_doubled(made):
    shutil.copytree(made / "rank_1", made / "rank_01")
    assert "made: rank 1 is there twice, rank_01 and rank_1" in refused(made)
    shutil.rmtree(made / "rank_01")
    (made / "rank_1").rename(made / "rank_2")
    assert "made: the folder rank_1 is missing; rank_2 is there" in refused(made)
    (made / "rank_2").rename(made / "rank_1")
    shutil.rmtree(made / "rank_0")
    shutil.copytree(made / "rank_1", made / "rank_0")
    assert (
        "rank_0: its manifest says rank 1 of 2; 2 rank folders are there, and this one is rank 0"
        in refused(made)
    )


def test_a_wrong_number_of_ranks(made):
    shutil.copytree(made / "rank_1", made / "rank_2")
    assert "its manifest says rank 0 of 2; 3 rank folders are there" in refused(made)
    for rank in range(3):
        (made / f"rank_{rank}/manifest.json").unlink()
    assert "made: holds 3 rank folders; cut in 2 is for 2 ranks" in refused(made, src_strategy=cut_in(2))


def test_ranks_of_two_splits(made, tmp_path):
    run(write(tmp_path / "other.ckpt", {**TENSORS, "a": TENSORS["a"] + 1}), cut_in(2), tmp_path / "other")
    shutil.rmtree(made / "rank_1")
    shutil.copytree(tmp_path / "other/rank_1", made / "rank_1")
    assert "rank_1: is of another split than rank_0, their manifests say" in refused(made)


def test_bytes_that_are_not_what_the_manifest_says(made):
    file = made / "rank_1/checkpoint_1.ckpt"
    data = bytearray(file.read_bytes())
    data[data.index(TENSORS["a"][12:].tobytes()) + 1] ^= 1
    file.write_bytes(data)
    expected = "checkpoint_1.ckpt: parameter 'a' is not what its manifest says (SHA-256 differs)"
    assert expected in refused(made)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        verify_ranks(made)
    (made / "config.json").write_text("{}")
    checkpoint = open_checkpoint(made)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        checkpoint.read("a")
    assert np.array_equal(checkpoint.read("b"), TENSORS["b"])
    file.write_bytes(data[:-4])
    assert "it is cut off or damaged" in refused(made)


def test_what_is_whole_verifies(made):
    ranks, _ = verify_ranks(made)
    assert ranks == 2
    (made / "rank_1/manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"rank_1: has no manifest.json to compare checkpoint_1.ckpt with"
    ):
        verify_ranks(made)


def test_strategies_that_contradict_the_checkpoint(tmp_path):
    whole = write(tmp_path / "whole.ckpt", TENSORS)
    assert "parameter 'a': cut in 5: dimension 0 of [24] does not divide into 5 parts" in refused(
        whole, cut_in(5)
    )
    two_d = Strategy(({"a": Layout((2,), ((0,), ()))},), "flat")
    assert "has 2 dimensions, the tensor is [24]" in refused(whole, two_d)
    assert "whole.ckpt: has none of the parameters that cut in 2 names" in refused(whole, cut_in(2, "c"))
    other = Strategy(({"a": Layout((2,), ((0,),), (8,))},), "s.ckpt")
    message = "parameter 'a' is [12] on a rank, but s.ckpt says [8]; it is the strategy of another model"
    assert message in refused(whole, other)
    linear = {"model.layers.1.attention.wq.weight": np.ones((4, 4), np.float32), **TENSORS}
    linear = write(tmp_path / "linear.ckpt", linear)
    assert "has parameter 'model.layers.1.attention.wq.weight', which cut in 2 does not name" in refused(
        linear, cut_in(2)
    )
    named = Strategy(
        ({**cut_in(2).stages[0], "model.layers.0.attention.wq.weight": Layout((2,), ((0,), ()))},), "s"
    )
    assert "has no parameter 'model.layers.0.attention.wq.weight', which s names; did you mean" in refused(
        linear,
        Strategy(({**named.stages[0], "model.layers.1.attention.wq.weight": Layout((2,), ((0,), ()))},), "s"),
    )


def test_the_wrong_sizes_of_mindformers_own_generator_are_let_pass(tmp_path):
    name = "model.layers.0.attention.wk.weight"
    tensors = {name: np.arange(32, dtype=np.float32).reshape(4, 8)}
    wrong = Strategy(({name: Layout((2, 1), ((0,), (1,)), (4, 8))},), "its")
    found = run(write(tmp_path / "whole.ckpt", tensors), wrong, tmp_path / "out")
    assert [held[name].shape for held in found] == [(2, 8), (2, 8)]


def test_a_source_that_its_strategy_does_not_fit(tmp_path):
    without = write_ranks(tmp_path / "lacks", [{"a": TENSORS["a"][:12]}, {"b": TENSORS["b"]}])
    assert "checkpoint_1.ckpt: has no parameter 'a', which cut in 2 lays there" in refused(
        without, src_strategy=cut_in(2)
    )
    shapes = write_ranks(tmp_path / "shapes", [{"a": TENSORS["a"][:12]}, {"a": TENSORS["a"][:10]}])
    assert "checkpoint_1.ckpt: parameter 'a' is [10] float32, in rank_0 [12] float32" in refused(
        shapes, src_strategy=cut_in(2)
    )
    assert "a split checkpoint without its strategy" in refused(shapes)


def test_what_no_strategy_names_must_be_the_same_on_all_ranks(tmp_path):
    ranks = [{"a": TENSORS["a"][:12], "b": TENSORS["b"]}, {"a": TENSORS["a"][12:], "b": TENSORS["b"] + 1}]
    folder = write_ranks(tmp_path / "ranks", ranks)
    message = (
        "checkpoint_1.ckpt: parameter 'b' differs from that of other ranks, though cut in 2 does not cut it"
    )
    assert message in refused(folder, src_strategy=cut_in(2))


def test_another_strategy_than_the_one_it_was_split_by(made):
    message = "parameter 'a' was cut by another strategy than whole on 2, says the manifest of rank_0"
    assert message in refused(made, src_strategy=whole_on(2))


def test_ranks_without_what_others_repeat_are_enough(tmp_path):
    """remove_redundancy leaves each part on one rank alone."""
    name, layout = "a", Layout((2, 2), ((0,),))
    ranks = [
        {name: cut(TENSORS["a"], layout, rank)} if rank % 2 else {"b": TENSORS["b"]} for rank in range(4)
    ]
    folder = write_ranks(tmp_path / "ranks", ranks)
    (found,) = run(folder, None, tmp_path / "out", src_strategy=Strategy(({name: layout},), "s"))
    assert same(found, TENSORS)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    whole = write(tmp_path / "whole.ckpt", TENSORS)
    run(whole, cut_in(3), tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.*")}
    for strategy, message in (
        (cut_in(2), "rank_2: is there, and the result has 2 ranks; choose another folder, or remove it"),
        (cut_in(4), "rank_0/checkpoint_0.ckpt: is there, and of something else"),
        (whole_on(3), "rank_0/checkpoint_0.ckpt: is there, and of something else"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(whole, strategy, tmp_path / "out")
    with pytest.raises(CheckpointError, match="out: is where the source lies; choose another folder"):
        run(tmp_path / "out", cut_in(2), tmp_path / "out")
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.*")} == before


class Killed(BaseException):
    pass


def test_an_interrupted_run_leaves_nothing_half_written_and_the_next_one_goes_on(tmp_path):
    whole = write(tmp_path / "whole.ckpt", TENSORS)
    source, joined = open_source(whole)
    shares = plan(source, cut_in(3), tmp_path / "out", joined=joined)
    calls = []

    def kill(done, total):
        calls.append(done)
        if done > total * 0.6:
            raise Killed

    with pytest.raises(Killed):
        transform(source, shares, by_rank=True, progress=kill)
    done = [share for share in shares if share.file.exists()]
    assert 0 < len(done) < 3
    assert not list((tmp_path / "out").rglob("*.tmp"))
    stamps = [share.file.stat().st_mtime_ns for share in done]
    assert transform(source, shares) == done
    assert [share.file.stat().st_mtime_ns for share in done] == stamps
    assert all(same(read(s.file), e) for s, e in zip(shares, split(TENSORS, cut_in(3)), strict=True))
    assert transform(source, shares) == shares
    whole.touch()  # another source now, as far as one can tell
    with pytest.raises(CheckpointError, match="is there, and of something else"):
        run(whole, cut_in(3), tmp_path / "out")


def test_all_at_once_interrupted_leaves_no_file(tmp_path):
    source, joined = open_source(write(tmp_path / "whole.ckpt", TENSORS))

    def kill(done, total):
        if done > total * 0.6:
            raise Killed

    with pytest.raises(Killed):
        transform(source, plan(source, cut_in(3), tmp_path / "out", joined=joined), progress=kill)
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole.ckpt", TENSORS)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    assert "no space for out (No space left on device): it takes 0.0 MB" in refused(whole, cut_in(2))


def test_progress_counts_bytes_of_all_files(tmp_path):
    source, joined = open_source(write(tmp_path / "whole.ckpt", TENSORS))
    seen = []
    transform(
        source,
        plan(source, cut_in(3), tmp_path / "out", joined=joined),
        progress=lambda *each: seen.append(each),
    )
    assert {total for _, total in seen} == {24 * 4 + 3 * 12}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_other_sources_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "m.gguf").touch()
    assert "a GGUF file is not split; llm-boost convert makes a checkpoint of it" in refused(
        tmp_path / "m.gguf"
    )
    assert "no checkpoint can be read there (No such file or directory)" in refused(tmp_path / "absent.ckpt")
    (tmp_path / "empty").mkdir()
    assert "no checkpoint there (a .ckpt or .safetensors file, or folders rank_0" in refused(
        tmp_path / "empty"
    )
    (tmp_path / "rank" / "rank_0").mkdir(parents=True)
    (tmp_path / "rank" / "rank_1").mkdir()
    assert "rank_0: no .ckpt or .safetensors file there" in refused(tmp_path / "rank")


def test_manifest_says_what_was_cut(made):
    table = json.loads((made / "rank_1/manifest.json").read_text())
    assert (table["rank"], table["ranks"], table["file"]) == (1, 2, "checkpoint_1.ckpt")
    assert table["source"]["path"].endswith("whole.ckpt")
    part = table["parameters"]["a"]
    assert (part["shape"], part["whole_shape"], part["axes_cut"], part["dtype"]) == (
        [12],
        [24],
        [0],
        "float32",
    )
    assert part["layout"]["dev_matrix"] == [2]
    assert len(part["sha256"]) == 64
    assert table["parameters"]["b"]["layout"] is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "x", "format is 'x'; it must be 'llm-boost rank 1'"),
        ("file", "../x.ckpt", "file is '../x.ckpt'; it must be the name of a file in the same folder"),
        ("ranks", 0, "ranks is 0; it must be an integer from 1"),
        ("parameters", [], "parameters: is []; it must be an object"),
        ("parameters", {"a": {}}, "'a': a shape is None; it must be a list of sizes"),
    ],
)
def test_a_damaged_manifest_is_named(made, key, value, message):
    path = made / "rank_0/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    text = refused(made)
    assert str(path) in text
    assert message in text
