"""Linears that AutoGPTQ, GPTQModel or AutoAWQ has quantised, dequantised exactly.

A linear of K inputs and N outputs is `qweight` and `qzeros` (int32, several values in each), `scales`
[groups, N] in floating point and, for GPTQ, `g_idx` [K], each input's group: weight = scale * (value - zero).

- GPTQ: qweight [K * bits / 32, N] holds neighbouring inputs, qzeros [groups, N * bits / 32] neighbouring
  outputs, lowest bits first. Format "gptq" stores zero points less one, "gptq_v2" as they are.
- AWQ ("gemm", 4 bits): qweight [K, N / 8], qzeros [groups, N / 8]; nibble i of a word is output
  0, 2, 4, 6, 1, 3, 5, 7 of its eight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.fields import Fields, shown
from llm_boost.errors import CheckpointError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = ("qweight", "qzeros", "scales", "g_idx")

Ints = NDArray[np.uint32]
Read = Callable[[str], NDArray[Any]]  # a tensor by name, in the type that it is stored in


@dataclass(frozen=True)
class GroupQuantization:
    """A checkpoint's `quantization_config`, as far as it says how weights are stored."""

    method: str  # gptq | awq
    bits: int
    group_size: int  # inputs that share a scale; -1: all
    zero_offset: int  # what is added to a stored zero point

    @property
    def dtype(self) -> str:
        """A TensorInfo's."""
        return f"{self.method}-int{self.bits}"

    @property
    def per_word(self) -> int:
        return 32 // self.bits


def read_quantization(config: Mapping[str, Any], source: str) -> GroupQuantization | None:
    """`quantization_config` of a config.json; None without one.

    Raises:
        CheckpointError: another method, or a variant of these two that is stored in another way.
    """
    if config.get("quantization_config") is None:
        return None
    given = config["quantization_config"]
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{source}: quantization_config is {shown(given)}; it must be an object")
    fields = Fields(given, f"{source}: quantization_config")
    method = fields.text("quant_method", "gptq" if "desc_act" in given else "")
    if method not in ("gptq", "awq"):
        raise fields.error("quant_method", '"gptq" or "awq"; give the unquantised model, or it as GGUF')
    bits = fields.integer("bits", 1, 64)
    if bits not in ((4, 8) if method == "gptq" else (4,)):
        raise fields.error("bits", "4 or 8" if method == "gptq" else "4")
    group_size = fields.integer("group_size", -1, 1 << 20, 128)
    if group_size == 0:
        raise fields.error("group_size", "-1 (all inputs) or at least 1")
    if method == "awq":
        if fields.text("version", "gemm").lower() != "gemm":
            raise fields.error("version", '"gemm"')
        return GroupQuantization(method, bits, group_size, 0)
    layout = fields.text("checkpoint_format", "gptq")
    if fields.flag("is_marlin_format", False):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        raise fields.error("checkpoint_format", '"gptq" or "gptq_v2": the others are shuffled for one kernel')
    if fields.get("dynamic"):
        raise fields.error("dynamic", "absent: modules with settings of their own are not supported")
    return GroupQuantization(method, bits, group_size, 1 if layout == "gptq" else 0)


