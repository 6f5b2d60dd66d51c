"""`llm-boost serve` as a process: the seed page's config.json, signals, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from golden import model_dir

ROOT = Path(__file__).parents[2]
YAML = """
load_checkpoint: '{folder}/qwen2_7b_ckpt_dir'
use_parallel: False
parallel_config: {{model_parallel: 1}}
model:
  model_config:
    type: LlmBoostConfig
    llm_backend: BuildIn
    boost_model_name: Qwen
    auto_map:
      AutoModel: llm_boost.LlmBoostForCausalLM
      AutoTokenizer: [qwen2_tokenizer.Qwen2Tokenizer, null]
      AutoConfig: llm_boost_config.LlmBoostConfig
  arch: {{type: LlmBoostForCausalLM}}
"""


@contextlib.contextmanager
def served(*arguments: str, cache: Path, cwd: Path | None = None) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process, once it has said that it is ready, and the address of its business plane."""
    command = [sys.executable, "-m", "llm_boost.cli.main", "serve", *arguments, "--cache_dir", str(cache)]
    process = subprocess.Popen(
        [*command, "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        if line != "Daemon start success!\n":
            pytest.fail(f"{line}{process.stderr.read()}")
        notes = iter(process.stderr.readline, "")
        address = next(m[1] for note in notes if (m := re.search(r"(https?://\S+) \(business", note)))
        yield process, address
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def mindie_folder(tmp_path: Path) -> Path:
    """What the seed page's modelWeightPath holds; the Python files are there, and never run."""
    folder = tmp_path / "mf_model" / "qwen2_7b"
    folder.mkdir(parents=True)
    checkpoint = folder / "qwen2_7b_ckpt_dir"
    shutil.copytree(model_dir("qwen2"), checkpoint)
    shutil.copy(checkpoint / "config.json", folder)
    (folder / "predict_qwen2_7b_instruct_llm_boost.yaml").write_text(YAML.format(folder=folder))
    for name in ("qwen2_tokenizer.py", "llm_boost.py", "llm_boost_config.py"):
        (folder / name).write_text("raise SystemExit('code of a checkpoint was run')")
    return folder


def seed_config(folder: Path) -> dict:
    """The config.json of the page on llm_boost, unchanged but for its model path."""
    text = (Path(__file__).parent / "seed_config.json").read_text()
    config = json.loads(text)
    config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["modelWeightPath"] = str(folder)
    return config


PORTS = ("--port", "0", "--management_port", "0", "--metrics_port", "0")


def command_of_the_page(beginning: str) -> list[str]:
    """A command of docs/coming-from-mindformers-and-mindie.md, the one here that begins so."""
    page = (ROOT / "docs" / "coming-from-mindformers-and-mindie.md").read_text("utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(beginning)]
    return shlex.split(block.replace("\\\n", " "), comments=True)


def test_the_page_on_serving(tmp_path: Path, packed: Path) -> None:
    """The old page's config.json starts the service, and its curl gets its answer."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(seed_config(mindie_folder(tmp_path))))
    program, *arguments = command_of_the_page("llm-boost serve --config")
    assert program == "llm-boost"
    arguments = [str(path) if word == "config.json" else word for word in arguments[1:3]]
    with served(*arguments, *PORTS, cache=packed) as (process, address):
        curl = command_of_the_page("curl -w")
        assert curl[-1] == "http://127.0.0.1:1025/generate"
        content = curl[curl.index("-d") + 1]
        if shutil.which("curl"):
            curl[-1] = f"{address}/generate"
            answer = subprocess.run(curl, capture_output=True, text=True, check=True).stdout
            assert json.loads(answer.splitlines()[0])["generated_text"]
            assert answer.splitlines()[-1].startswith("time_total=")
        assert list(httpx.post(f"{address}/generate", content=content).json()) == ["generated_text"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_the_page_on_predicting(tmp_path: Path, packed: Path) -> None:
    folder = mindie_folder(tmp_path)
    names = {
        "llm-boost": [sys.executable, "-m", "llm_boost.cli.main"],
        "./predict_qwen2_7b_instruct_llm_boost.yaml": [str(next(folder.glob("*.yaml")))],
        "/path/model_dir": [str(folder / "qwen2_7b_ckpt_dir")],
    }
    words = command_of_the_page("llm-boost predict \\\n  --predict_data")
    command = [part for word in words for part in names.get(word, [word])]
    command += ["--max_new_tokens", "4", "--cache_dir", str(packed)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert result.stdout.count("帮我制定一份去上海的旅游攻略") == 4  # --batch_size 4


def test_sigterm_drains_and_a_second_one_ends_at_once(packed: Path) -> None:
    body = {"prompt": "hello", "max_tokens": 900, "ignore_eos": True, "stream": True}
    for signals in (1, 2):
        model = str(model_dir("qwen2"))
        with served(model, "--port", "0", cache=packed) as (process, address):
            with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=30) as answer:
                chunks = answer.iter_raw()
                next(chunks)
                process.send_signal(signal.SIGTERM)
                if signals == 2:
                    time.sleep(0.02)
                    process.send_signal(signal.SIGTERM)
                    assert process.wait(5) in (0, 1)
                    continue
                assert b"".join(chunks).endswith(b"data: [DONE]\n\n")
            assert process.wait(20) == 0


def run(*arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llm_boost.cli.main", "serve", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **(environ or {})}
    )


def test_what_stands_in_the_way_is_one_line_and_exit_code_2(tmp_path: Path, packed: Path) -> None:
    config = seed_config(mindie_folder(tmp_path))
    config["ServerConfig"]["port"] = 80
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    wrong = run(environ={"MIES_CONFIG_JSON_PATH": str(path)})
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == (
        f"llm-boost: error: {path}: ServerConfig.port: got 80, allowed: greater than or equal to 1024"
    )
    missing = run("no-such-model", "--port", "0", "--cache_dir", str(packed))
    assert missing.returncode == 2
    assert "no-such-model" in missing.stderr.splitlines()[-1]


def test_a_port_that_is_taken(packed: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run(str(model_dir("qwen2")), "--port", str(port), "--cache_dir", str(packed))
    assert result.returncode == 2
    assert f"127.0.0.1:{port} (business, management, metrics): cannot listen there" in result.stderr
