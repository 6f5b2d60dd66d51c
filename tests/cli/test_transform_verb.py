"""`llm-boost strategy`, `transform` and predict's --only_save_strategy: the original tools' own commands."""

from __future__ import annotations

import json
import shutil

import pytest

from golden import model_dir
from llm_boost.checkpoint import open_checkpoint
from llm_boost.checkpoint.parallel.strategy_files import read_strategy

SPLIT = ["--src_checkpoint", model_dir("llama"), "--dst_checkpoint_dir", "out"]
UNIFY = ["--mindspore_ckpt_dir", model_dir("llama"), "--output_dir", "out"]
SAVE = ["predict", "--only_save_strategy", "True", "--use_parallel", "True"]
LLAMA, QWEN = model_dir("llama"), model_dir("qwen2")
YAML = """
model:
  model_config: {type: LlmBoostConfig, boost_model_name: Qwen, seq_length: 64}
parallel_config: {data_parallel: 1, model_parallel: 4}
"""


@pytest.fixture
def ok(run):
    """Runs a command that must succeed; gives stdout, or stderr where that is empty."""

    def ok(*args):
        code, out, err = run(*args)
        assert code == 0, err
        return out or err

    return ok


@pytest.fixture
def refused(run, tmp_path):
    """The one line of a command that must end with exit code 2 and write nothing."""

    def refused(*args):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run(*args)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert sorted(tmp_path.rglob("*")) == before
        return err.removeprefix("llm-boost: error: ").rstrip()

    return refused


def equal(one, other):
    one, other = open_checkpoint(one), open_checkpoint(other)
    assert one.tensors.keys() == other.tensors.keys()
    for name, info in one.tensors.items():
        assert info == other.tensors[name]
        assert one.read(name).tobytes() == other.read(name).tobytes()


def test_the_command_of_the_documentation(ok, tmp_path):
    """The llm_boost page's own, with the script's name replaced."""
    (tmp_path / "c.yaml").write_text(YAML)
    (tmp_path / "vocab.json").touch()
    (tmp_path / "merges.txt").touch()
    message = ok(
        "predict", "--config_path", "c.yaml", "--only_save_strategy", "True", "--load_checkpoint", QWEN,
        "--vocab_file", "vocab.json", "--merges_file", "merges.txt", "--use_parallel", "True",
        "--device_num", 2,
    )  # fmt: skip
    assert "Strategy file has been saved in output/strategy" in message
    names = sorted(file.name for file in (tmp_path / "output/strategy").iterdir())
    assert names == ["ckpt_strategy_rank_0.ckpt", "ckpt_strategy_rank_1.ckpt"]
    strategy = read_strategy(tmp_path / "output/strategy")
    assert strategy.ranks == 2
    assert set(strategy.names) > {"model.layers.0.attention.wk.bias", "model.layers.1.feed_forward.w2.weight"}
    assert "lm_head.weight" not in strategy.names  # this one's head is tied


