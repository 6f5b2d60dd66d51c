"""Damaged models and impossible wishes, through the real command line on golden checkpoints.

Each ends in exit code 2 and one line that names the file and the field, and leaves no half-written cache.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from golden import model_dir
from llm_boost.checkpoint.safetensors_reader import SafetensorsFile
from llm_boost.cli.progress import ProgressBar

LLAMA = model_dir("llama")
YAML = "model:\n  model_config:\n    type: LlmBoostConfig\n    boost_model_name: Llama\n"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
COMMAND = [sys.executable, "-m", "llm_boost.cli.main"]


@pytest.fixture
def model(tmp_path):
    """A copy of the golden Llama, to be damaged."""
    return Path(shutil.copytree(LLAMA, tmp_path / "model"))


@pytest.fixture
def predict(run, tmp_path):
    """predict(*args): (exit code, stdout, stderr), with a cache and one thread of its own."""

    def predict(*args):
        return run("predict", "--cache_dir", tmp_path / "cache", "--threads", 1, "--max_new_tokens", 3, *args)

    return predict


@pytest.fixture
def refused(predict, tmp_path):
    """refused(*args): the one line that a command ends in."""

    def refused(*args):
        code, out, err = predict(*args)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("llm-boost: error: ")
        for file in (tmp_path / "cache" / "packed").glob("*"):  # what was packed before is whole
            assert file.suffix == ".lock" or SafetensorsFile(file)
        return err.removeprefix("llm-boost: error: ").strip()

    return refused


def edit_header(model, change):
    """Lets `change` alter the safetensors header's table and data."""
    file = model / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    table, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    change(table, data)
    header = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(data))


def edit_json(file, **changes):
    table = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**table, **changes}))


# ---- models


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "the file is empty"),
        (lambda raw: raw[:5], "5 bytes, too short for safetensors"),
        (lambda raw: raw[:100], "header length 2136 in a file of 100 bytes"),
        (lambda raw: raw[: len(raw) // 2], "the file is cut off"),
        (lambda raw: struct.pack("<Q", 10**6) + raw[8:], "header length 1000000 in a file of 157408 bytes"),
        (lambda raw: struct.pack("<Q", 2**63) + raw[8:], "header length 9223372036854775808, at most"),
    ],
)
def test_a_damaged_safetensors_file(refused, model, damage, message):
    file = model / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    line = refused("--model", model, "hi")
    assert line.startswith(f"{file}: ")
    assert message in line


def test_a_wrong_table_of_tensors(refused, model):
    def expect(message, name="lm_head.weight", **fields):
        shutil.copy(LLAMA / "model.safetensors", model)
        edit_header(model, lambda table, data: table[name].update(fields))
        line = refused("--model", model, "hi")
        assert line.startswith(str(model))
        assert name in line
        assert message in line

    expect("overlap at byte 34304", data_offsets=[0, 34840], shape=[268, 65])
    expect("the file is cut off", "model.norm.weight", data_offsets=[10**6, 10**6 + 128])
    expect("but shape [3, 3] of BF16 takes 18", shape=[3, 3])
    expect("has shape [64, 268], config.json makes it [268, 64]", shape=[64, 268])
    expect("dtype 'Q9' is not known", dtype="Q9")
    expect("is int16; weights must be float32, float16 or bfloat16", dtype="I16")


def test_weights_that_are_not_numbers(refused, model):
    def poison(table, data):
        at = table["lm_head.weight"]["data_offsets"][0]
        data[at : at + 2] = b"\xc0\x7f"

    edit_header(model, poison)
    for dtype in ("float32", "int4"):
        line = refused("--model", model, "--dtype", dtype, "hi")
        assert line == f"{model}: lm_head.weight: 1 weights are NaN or infinite"


def test_parts_of_a_model(refused, model):
    (model / "model.safetensors").rename(model / SHARDS[0])
    assert refused("--model", model, "hi").startswith(
        f"{model / SHARDS[1]}: this part of the model is missing"
    )
    index = model / "model.safetensors.index.json"
    for file, message in [
        (SHARDS[1], f"{model / SHARDS[1]}: this part of the model is missing"),
        ("../other.safetensors", f"{index}: '../other.safetensors' points outside the model's folder"),
        ("/etc/passwd", f"{index}: '/etc/passwd' points outside the model's folder"),
        (SHARDS[0], f"{model / SHARDS[0]}: has no tensor 'new', though the index says so"),
    ]:
        index.write_text(json.dumps({"weight_map": {"new": file}}))
        assert refused("--model", model, "hi").startswith(message)


