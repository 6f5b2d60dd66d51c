"""The folder of a quantisation that is not whole, `OUTPUT.unfinished`: its layers need not be done again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.fields import read_json_object, shown
from llm_boost.checkpoint.whole_file import disk_errors
from llm_boost.errors import CheckpointError, ConfigError
from llm_boost.quantize.calibrator import Resume

Bytes = NDArray[np.uint8]

_JOB, _LAYER, _TOKENS = "job.json", "layer.json", "tokens.npy"


class WorkFolder:
    """Keeps what has been done in `work/`; the model grows beside it, and `finish` gives it its name.

    Args:
        output: the folder that the model will be.
        job: all that the result depends on, plain JSON: only the same job is resumed.
        resume: go on where an interrupted run ended, if there was one.

    Raises:
        ConfigError: `output` exists, or an interrupted run is there and not to be resumed, or of another job.
    """

    def __init__(self, output: Path, job: Mapping[str, Any], resume: bool) -> None:
        self._output = output
        self.path = output.with_name(f"{output.name}.unfinished")
        self._work = self.path / "work"
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ConfigError(f"--output: {output} is there already; remove it, or name another folder")
        self._job = job
        if self.path.exists():
            self._check_same(resume)

    def begin(self, tokens: NDArray[np.int32] | None) -> None:
        """Makes the folder, if it is not there: from now on there is something to resume."""
        if self.path.exists():
            return
        with disk_errors(self.path, 0):
            self._work.mkdir(parents=True)
        if tokens is not None:
            self._save(_TOKENS, tokens)
        self._write(_JOB, json.dumps(self._job, indent=2, sort_keys=True).encode())

    def _check_same(self, resume: bool) -> None:
        if not resume:
            raise ConfigError(
                f"--output: {self.path} holds an interrupted run; --resume continues it, or remove it"
            )
        begun = read_json_object(self._work / _JOB)
        for key, value in json.loads(json.dumps(self._job)).items():
            if begun.get(key) != value:
                raise ConfigError(
                    f"--resume: {self.path} was begun with {key} {shown(begun.get(key))}, not "
                    f"{shown(value)}; give the same, or remove it"
                )

    def tokens(self) -> NDArray[np.int32] | None:
        """The calibration tokens of an interrupted run [sequences, length]."""
        tokens: NDArray[np.int32] | None = self._array(_TOKENS)
        return tokens

    def keep_matrix(self, name: str, packed: Bytes) -> None:
        self._save(f"{name}.npy", packed)

    def matrix(self, name: str) -> Bytes:
        """A matrix that was kept, mapped."""
        array: Bytes | None = self._array(f"{name}.npy")
        if array is None:
            raise CheckpointError(f"{self._work}: {name} is missing or damaged; remove {self.path}")
        return array

    def keep_layer(self, layer: Resume, matrices: list[str]) -> None:
        """Where to go on from: all of `matrices` are done, and the next operation reads this residual."""
        residual = f"residual-{layer.operations}.npy"
        self._save(residual, layer.residual)
        state = {"operations": layer.operations, "matrices": matrices, "residual": residual}
        self._write(_LAYER, json.dumps(state).encode())
        for old in self._work.glob("residual-*.npy"):
            if old.name != residual:
                old.unlink()

    def layer(self) -> tuple[Resume, list[str]] | None:
        """The last layer that was kept, and the matrices done before it."""
        if not (self._work / _LAYER).is_file():
            return None
        state = read_json_object(self._work / _LAYER)
        residual = self._array(str(state.get("residual")))
        if residual is None:
            raise CheckpointError(f"{self._work}: the last layer is damaged; remove {self.path}")
        return Resume(int(state["operations"]), residual), list(state["matrices"])

    def finish(self) -> None:
        """The model is whole: what was kept goes, and the folder takes its name."""
        with disk_errors(self._output, 0):
            shutil.rmtree(self._work)
            os.replace(self.path, self._output)

    def _array(self, name: str) -> Any:
        with contextlib.suppress(OSError, ValueError, EOFError):
            return np.load(self._work / name, mmap_mode="r", allow_pickle=False)
        return None

    def _save(self, name: str, array: NDArray[Any]) -> None:
        with self._written(name, array.nbytes) as path, path.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    def _write(self, name: str, data: bytes) -> None:
        with self._written(name, len(data)) as path:
            path.write_bytes(data)

    @contextlib.contextmanager
    def _written(self, name: str, size: int) -> Iterator[Path]:
        """A file under a temporary name, which takes its own when it is whole."""
        temporary = self._work / f"{name}.tmp"
        with disk_errors(self._work / name, size):
            yield temporary
            os.replace(temporary, self._work / name)
