"""A GGUF file that llama.cpp loads: its names, its order of rows, its metadata, its blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.casting import cast
from llm_boost.checkpoint.checkpoint import Checkpoint, TensorInfo
from llm_boost.checkpoint.fields import shown
from llm_boost.checkpoint.gguf_checkpoint import ROPE_FACTORS, gguf_name, to_neighbour_rotation
from llm_boost.checkpoint.gguf_quantize import quantize
from llm_boost.checkpoint.gguf_quants import BLOCK_TYPES
from llm_boost.checkpoint.gguf_reader import FLOAT_TYPES, GGUFFile
from llm_boost.checkpoint.gguf_writer import GGUFSpec, write_gguf
from llm_boost.convert.gguf_metadata import rope_factors
from llm_boost.convert.progress import Steps
from llm_boost.convert.source import Source
from llm_boost.convert.tensors import OutTensor, Rows, row_chunks
from llm_boost.convert.verify import Checksums
from llm_boost.errors import CheckpointError
from llm_boost.models.config import expected_tensors

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


def plan(source: Source, kind: str) -> list[OutTensor[GGUFSpec]]:
    """The model's tensors with linears and embeddings in `kind`; a copy of a tied head is left out.

    Vectors are F32, as llama.cpp wants them. In a Q4_0 model the head, or the embedding that serves as one,
    is Q8_0, since its error shows the most. A matrix whose rows are no whole blocks is F16.
    """
    checkpoint, expected = source.checkpoint, expected_tensors(source.model)
    tensors = []
    for name, shape in expected.items():
        target = gguf_name(name)
        if target is None:
            raise CheckpointError(f"{source.path}: tensor {shown(name)}: llama.cpp has no such tensor")
        spec = GGUFSpec(target, _type(name, shape, kind, source.model.tie_word_embeddings), shape)
        heads = _heads(source, name)
        tensors.append(OutTensor(spec, _Rows(checkpoint, name, spec.type, shape[0] // heads if heads else 0)))
    factors = rope_factors(source.model)
    if factors is not None:
        tensors.append(OutTensor(GGUFSpec(ROPE_FACTORS, "F32", factors.shape), lambda: iter([factors])))
    return tensors


def write(
    path: Path, metadata: Mapping[str, Any], tensors: Sequence[OutTensor[GGUFSpec]], steps: Steps
) -> int:
    """Writes the file, verified; returns the bytes of its tensors."""
    specs = [tensor.spec for tensor in tensors]
    sums = Checksums()
    write_gguf(
        path,
        metadata,
        specs,
        sums.outgoing(tensors),
        steps.writing,
        lambda file: sums.check(file, _RawFile(file), steps.verifying),
    )
    steps.finish_file()
    return sum(spec.nbytes for spec in specs)


def _type(name: str, shape: tuple[int, ...], kind: str, tied: bool) -> str:
    if len(shape) == 1:
        return "F32"
    if kind == "Q4_0" and name in ("lm_head.weight", *(["model.embed_tokens.weight"] if tied else [])):
        kind = "Q8_0"
    return "F16" if kind in BLOCK_TYPES and shape[-1] % BLOCK_TYPES[kind].size else kind


def _heads(source: Source, name: str) -> int:
    """Heads of a tensor whose rows llama.cpp wants in neighbouring pairs; 0 for all others."""
    if source.model_type not in ("llama", "mistral"):
        return 0
    match = re.search(r"\.self_attn\.([qk])_proj\.", name)
    if match is None:
        return 0
    return source.model.num_heads if match[1] == "q" else source.model.num_kv_heads


class _Rows:
    """A tensor's rows as the file has them: re-ordered by `head_rows` (0: not), then cast or quantised."""

    def __init__(self, checkpoint: Checkpoint, name: str, kind: str, head_rows: int) -> None:
        self._checkpoint, self._name, self._kind, self._head_rows = checkpoint, name, kind, head_rows

    def __call__(self) -> Rows:
        where = f"{self._checkpoint.path}: tensor {self._name}"
        for chunk in row_chunks(self._checkpoint, self._name, self._head_rows or 1):
            if self._head_rows:
                chunk = to_neighbour_rotation(chunk, self._head_rows)
            if self._kind in FLOAT_TYPES:
                yield cast(chunk, FLOAT_TYPES[self._kind], where)
            else:
                yield _blocks(chunk, self._kind, where)


def _blocks(chunk: NDArray[Any], kind: str, where: str) -> NDArray[np.uint8]:
    wide = cast(chunk, np.dtype(np.float32), where)
    if not np.isfinite(wide).all():
        raise CheckpointError(f"{where}: holds values that are not finite numbers, which {kind} cannot")
    return quantize(wide, kind)


class _RawFile:
    """A GGUF file's tensors as the bytes that are written, for `Checksums.check`."""

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)

    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(name, t.shape, t.type) for name, t in self._file.tensors.items()}

    def read(self, name: str) -> NDArray[np.uint8]:
        return self.read_rows(name, 0, self._file.tensors[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        return self._file.raw_rows(name, start, stop)

    def forget(self) -> None:
        self._file.forget()

    def close(self) -> None:
        self._file.close()