class Files(Protocol):
    """What holds the tensors: see WeightFiles."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def stored(self, name: str) -> NDArray[Any]: ...


class QuantizedLinears:
    """The quantised linears of a checkpoint, as weights [N, K] by name."""

    def __init__(self, files: Files, quantization: GroupQuantization, path: object) -> None:
        self._files, self._q, self._path = files, quantization, path
        self.tensors = {
            f"{stem}.weight": TensorInfo(f"{stem}.weight", self._shape(stem), quantization.dtype)
            for name in files.tensors
            if (stem := name.removesuffix(".qweight")) != name
        }
        if not self.tensors:
            raise CheckpointError(
                f"{path}: config.json says {quantization.dtype}, but there is no tensor *.qweight"
            )

    def others(self) -> dict[str, TensorInfo]:
        """The tensors that are no part of a quantised linear.

        AutoGPTQ writes a bias of zeros for linears without one; those are left out.
        """
        stems = {name.removesuffix(".weight") for name in self.tensors}
        others = {
            name: info
            for name, info in self._files.tensors.items()
            if not (name.rpartition(".")[2] in PARTS and name.rpartition(".")[0] in stems)
        }
        biases = [f"{stem}.bias" for stem in stems if f"{stem}.bias" in others]
        for kind in {_kind(bias) for bias in biases}:
            of_kind = [bias for bias in biases if _kind(bias) == kind]
            if not any(np.any(self._files.stored(bias)) for bias in of_kind):
                for bias in of_kind:
                    del others[bias]
        return others

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Outputs [start, stop) of a weight, float32 [stop - start, K]."""
        stem, q = name.removesuffix(".weight"), self._q
        inputs = self.tensors[name].shape[1]
        group = self._groups(stem, inputs)
        scales = self._files.stored(f"{stem}.scales")[:, start:stop].astype(np.float32)
        if q.method == "awq":
            first, last = start // 8, -(-stop // 8)
            here = slice(start - 8 * first, stop - 8 * first)
            values = _awq(self._words(stem, "qweight")[:, first:last])[:, here]
            zeros = _awq(self._words(stem, "qzeros")[:, first:last])[:, here]
        else:
            packed = np.ascontiguousarray(self._words(stem, "qweight")[:, start:stop])
            values = _unpacked(packed, q.bits).swapaxes(1, 2).reshape(inputs, stop - start)
            zeros = _unpacked(self._words(stem, "qzeros"), q.bits).reshape(len(scales), -1)[:, start:stop]
            zeros = (zeros + np.uint32(q.zero_offset)) & np.uint32((1 << q.bits) - 1)
        signed = values.astype(np.float32) - zeros.astype(np.float32)[group]
        signed *= scales[group]
        return np.ascontiguousarray(signed.T)

    def _words(self, stem: str, part: str) -> Ints:
        return self._files.stored(f"{stem}.{part}").view(np.uint32)

    def _groups(self, stem: str, inputs: int) -> NDArray[np.int64]:
        """The group of each input."""
        if f"{stem}.g_idx" not in self._files.tensors:
            return np.arange(inputs) // (self._q.group_size if self._q.group_size > 0 else inputs)
        groups = self._files.stored(f"{stem}.g_idx").astype(np.int64)
        count = self._files.tensors[f"{stem}.scales"].shape[0]
        if inputs and not 0 <= groups.min() <= groups.max() < count:
            raise CheckpointError(
                f"{self._path}: tensor {stem}.g_idx names groups beyond the {count} there are"
            )
        return groups

    def _shape(self, stem: str) -> tuple[int, int]:
        """(N, K) of a linear, all of whose parts must fit each other."""
        tensors, q = self._files.tensors, self._q
        for part in PARTS[:3]:
            info = tensors.get(f"{stem}.{part}")
            if info is None or len(info.shape) != 2:
                raise CheckpointError(
                    f"{self._path}: tensor {stem}.{part} is {list(info.shape) if info else 'missing'}; "
                    f"a linear in {q.dtype} has it in two dimensions"
                )
        rows = tensors[f"{stem}.qweight"].shape[0]
        groups, outputs = tensors[f"{stem}.scales"].shape
        inputs = rows if q.method == "awq" else rows * q.per_word
        wanted = {
            "qweight": ((rows, outputs // q.per_word if q.method == "awq" else outputs), "int32"),
            "qzeros": ((groups, outputs // q.per_word), "int32"),
            "scales": ((-(-inputs // q.group_size) if q.group_size > 0 else 1, outputs), None),
            "g_idx": ((inputs,), "int32"),
        }
        for part, (shape, dtype) in wanted.items():
            info = tensors.get(f"{stem}.{part}")
            if info and (info.shape != shape or dtype not in (None, info.dtype)):
                raise CheckpointError(
                    f"{self._path}: tensor {stem}.{part} is {info.dtype} {list(info.shape)}; with {inputs} "
                    f"inputs, {outputs} outputs and groups of {q.group_size} it must be "
                    f"{dtype or 'float16'} {list(shape)}"
                )
        if outputs % q.per_word:
            raise CheckpointError(f"{self._path}: {stem} has {outputs} outputs, no multiple of {q.per_word}")
        return outputs, inputs


def _kind(name: str) -> str:
    """`model.layers.3.mlp.up_proj.bias` -> `mlp.up_proj.bias`."""
    return ".".join(name.split(".")[-3:])


def _unpacked(words: Ints, bits: int) -> Ints:
    """The values in each word, lowest bits first: [a, b] to [a, b, 32 / bits]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return words[:, :, None] >> shifts & np.uint32((1 << bits) - 1)


def _awq(words: Ints) -> Ints:
    """[a, b] to [a, 8 b], the outputs in their order."""
    nibbles = _unpacked(words, 4)
    return nibbles[:, :, np.argsort(AWQ_ORDER)].reshape(len(words), -1)