def test_a_directory_that_holds_no_model(refused, model, tmp_path):
    assert (
        refused("--model", tmp_path / "absent", "hi")
        == f"{tmp_path / 'absent'}: no such model directory or file"
    )
    assert "cannot open the model (File name too long)" in refused("--model", "x" * 5000, "hi")
    (tmp_path / "empty").mkdir()
    assert refused("--model", tmp_path / "empty", "hi").startswith(
        f"{tmp_path / 'empty'}: the model directory is"
    )
    (model / "model.safetensors").unlink()
    assert refused("--model", model, "hi").startswith(
        f"{model}: no *.safetensors, pytorch_model*.bin, .ckpt or .gguf"
    )


def test_the_files_beside_the_weights(refused, model):
    edit_json(model / "config.json", hidden_size="wide")
    assert refused("--model", model, "hi").startswith(
        f"{model}/config.json: hidden_size is 'wide'; it must be"
    )
    shutil.copy(LLAMA / "config.json", model)
    for value in ("hot", -3):
        edit_json(model / "generation_config.json", temperature=value)
        line = refused("--model", model, "hi")
        assert line == (
            f"{model}/generation_config.json: temperature: got {value!r}, allowed a number from 0 to 100"
        )


def gguf(*, tensors=0, entries=()):
    content = b"".join(struct.pack("<Q", len(key)) + key + rest for key, rest in entries)
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(entries)) + content + bytes(64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "not a GGUF file"),
        (gguf(tensors=2**63), "tensor count: 9223372036854775808 is more than"),
        (gguf(entries=[(b"x", struct.pack("<IQ", 8, 2**61))]), "takes 2305843009213693952 bytes"),
        (gguf(entries=[(b"x", struct.pack("<IIQ", 9, 4, 2**61))]), "2305843009213693952 is more than"),
        (gguf(), "general.architecture is missing; it must be one of llama"),
    ],
)
def test_a_damaged_gguf_file(refused, tmp_path, content, message):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    line = refused("--model", file, "hi")
    assert line.startswith(f"{file}: ")
    assert message in line


