"""`llm-boost convert` and `inspect`: MindFormers' command line, every target, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from golden import GOLDEN_MODELS, load_golden, model_dir
from llm_boost import LLM, SamplingParams
from llm_boost.checkpoint import open_checkpoint
from llm_boost.checkpoint.mindspore_ckpt import MindSporeFile


def greedy(model: Path, tmp_path: Path, name: str, dtype: str = "float32") -> list[int]:
    llm = LLM(model=model, dtype=dtype, threads=1, cache_dir=tmp_path / "cache", max_model_len=512)
    prompt = {"prompt_token_ids": load_golden(name, 17).prompt}
    output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=32, ignore_eos=True))
    return list(output[0].outputs[0].token_ids)


def listing(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_the_original_command(run, tmp_path):
    """As in MindFormers: the name needs no suffix, which is added."""
    code, out, err = run(
        "convert", "--model", "llama", "--input_path", model_dir("llama"), "--output_path",
        tmp_path / "path" / "MS_CKPT_NAME", "--dtype", "bf16",
    )  # fmt: skip
    path = tmp_path / "path" / "MS_CKPT_NAME.ckpt"
    assert (code, out) == (0, f"{path}\n"), err
    assert "mindspore-ckpt: 21 tensors" in err
    file = MindSporeFile(path)
    assert file.infos()["model.layers.1.attention.wq.weight"].dtype == "bfloat16"
    assert file.infos()["model.tok_embeddings.embedding_weight"].shape == (268, 64)
    assert {"config.json", "tokenizer.json"} < set(listing(path.parent))
    assert not [name for name in listing(path.parent) if name.endswith(".tmp")]
    code, out, _ = run(
        "convert", "--model", "llama", "--reversed", "--input_path", path, "--output_path", tmp_path / "back"
    )
    assert (code, out) == (0, f"{tmp_path / 'back'}\n")
    assert run("inspect", "--diff", model_dir("llama"), tmp_path / "back")[0] == 0


@pytest.mark.parametrize("to", ["hf", "mindspore-ckpt", "mindspore-safetensors", "gguf"])
@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_the_engine_reads_every_target(run, tmp_path, name, to):
    code, out, err = run(
        "convert", "--input_path", model_dir(name), "--output_path", tmp_path / "out" / "m", "--to", to,
        "--dtype", "fp32",
    )  # fmt: skip
    assert code == 0, err
    assert greedy(Path(out.strip()), tmp_path, name) == load_golden(name, 17).greedy


@pytest.mark.parametrize("name", GOLDEN_MODELS)
@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_packed_weights_load_as_they_are(run, tmp_path, name, dtype):
    folder = tmp_path / "packed"
    code, out, err = run(
        "convert",
        "--input_path",
        model_dir(name),
        "--to",
        "packed",
        "--output_path",
        folder,
        "--dtype",
        dtype,
    )
    assert (code, out) == (0, f"{folder}\n"), err
    long_name = {"fp32": "float32", "int4": "int4"}[dtype]
    expected = greedy(model_dir(name), tmp_path, name, long_name)
    shutil.rmtree(tmp_path / "cache")
    for path in (folder, folder / "weights.packed"):
        assert greedy(path, tmp_path, name, "auto") == expected
    assert not (tmp_path / "cache").exists()  # nothing was packed again
    code, _, err = run("predict", "--model", folder, "--dtype", "bf16", "x")
    assert code == 2
    assert f"but the weights are packed as {long_name}" in err
    code, out, _ = run("inspect", folder, "--json")
    assert (code, json.loads(out)["format"]) == (0, "packed")
    code, _, err = run("convert", "--input_path", folder, "--output_path", tmp_path / "x")
    assert code == 2
    assert "packed weights are for the engine alone" in err


def test_packed_weights_of_another_version_are_refused(run, tmp_path):
    from llm_boost.checkpoint.packed import MANIFEST
    from llm_boost.checkpoint.safetensors_reader import SafetensorsFile

    run("convert", "--input_path", model_dir("qwen2"), "--to", "packed", "--output_path", tmp_path / "p")
    path = tmp_path / "p" / "weights.packed"
    metadata = dict(SafetensorsFile(path).metadata)
    metadata[MANIFEST] = metadata[MANIFEST].replace('"format": "bfloat16"', '"format": "bfloat17"')
    save_file(load_file(path), path, metadata)
    code, _, err = run("predict", "--model", tmp_path / "p", "x")
    assert code == 2
    assert "packed by another version of llm-boost" in err


def test_quantised_gguf_and_what_it_costs(run, tmp_path):
    source = model_dir("qwen2")
    for kind, bound in (("Q8_0", 0.01), ("Q4_0", 0.2)):
        path = tmp_path / f"{kind}.gguf"
        code, _, err = run("convert", "--input_path", source, "--output_path", path, "--gguf_type", kind)
        assert code == 0, err
        there, before = open_checkpoint(path), open_checkpoint(source)
        for name, info in there.tensors.items():
            array = before.read(name).astype(np.float32)
            matrix = len(info.shape) == 2 and info.shape[1] % 32 == 0
            head = name in ("lm_head.weight", "model.embed_tokens.weight") and kind == "Q4_0"
            if matrix:
                assert info.dtype in ((kind, "Q8_0") if head else (kind,))
            else:
                assert info.dtype == ("F16" if len(info.shape) == 2 else "float32").replace("F16", "float16")
            assert np.abs(there.read(name) - array).max() <= bound * np.abs(array).max()


def test_concatenated_in_rank_folders(run, tmp_path):
    """Each rank's share on its own, as MindFormers' --qkv_concat does it."""
    from llm_boost.checkpoint.mindspore_ckpt import write_ckpt
    from llm_boost.checkpoint.safetensors_writer import TensorSpec

    rng = np.random.default_rng(0)
    shares = []
    for rank in range(2):  # of 4 query heads and 2 key heads of 4: two and one
        parts = {"wq": (8, 16), "wk": (4, 16), "wv": (4, 16)}
        stem = "model.layers.0.attention."
        arrays = {f"{stem}{part}.weight": rng.standard_normal(shape) for part, shape in parts.items()}
        tensors = {name: array.astype(np.float32) for name, array in arrays.items()}
        (tmp_path / "in" / f"rank_{rank}").mkdir(parents=True)
        write_ckpt(
            tmp_path / "in" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt",
            [TensorSpec(name, "F32", array.shape) for name, array in tensors.items()],
            iter(tensors.items()),
        )
        shares.append(tensors)
    config = json.loads((model_dir("qwen2") / "config.json").read_text())
    config |= {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = run(
        "convert", "--input_path", tmp_path / "in", "--output_path", tmp_path / "out", "--qkv_concat", "true",
        "--config_path", tmp_path / "config.json",
    )  # fmt: skip
    assert code == 0, err
    for rank, tensors in enumerate(shares):
        file = MindSporeFile(tmp_path / "out" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
        q, k, v = tensors.values()
        np.testing.assert_array_equal(
            file.read("model.layers.0.attention.w_qkv.weight"), np.concatenate([q, k, v])
        )


def test_a_lora_adapter_there_and_back(run, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    stem = "base_model.model.model.layers.0.self_attn."
    rng = np.random.default_rng(0)
    tensors = {
        f"{stem}{part}.lora_{side}.weight": rng.standard_normal((4, 8)).astype(np.float16)
        for part in ("q_proj", "v_proj")
        for side in "AB"
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    code, out, err = run(
        "convert", "--model", "qwen2_5", "--is_lora", "true", "--input_path", folder, "--output_path",
        tmp_path / "ms" / "lora",
    )  # fmt: skip
    assert code == 0, err
    assert set(MindSporeFile(Path(out.strip())).infos()) == {
        f"model.layers.0.attention.{part}.lora_{side}" for part in ("wq", "wv") for side in "ab"
    }
    written = json.loads((tmp_path / "ms" / "adapter_config.json").read_text())
    assert written == config | {"target_modules": ["wq", "wv"]}
    assert json.loads((folder / "adapter_config.json").read_text()) == config
    code, out, err = run(
        "convert", "--is_lora", "--reversed", "--input_path", out.strip(), "--output_path", tmp_path / "back"
    )
    assert code == 0, err
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert {name: array.tobytes() for name, array in back.items()} == {
        n: a.tobytes() for n, a in tensors.items()
    }
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text()) == config


def changed(folder: Path, **tensors: np.ndarray | None) -> Path:
    """The tiny llama with some tensors replaced, or left out."""
    shutil.copytree(model_dir("llama"), folder)
    whole = {**load_file(folder / "model.safetensors"), **tensors}
    save_file(
        {name: array for name, array in whole.items() if array is not None}, folder / "model.safetensors"
    )
    return folder


def test_what_is_wrong_ends_in_one_line_and_nothing_written(run, tmp_path):
    source, out = model_dir("llama"), tmp_path / "work" / "out"
    out.parent.mkdir()
    norm = "model.layers.0.input_layernorm.weight"
    big = np.full((64,), 70000, np.float32)
    no_number = np.full((268, 64), np.nan, np.float32)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (["--model", "lama"], "--model: got 'lama', allowed: llama, mistral"),
        (["--model", "qwen2"], "--model: got qwen2, but"),
        (["--dtype", "fp8"], "--dtype: got 'fp8', allowed for mindspore-ckpt: fp32, float32, bf16"),
        (["--to", "packed", "--dtype", "fp16"], "--dtype: got 'fp16', allowed for packed: fp32, bf16"),
        (["--from", "gguf"], "--from says gguf, but the content is hf"),
        (["--reversed", "--to", "gguf"], "--reversed: means --to hf, and --to is gguf"),
        (["--gguf_type", "Q8_0"], "--gguf_type: is for --to gguf, the target is mindspore-ckpt"),
        (["--to", "gguf", "--gguf_type", "Q8_0", "--dtype", "bf16"], "--gguf_type and --dtype: give one"),
        (["--to", "hf", "--max_shard_size", "5 apples"], "--max_shard_size: got '5 apples'"),
        (["--max_shard_size", "1GB"], "--max_shard_size: is for --to hf, the target is mindspore-ckpt"),
        (["--to", "hf", "--threads", "2"], "--threads: is for --to packed, the target is hf"),
        (["--is_lora", "--from", "hf"], "--is_lora: of an adapter --model, --dtype and --reversed"),
        (["--to", "hf", "--output_path", tmp_path / "full"], "is there and not empty"),
        (["--to", "hf", "--output_path", tmp_path / "m.bin"], "is a file's name; hf output is a folder"),
        (["--input_path", tmp_path / "empty"], "the directory is empty"),
        (["--input_path", tmp_path / "none"], "No such file or directory"),
        (["--input_path", changed(tmp_path / "missing", **{norm: None})], f"tensor {norm} [64] is missing"),
        (["--input_path", changed(tmp_path / "shape", **{norm: big[:5]})], "has shape [5]"),
        (["--input_path", changed(tmp_path / "int", **{norm: big.astype(np.int32)})], f"'{norm}' is int32"),
        (
            ["--input_path", changed(tmp_path / "unknown", extra=big), "--to", "mindspore-ckpt"],
            "tensor 'extra': MindFormers has no such parameter",
        ),
        (
            ["--input_path", changed(tmp_path / "big", **{norm: big}), "--dtype", "fp16"],
            f"tensor {norm}: 64 values, up to 70000, are beyond float16",
        ),
        (
            ["--input_path", changed(tmp_path / "nan", **{"lm_head.weight": no_number}),
             "--to", "gguf", "--gguf_type", "Q8_0"],
            "holds values that are not finite numbers, which Q8_0 cannot",
        ),
    ]:  # fmt: skip
        code, stdout, err = run("convert", "--input_path", source, "--output_path", out, *arguments)
        assert (code, stdout) == (2, ""), (arguments, err)
        lines = [line for line in err.splitlines() if "warning:" not in line]
        assert len(lines) == 1, err
        assert message in lines[0]
        assert listing(out.parent) == [], arguments
    assert (tmp_path / "full" / "x").read_text() == "mine"


def test_the_source_is_not_overwritten(run, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(model_dir("llama"), source)
    before = (source / "model.safetensors").read_bytes()
    for output in (source / "model.safetensors", source):
        code, _, err = (
            run("convert", "--input_path", source, "--output_path", output, "--to", "mindspore-safetensors")
            if output != source
            else run("convert", "--input_path", source, "--output_path", output, "--to", "hf")
        )
        assert code == 2, err
    assert (source / "model.safetensors").read_bytes() == before


def test_a_full_disk_is_found_before_anything_is_written(run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for to in ("hf", "mindspore-ckpt", "gguf", "packed"):
        code, _, err = run(
            "convert", "--input_path", model_dir("llama"), "--output_path", tmp_path / "out" / "m", "--to", to
        )
        assert code == 2
        assert "no space for m" in err
        assert "are available" in err
        assert listing(tmp_path / "out") == []


def test_a_disk_that_loses_bytes_is_noticed(run, tmp_path, monkeypatch):
    from llm_boost.checkpoint.whole_file import FileWriter

    write = FileWriter.write

    def lossy(self, data):
        if len(data) > 5000:
            data = bytes(data[:4000]) + b"?" + bytes(data[4001:])
        write(self, data)

    monkeypatch.setattr(FileWriter, "write", lossy)
    for to in ("hf", "mindspore-ckpt", "mindspore-safetensors", "gguf"):
        code, _, err = run(
            "convert", "--input_path", model_dir("llama"), "--output_path", tmp_path / "out" / "m", "--to", to
        )
        assert code == 1
        assert "reads back differently than it was written" in err
        assert listing(tmp_path / "out") == []


def test_a_killed_conversion_leaves_nothing_that_looks_whole(tmp_path):
    """Killed in the middle of the writing: temporary names alone are left, and the next run removes them."""
    script = (
        "import os, signal, sys\n"
        "from llm_boost.checkpoint.whole_file import FileWriter\n"
        "write = FileWriter.write\n"
        "def dying(self, data):\n"
        "    write(self, data)\n"
        "    if self.at > 50_000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "FileWriter.write = dying\n"
        "from llm_boost.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    for to, name in (("hf", "folder"), ("mindspore-ckpt", "m.ckpt")):
        out = tmp_path / to
        out.mkdir()
        arguments = ["convert", "--input_path", str(model_dir("llama")), "--output_path", str(out / name)]
        killed = subprocess.run([sys.executable, "-c", script, *arguments, "--to", to], env=os.environ)
        assert killed.returncode == -9
        assert all(".tmp" in name for name in listing(out))
        assert listing(out)
        again = subprocess.run([sys.executable, "-m", "llm_boost.cli.main", *arguments, "--to", to])
        assert again.returncode == 0
        assert (out / name).exists()
        assert not [name for name in listing(out) if name.endswith(".tmp")]


def test_json_and_inspect(run, tmp_path):
    code, out, _ = run(
        "convert",
        "--input_path",
        model_dir("qwen3"),
        "--output_path",
        tmp_path / "m.gguf",
        "--json",
        "--dtype",
        "bf16",
    )
    result = json.loads(out)
    assert code == 0
    assert (result["format"], result["dtype"], result["path"]) == ("gguf", "BF16", str(tmp_path / "m.gguf"))
    code, out, _ = run("inspect", tmp_path / "m.gguf", "--json", "--tensors", "--check")
    found = json.loads(out)
    assert code == 0
    assert found["architecture"] == "Qwen3ForCausalLM"
    assert found["problems"] == []
    assert found["parameters"] == sum(np.prod(row["shape"]) for row in found["tensor_table"])
    assert {row["dtype"] for row in found["tensor_table"]} == {"bfloat16", "float32"}
    code, out, _ = run("inspect", model_dir("qwen3"), "--tensors")
    assert code == 0
    assert "Qwen3ForCausalLM" in out
    assert "model.layers.0.self_attn.q_norm.weight" in out


def test_inspect_finds_what_is_wrong(run, tmp_path):
    broken = load_file(model_dir("llama") / "model.safetensors")["model.norm.weight"].copy()
    broken[3] = np.nan
    folder = changed(tmp_path / "nan", **{"model.norm.weight": broken})
    assert run("inspect", folder)[0] == 0
    code, out, _ = run("inspect", folder, "--check")
    assert code == 1
    assert "tensor model.norm.weight: 1 of 64 values are not finite numbers" in out
    shutil.copy(Path(__file__).parent.parent / "goldens" / "mindspore" / "crc.ckpt", tmp_path / "crc.ckpt")
    assert run("inspect", tmp_path / "crc.ckpt", "--check")[0] == 0
    data = bytearray((tmp_path / "crc.ckpt").read_bytes())
    data[60] ^= 1
    (tmp_path / "crc.ckpt").write_bytes(data)
    code, out, _ = run("inspect", tmp_path / "crc.ckpt", "--check")
    assert code == 1
    assert "do not have the checksum that stands at its end" in out
    code, _, err = run("inspect")
    assert code == 2
    assert "give one PATH, or --diff A B" in err
    code, _, err = run("inspect", tmp_path / "nothing")
    assert code == 2


def test_files_are_checked_against_a_manifest(run, tmp_path):
    import hashlib

    folder = tmp_path / "m"
    shutil.copytree(model_dir("mistral"), folder)
    files = sorted(folder.glob("*.safetensors"))
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files]
    manifest = tmp_path / "SHA256SUMS"
    manifest.write_text("\n".join(lines) + "\n")
    assert run("inspect", folder, "--manifest", manifest)[0] == 0
    data = bytearray(files[1].read_bytes())
    data[-1] ^= 1
    files[1].write_bytes(data)
    manifest.write_text("\n".join([*lines[:2], f"{'0' * 64}  other.safetensors"]))
    code, out, _ = run("inspect", folder, "--manifest", manifest)
    assert code == 1
    for problem in (
        f"{files[1].name}: its SHA-256 is",
        f"{files[2].name}: is not in",
        "other.safetensors: is missing",
    ):
        assert problem in out
    manifest.write_text("hello\n")
    code, _, err = run("inspect", folder, "--manifest", manifest)
    assert code == 2
    assert "line 1 is no line of sha256sum" in err


def test_diff_tells_how_much(run, tmp_path):
    weight = load_file(model_dir("llama") / "model.safetensors")["model.norm.weight"].copy()
    weight[3] += 0.5
    other = changed(
        tmp_path / "other", **{"model.norm.weight": weight, "lm_head.weight": None, "extra": weight[:4]}
    )
    code, out, _ = run("inspect", "--diff", model_dir("llama"), other)
    assert code == 1
    assert "model.norm.weight: values: 1 of 64 values differ, by at most 0.5 and 0.00781 in the mean" in out
    assert f"lm_head.weight is not in {other}" in out
    assert f"extra is not in {model_dir('llama')}" in out
    code, out, _ = run("inspect", "--diff", model_dir("llama"), other, "--json")
    found = json.loads(out)
    assert (code, found["equal"]) == (1, False)
    assert {row["kind"] for row in found["differences"]} == {"values", "missing"}
    code, out, _ = run("inspect", "--diff", model_dir("llama"), model_dir("qwen2"))
    assert code == 1
    code, out, _ = run("inspect", "--diff", model_dir("llama"), model_dir("llama3"))
    assert code == 1
    assert "shape: [48, 64] and [40, 80]" in out
