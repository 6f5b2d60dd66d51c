"""Reads one pytorch_model*.bin or consolidated.*.pth: with torch's weights-only loader, that runs no code."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.fields import shown
from llm_boost.errors import CheckpointError

_LIBC = ctypes.CDLL(None)


class TorchFile:
    """A memory-mapped state dict; CheckpointError without torch, or for anything but a dict of tensors."""

    def __init__(self, path: Path) -> None:
        try:
            import torch
        except ImportError:
            raise CheckpointError(
                f"{path}: reading {path.suffix} weights needs torch; install it, or use "
                "the model's safetensors"
            ) from None
        self.path = path
        self._torch: Any = torch
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises errors of many kinds for a damaged or unsafe file
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{path}: torch refuses the file ({shown(first_line, 200)})") from None
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
        ):
            raise CheckpointError(f"{path}: must hold a dict of tensors, holds {type(state).__name__}")
        self._state: dict[str, Any] = state
        self._infos = {
            name: TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in state.items()
        }

    def infos(self) -> dict[str, TensorInfo]:
        """The tensors by name."""
        return self._infos

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as numpy has it."""
        return self._numpy(self._state[name])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of the first dimension."""
        return self._numpy(self._state[name][start:stop])

    def forget(self) -> None:
        """See Checkpoint.forget."""
        for tensor in self._state.values():
            storage = tensor.untyped_storage()
            _drop_pages(storage.data_ptr(), storage.nbytes())

    def close(self) -> None:
        """Lets go of the file; arrays already read stay valid."""
        self._state = {}

    def _numpy(self, tensor: Any) -> NDArray[Any]:
        tensor = tensor.detach().contiguous()
        if tensor.dtype == self._torch.bfloat16:  # numpy has none of its own
            bits: NDArray[np.int16] = tensor.view(self._torch.int16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        array: NDArray[Any] = tensor.numpy()
        return array


def _drop_pages(address: int, size: int) -> None:
    """Takes the pages of a file's map, which nobody wrote to, out of memory: torch has no word for that."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0:
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), ctypes.c_int(mmap.MADV_DONTNEED))