def test_the_files_own_ranks_and_folder(ok, tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text(
        f"output_dir: here\nuse_parallel: True\nonly_save_strategy: True\n{YAML}"
    )
    ok("predict", "--config_path", "c.yaml", "--load_checkpoint", QWEN)
    assert read_strategy(tmp_path / "here/strategy").ranks == 4
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", str(tmp_path / "there"))
    ok("predict", "--config_path", "c.yaml", "--load_checkpoint", QWEN)
    assert read_strategy(tmp_path / "there/strategy").ranks == 4


def test_one_rank_needs_no_strategy(ok, tmp_path):
    message = ok("predict", "--model", LLAMA, "--only_save_strategy", "True", "--use_parallel", "False")
    assert "one rank needs no strategy; nothing was written" in message
    assert not (tmp_path / "output").exists()


def test_a_strategy_of_a_config_alone_is_that_of_the_weights(ok, tmp_path):
    (tmp_path / "config").mkdir()
    shutil.copy(LLAMA / "config.json", tmp_path / "config")
    ok("strategy", "--model", "config", "--device_num", 4, "--output_dir", "one", "--format", "json")
    ok("strategy", "--model", LLAMA, "--device_num", 4, "--output_dir", "other")
    assert (
        read_strategy(tmp_path / "one/strategy").stages == read_strategy(tmp_path / "other/strategy").stages
    )


def test_a_strategy_of_a_yaml_alone(ok, tmp_path):
    shape = "hidden_size: 3584, num_heads: 28, n_kv_heads: 4, vocab_size: 152064, intermediate_size: 18944"
    text = YAML.replace("seq_length: 64", f"{shape}, num_layers: 2")
    (tmp_path / "c.yaml").write_text(text)
    found = json.loads(ok("strategy", "--config_path", "c.yaml", "--pipeline_stage", 2, "--json"))
    assert (found["ranks"], len(found["files"])) == (8, 8)
    shown = json.loads(ok("strategy", "--show", "output/strategy", "--json"))
    assert shown["stages"][1]["model.layers.1.attention.wk.weight"]["param_split_shape"] == [128, 3584]
    assert "stage 1: ranks 4 to 7" in ok("strategy", "--show", "output/strategy")


def test_split_resplit_merge(ok, tmp_path):
    ok("transform", "--src_checkpoint", QWEN, "--dst_checkpoint_dir", "two", "--ranks", 2, "--format", "ckpt")
    assert (tmp_path / "two/rank_1/checkpoint_1.ckpt").is_file()
    assert read_strategy(tmp_path / "two/strategy").ranks == 2
    ok("strategy", "--model", QWEN, "--device_num", 4)
    ok(
        "transform",
        "--src_checkpoint",
        "two",
        "--dst_checkpoint",
        "four",
        "--dst_strategy",
        "output/strategy",
        "--world_size",
        4,
        "--transform_process_num",
        2,
        "--prefix",
        "x_",
    )
    assert (tmp_path / "four/rank_3/x_3.ckpt").is_file()
    ok(
        "transform",
        "--src_ckpt_dir",
        "four",
        "--src_ckpt_strategy",
        "output/strategy",
        "--dst_ckpt_dir",
        "one",
    )
    assert (tmp_path / "one/rank_0/checkpoint_0.ckpt").is_file()
    for each in ("two", "four", "one"):
        equal(QWEN, tmp_path / each)
    assert "2 ranks as their manifests say" in ok("transform", "--verify", "two")
    assert "every value is a finite number" in ok("inspect", "two", "--check")


def test_inspect_compares_ranks_with_their_manifests(ok, run, tmp_path):
    ok("transform", "--src_checkpoint", LLAMA, "--dst_checkpoint_dir", tmp_path / "two", "--ranks", 2)
    damaged = tmp_path / "two/rank_1/checkpoint_1.safetensors"
    damaged.chmod(0o600)
    data = bytearray(damaged.read_bytes())
    data[-9] ^= 1
    damaged.write_bytes(data)
    code, out, _ = run("inspect", tmp_path / "two", "--check")
    assert code == 1
    assert "is not what its manifest says (SHA-256 differs)" in out


def test_processes_that_share_the_ranks(ok, tmp_path):
    for rank in (0, 2):
        found = json.loads(
            ok(
                "transform",
                "--src_checkpoint",
                LLAMA,
                "--dst_checkpoint_dir",
                "out",
                "--ranks",
                4,
                "--transform_process_num",
                2,
                "--rank_id",
                rank,
                "--transform_by_rank",
                "True",
                "--json",
            )
        )
        assert [file.split("/")[1] for file in found["files"]] == [f"rank_{rank}", f"rank_{rank + 1}"]
    equal(LLAMA, tmp_path / "out")
    assert (
        json.loads(
            ok("transform", "--src_checkpoint", LLAMA, "--dst_checkpoint_dir", "out", "--ranks", 4, "--json")
        )["kept"]
        == 4
    )


def test_unified_safetensors(ok, tmp_path):
    ok("transform", "--src_checkpoint", LLAMA, "--dst_checkpoint_dir", "two", "--ranks", 2)
    ok(
        "transform",
        "--mindspore_ckpt_dir",
        "two",
        "--src_strategy_dirs",
        "two/strategy",
        "--output_dir",
        "out",
        "--has_redundancy",
        "True",
    )
    folder = tmp_path / "out/ckpt_convert/unified_safe"
    assert (folder / "param_name_map.json").is_file()
    equal(LLAMA, folder)


def test_predict_reads_rank_folders(ok, run, refused, tmp_path):
    prompt = ("--max_new_tokens", 5, "--dtype", "fp32", "--cache_dir", "cache", "hello")
    ok("transform", "--src_checkpoint", QWEN, "--dst_checkpoint_dir", "two", "--ranks", 2)
    expected = ok("predict", "--model", QWEN, *prompt)
    assert ok("predict", "--model", "two", *prompt) == expected
    (tmp_path / "c.yaml").write_text("auto_trans_ckpt: False\n" + YAML)
    code, _, line = run("predict", "--config_path", "c.yaml", "--load_checkpoint", "two", *prompt)
    assert code == 2
    assert "error: c.yaml: auto_trans_ckpt: got False, but two is split into ranks and this is one" in line
    (tmp_path / "c.yaml").write_text("auto_trans_ckpt: True\n" + YAML)
    assert ok("predict", "--config_path", "c.yaml", "--load_checkpoint", "two", *prompt) == expected
    for rank in (0, 1):
        (tmp_path / f"two/rank_{rank}/manifest.json").unlink()
    (tmp_path / "two/strategy").rename(tmp_path / "elsewhere")
    line = refused("predict", "--model", "two", *prompt)
    assert "two: a split checkpoint without its strategy: give it as src_strategy_path_or_dir" in line
    assert ok("predict", "--model", "two", "--src_strategy", "elsewhere", *prompt) == expected
    (tmp_path / "c.yaml").write_text("src_strategy_path_or_dir: elsewhere\n" + YAML)
    assert ok("predict", "--config_path", "c.yaml", "--load_checkpoint", "two", *prompt) == expected


def test_a_strategy_that_nothing_needs_is_said(run):
    code, _, err = run(
        "predict", "--model", LLAMA, "--src_strategy", "x", "--max_new_tokens", 1, "--cache_dir", "c", "hi"
    )
    assert code == 0
    assert "note: --src_strategy: without effect, since" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dst_checkpoint_dir", "out"], "--src_checkpoint: missing"),
        (["--src_checkpoint", LLAMA], "--dst_checkpoint_dir: missing"),
        (SPLIT, "is complete already: give --ranks or --dst_strategy"),
        ([*SPLIT, "--ranks", "3"], "heads 4 do not divide among them; this model divides among 1, 2, 4"),
        ([*SPLIT, "--ranks", "2", "--dst_strategy", "s"], "--ranks and --dst_strategy: give one"),
        ([*SPLIT, "--dst_strategy", "absent"], "absent: no strategy can be read there"),
        ([*SPLIT, "--ranks", "2", "--world_size", "4"], "got 4, but the result has 2 ranks"),
        ([*SPLIT, "--ranks", "4", "--max_process_num", "3"], "got 3, allowed: a divisor of the 4 ranks"),
        (
            [*SPLIT, "--ranks", "4", "--transform_process_num", "2", "--rank_id", "1"],
            "--rank_id: got 1, allowed with 2 processes of 4 ranks: 0, 2",
        ),
        ([*SPLIT, "--ranks", "2", "--prefix", "a/b"], "'a/b': must be the beginning of a file's name"),
        ([*SPLIT, "--lora_scaling", "1"], "has no LoRA adapters"),
        ([*UNIFY, "--ranks", "2"], "--ranks: unified safetensors are complete"),
        ([*UNIFY, "--save_format", "ckpt"], "--format: got 'ckpt', allowed: safetensors"),
        ([*UNIFY, "--src_checkpoint", LLAMA], "--mindspore_ckpt_dir: give one"),
        (["--src_checkpoint", "absent", "--dst_checkpoint_dir", "out", "--ranks", "2"], "absent"),
        (["--verify", LLAMA], "no folders rank_0, rank_1, ... there"),
    ],
)  # fmt: skip
def test_wrong_input_ends_in_one_line_and_exit_code_2(refused, args, message):
    assert message in refused("transform", *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["strategy"], "--device_num: missing"),
        (["strategy", "--device_num", "2"], "no model: give --model"),
        (["strategy", "--device_num", "0", "--model", LLAMA], "got 0, allowed: a number of ranks"),
        (["strategy", "--device_num", "2", "--model", "absent"], "model 'absent': no such directory or file"),
        (["strategy", "--show", "absent"], "absent: no strategy can be read there"),
        ([*SAVE, "--model", LLAMA, "--device_num", "2", "--vocab_file", "v"], "The vocab_file should exist."),
    ],
)  # fmt: skip
def test_wrong_input_of_strategies(refused, args, message):
    assert message in refused(*args)