def test_a_tensor_that_the_model_does_not_know_is_one_clean_line(predict, model):
    def add(table, data):
        table["foo"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        data += bytes(4)

    edit_header(model, add)
    code, _, err = predict("--model", model, "hi")
    assert code == 0
    warning, figures = err.splitlines()
    assert warning.startswith(f"llm-boost: warning: {model}: 1 tensors are not part of the model")
    assert figures.startswith("llm-boost: 2 prompt tokens")


# ---- configuration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            YAML.replace("LlmBoostConfig", "LlamaConfig"),
            "model.model_config.type: got 'LlamaConfig', allowed",
        ),
        (
            YAML + "    seq_lenght: 3\n",
            "model.model_config.seq_lenght: unknown key; did you mean 'seq_length'?",
        ),
        (YAML + "    seq_length: long\n", "model.model_config.seq_length: got 'long', allowed: an integer"),
        (YAML + "    block_size: 7\n", "model.model_config.block_size: got 7, allowed: a multiple of 16"),
        (YAML + "    block_size: 40\n", "model.model_config.block_size: got 40, allowed: a multiple of 16"),
        (YAML + "    hidden_size: 128\n", f"model.model_config.hidden_size is 128, but {LLAMA}/config.json"),
        (YAML + "    eos_token_id: 268\n", "model.model_config.eos_token_id is 268, but"),
        ("use_parallel: True\nparallel_config: {model_parallel: 4}\n" + YAML, "parallel_config: got 4 ranks"),
        (YAML + "    seq_length: 5000\n", "model.model_config.seq_length: got 5000, allowed 1 to 1024"),
        ("\t", "1: not valid YAML"),
    ],
)
def test_a_wrong_yaml_file(refused, tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    line = refused("--config_path", "c.yaml", "--model", LLAMA, "--save_file", "out.txt", "hi")
    assert line.startswith("c.yaml:")
    assert message in line
    assert not (tmp_path / "out.txt").exists()


def test_a_wrong_chat_template_of_a_yaml_file(refused, tmp_path):
    (tmp_path / "c.yaml").write_text(YAML + "processor: {tokenizer: {chat_template: '{% for'}}")
    line = refused("--config_path", "c.yaml", "--model", LLAMA, "--save_file", "out.txt", "--chat", "hi")
    assert line.startswith("c.yaml: processor.tokenizer.chat_template: ")


def test_notes_of_a_yaml_file_come_after_a_model_that_loads(predict, refused, tmp_path):
    (tmp_path / "c.yaml").write_text("resume_training: False\n" + YAML)
    refused("--config_path", "c.yaml", "--model", "absent", "hi")
    code, _, err = predict("--config_path", "c.yaml", "--model", LLAMA, "hi")
    assert code == 0
    assert "llm-boost: note: c.yaml: without effect here: resume_training\n" in err


def test_a_cache_of_keys_and_values_larger_than_memory(refused, tmp_path):
    (tmp_path / "c.yaml").write_text(YAML + "    num_blocks: 2000000000\n")
    line = refused("--config_path", "c.yaml", "--model", LLAMA, "hi")
    assert line.startswith(
        "c.yaml: model.model_config.num_blocks: got 2000000000, which take 18432.0 GB, allowed at most "
    )


def test_a_length_beyond_the_models(refused):
    line = refused("--model", LLAMA, "--seq_length", 5000, "hi")
    assert line.startswith(
        "--seq_length: got 5000, allowed 1 to 1024, the length that the model was made for"
    )


@pytest.mark.parametrize(
    "flag",
    ["--temperature=nan", "--top_p=0", "--top_k=-1", "--min_p=2", "--repetition_penalty=-1", "--seed=-1",
     "--max_new_tokens=0", "--threads=0", "--batch_size=0", "--stop=", "--dtype=float16"],
)  # fmt: skip
def test_an_impossible_value(refused, flag):
    name, _, value = flag.partition("=")
    line = refused("--model", LLAMA, flag, "hi")
    assert line.startswith(f"{name}: got ")
    assert value in line


def test_a_directory_without_config_json_takes_its_shape_from_the_yaml_file(
    predict, refused, model, tmp_path
):
    flags = ["--json", "--config_path", "c.yaml", "--model", model, "--save_file", "out.txt", "hi"]
    shapes = """    hidden_size: 64
    intermediate_size: 48
    num_layers: 2
    num_heads: 4
    n_kv_heads: 2
    vocab_size: 268
    rms_norm_eps: 1.0e-3
    eos_token_id: 258
    max_position_embedding: 1024
"""
    (tmp_path / "c.yaml").write_text(YAML + shapes)
    with_config = predict(*flags)[:2]
    (model / "config.json").unlink()
    assert predict(*flags)[:2] == with_config
    assert with_config[0] == 0
    (tmp_path / "c.yaml").write_text(YAML + shapes.replace("num_layers: 2", "num_layers: 3"))
    assert refused(*flags).startswith(
        f"{model}: tensor model.layers.2.self_attn.q_proj.weight [64, 64] is missing"
    )
    assert refused("--model", model, "hi").startswith(f"{model}: config.json is missing")


# ---- prompts


def test_a_prompt_longer_than_the_sequence_is_refused_before_any_runs(refused):
    for flags in ([], ["--stream"], ["--batch_size", "1", "--json"]):
        line = refused("--model", LLAMA, "--seq_length", 10, *flags, "fine", "word " * 20)
        assert line.startswith("prompt 2: 100 tokens, and seq_length (prompt and continuation) is 10: ")


def test_an_empty_prompt(refused):
    assert refused("--model", LLAMA, "x", "") == "prompt 2 is empty; give some text"


def test_prompts_that_are_not_utf8(refused, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert refused("--model", LLAMA, "--predict_file", "latin.txt") == "latin.txt: not UTF-8 text (byte 3)"
    assert refused("--model", LLAMA, os.fsdecode(b"caf\xe9")) == "prompt 1: not UTF-8 text (byte 3)"
    (tmp_path / "x.jsonl").write_text('\n{"prompt": "\\ud800"}')
    assert refused("--model", LLAMA, "--predict_file", "x.jsonl").startswith("x.jsonl:2: prompt: U+D800")
    (tmp_path / "x.jsonl").write_text('{"messages": [{"role": "user", "content": 5}]}')
    assert "x.jsonl:1: messages: content: got 5, allowed: text" in refused(
        "--model", LLAMA, "--predict_file", "x.jsonl"
    )


def test_a_chat_template_that_says_nothing(refused, model):
    (model / "chat_template.jinja").write_text("{{ messages[0].__class__ }}")
    assert refused("--model", model, "--chat", "hi").startswith("prompt 1: no tokens: ")
    (model / "chat_template.jinja").unlink()
    assert "has none; give one" in refused("--model", model, "--chat", "hi")


# ---- the disk


@pytest.mark.parametrize("cache", ["file", "file/below", "/proc/x", "/dev/null"])
def test_a_cache_that_cannot_be_written(run, tmp_path, cache):
    (tmp_path / "file").touch()
    for args in (["--cache_dir", cache], ["--cache_dir", cache, "--dtype", "int8"]):
        code, out, err = run("predict", "--model", LLAMA, *args, "hi")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"llm-boost: error: {cache}/packed: the cache directory cannot be written to (")


def spawn(*args, **options):
    command = [*COMMAND, *map(str, args)]
    return subprocess.run(
        command, capture_output=True, timeout=60, **{"stdin": subprocess.DEVNULL, **options}
    )


def test_a_full_disk(tmp_path):
    ran = spawn(
        "predict", "--model", LLAMA, "--cache_dir", tmp_path, "hi",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (2, b"")
    assert ran.stderr.startswith(f"llm-boost: error: {tmp_path}/packed: no space for llama-".encode())
    assert ran.stderr.count(b"\n") == 1
    assert [path.suffix for path in (tmp_path / "packed").iterdir()] == [".lock"]


def test_outputs_that_cannot_be_saved(run, tmp_path):
    flags = ["--model", LLAMA, "--cache_dir", tmp_path / "cache", "--max_new_tokens", 3, "--threads", 1]
    code, _, err = run("predict", *flags, "--save_file", "/dev/full", "hi")
    assert code == 2
    assert err == "llm-boost: error: --save_file: cannot write /dev/full: No space left on device\n"


# ---- streams


def test_a_closed_or_full_output(tmp_path):
    flags = ["--model", LLAMA, "--cache_dir", tmp_path, "--threads", "1", "--max_new_tokens", "3", "hi"]
    command = shlex.join([*COMMAND, "predict", *map(str, flags)])
    for redirection, code in [(">&-", 0), ("2>&-", 0), ("<&-", 0), (">/dev/full", 1)]:
        ran = subprocess.run(f"{command} {redirection}", shell=True, capture_output=True, timeout=60)
        assert ran.returncode == code, ran.stderr
        assert b"Traceback" not in ran.stderr
        assert ran.stderr.count(b"\n") == (redirection != "2>&-")
    assert b"No space left on device" in ran.stderr


def test_a_reader_that_leaves_early(tmp_path):
    command = [*COMMAND, "predict", "--model", LLAMA, "--cache_dir", tmp_path, "--threads", "1", "--json"]
    prompts = ["--ignore_eos", "--max_new_tokens", "900", "--batch_size", "1", *(["hello"] * 40)]
    process = subprocess.Popen([*map(str, command), *prompts], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert json.loads(process.stdout.readline())["index"] == 0
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 1


def test_control_c_while_text_is_made(tmp_path):
    command = [*COMMAND, "predict", "--model", LLAMA, "--cache_dir", tmp_path, "--threads", "1", "--stream"]
    prompts = ["--ignore_eos", "--max_new_tokens", "1000", *(["hello"] * 200)]
    process = subprocess.Popen(
        [*map(str, command), *prompts], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    )  # fmt: skip
    process.stdout.read(100)
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(60) == 130
    assert rest.endswith(b"\nllm-boost: error: interrupted\n")  # on a line of its own


def test_a_prompt_file_on_standard_input(tmp_path):
    flags = ["--model", LLAMA, "--cache_dir", tmp_path, "--threads", 1, "--max_new_tokens", 3, "--json"]
    ran = spawn("predict", *flags, "--predict_file", "-", stdin=None, input="帮我\n".encode())
    assert json.loads(ran.stdout)["prompt"] == "帮我"
    ran = spawn("predict", *flags, "--predict_file", "-", stdin=None, input=b"caf\xe9\n")
    assert (ran.returncode, ran.stderr) == (2, b"llm-boost: error: -: not UTF-8 text (byte 3)\n")


# ---- progress


def test_progress_shows_rate_and_time_left_on_a_terminal_only(monkeypatch, capsys):
    monkeypatch.setattr("llm_boost.cli.progress.PATIENCE_SECONDS", 0)
    with ProgressBar("packing weights") as progress:
        progress(1_000_000, 2_000_000)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar("packing weights") as progress:
        progress(1_000_000, 2_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    for shown in ("packing weights", "50%", "MB/s", "left"):
        assert shown in err


def test_packing_reports_its_progress_to_the_bar(predict, monkeypatch):
    calls = []
    monkeypatch.setattr(ProgressBar, "__call__", lambda self, done, total: calls.append((done, total)))
    for expected in (True, False):  # the second run finds the packed weights
        calls.clear()
        assert predict("--model", LLAMA, "hi")[0] == 0
        assert bool(calls) == expected
        assert all(0 < done <= total for done, total in calls)
