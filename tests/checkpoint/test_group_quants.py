"""GPTQ and AWQ checkpoints: what AutoGPTQ and AutoAWQ make of their files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from llm_boost.checkpoint import open_checkpoint
from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.checkpoint.group_quants import AWQ_ORDER, GroupQuantization, QuantizedLinears
from llm_boost.errors import CheckpointError

GOLDENS = Path(__file__).parent.parent / "goldens" / "group_quants.npz"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
NAME = "model.layers.0.mlp.up_proj"


def golden(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS) as arrays:
        return {name.removeprefix(f"{case}/"): arrays[name] for name in arrays if name.startswith(f"{case}/")}


def write(folder: Path, tensors: dict[str, np.ndarray], quantization: dict[str, Any] | None) -> Path:
    config = {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


def stored(case: str) -> dict[str, np.ndarray]:
    return {f"{NAME}.{part}": array for part, array in golden(case).items() if part != "weight"}


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("gptq_4_32_sym", GPTQ),
        ("gptq_4_32_act", GPTQ),
        ("gptq_4_all", {**GPTQ, "group_size": -1}),
        ("gptq_8_32", {**GPTQ, "bits": 8}),
        ("gptq_8_all_sym", {**GPTQ, "bits": 8, "group_size": -1}),
        ("awq_4_32", AWQ),
        ("awq_4_all", {**AWQ, "group_size": 96}),
    ],
)
def test_as_their_makers_dequantise_them(tmp_path: Path, case: str, settings: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(write(tmp_path, stored(case), settings))
    want = golden(case)["weight"]
    info = checkpoint.tensors[f"{NAME}.weight"]
    assert info == TensorInfo(f"{NAME}.weight", want.shape, f"{case.partition('_')[0]}-int{settings['bits']}")
    assert list(checkpoint.tensors) == [f"{NAME}.weight"]
    assert "quantization_config" not in checkpoint.config
    got = checkpoint.read(f"{NAME}.weight")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)
    for start, stop in ((0, 0), (3, 17), (8, 16), (63, 64)):
        np.testing.assert_array_equal(checkpoint.read_rows(f"{NAME}.weight", start, stop), want[start:stop])


class InMemory:
    """Files of a checkpoint."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays
        self.tensors = {n: TensorInfo(n, a.shape, a.dtype.name) for n, a in arrays.items()}

    def stored(self, name: str) -> np.ndarray:
        return self._arrays[name]


@st.composite
def quantisations(draw: st.DrawFn) -> GroupQuantization:
    method = draw(st.sampled_from(["gptq", "awq"]))
    bits = draw(st.sampled_from([4, 8])) if method == "gptq" else 4
    offset = draw(st.integers(0, 1)) if method == "gptq" else 0
    return GroupQuantization(method, bits, draw(st.sampled_from([-1, 8, 32])), offset)


@given(quantisations(), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_bit_by_bit(q: GroupQuantization, inputs8: int, outputs8: int, seed: int) -> None:
    """Any words against the obvious reading: one value at a time, by the layout's own words."""
    rng, inputs, outputs, per_word = np.random.default_rng(seed), 8 * inputs8, 8 * outputs8, 32 // q.bits
    groups = -(-inputs // q.group_size) if q.group_size > 0 else 1
    packed_shape = (inputs, outputs // 8) if q.method == "awq" else (inputs // per_word, outputs)

    def words(*shape: int) -> np.ndarray:
        return rng.integers(0, 2**32, shape, np.uint32).view(np.int32)

    arrays = {
        "x.qweight": words(*packed_shape),
        "x.qzeros": words(groups, outputs // per_word),
        "x.scales": rng.uniform(0.01, 1, (groups, outputs)).astype(np.float16),
    }
    group = [k // q.group_size if q.group_size > 0 else 0 for k in range(inputs)]
    if q.method == "gptq":
        group = rng.integers(0, groups, inputs).tolist()
        arrays["x.g_idx"] = np.array(group, np.int32)

    def value(word: np.int32, index: int) -> int:
        return (int(word) & 0xFFFFFFFF) >> (q.bits * index) & ((1 << q.bits) - 1)

    def awq_value(row: np.ndarray, n: int) -> int:
        return value(row[n // 8], AWQ_ORDER.index(n % 8))

    want = np.empty((outputs, inputs), np.float32)
    for n in range(outputs):
        for k in range(inputs):
            zeros = arrays["x.qzeros"][group[k]]
            if q.method == "awq":
                level, zero = awq_value(arrays["x.qweight"][k], n), awq_value(zeros, n)
            else:
                level = value(arrays["x.qweight"][k // per_word, n], k % per_word)
                zero = (value(zeros[n // per_word], n % per_word) + q.zero_offset) % (1 << q.bits)
            want[n, k] = np.float32(arrays["x.scales"][group[k], n]) * np.float32(level - zero)
    linears = QuantizedLinears(InMemory(arrays), q, "model")
    np.testing.assert_array_equal(linears.read_rows("x.weight", 0, outputs), want)


def test_biases_of_zeros_are_no_biases(tmp_path: Path) -> None:
    tensors = {**stored("gptq_4_32_act"), f"{NAME}.bias": np.zeros(64, np.float16)}
    other = "model.layers.0.self_attn.q_proj"
    tensors |= {name.replace(NAME, other): array for name, array in stored("gptq_4_32_act").items()}
    tensors[f"{other}.bias"] = np.ones(64, np.float16)
    checkpoint = open_checkpoint(write(tmp_path, tensors, GPTQ))
    assert set(checkpoint.tensors) == {f"{NAME}.weight", f"{other}.weight", f"{other}.bias"}


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    """AutoGPTQ before 0.3 wrote quantize_config.json."""
    write(tmp_path, stored("gptq_4_32_act"), None)
    settings = {k: v for k, v in GPTQ.items() if k != "quant_method"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    got = open_checkpoint(tmp_path).read(f"{NAME}.weight")
    np.testing.assert_array_equal(got, golden("gptq_4_32_act")["weight"])


def test_version_2_stores_zero_points_as_they_are(tmp_path: Path) -> None:
    tensors = stored("gptq_4_32_act")
    zeros = tensors[f"{NAME}.qzeros"].view(np.uint32)
    tensors[f"{NAME}.qzeros"] = (zeros + np.uint32(0x11111111)).view(np.int32)
    checkpoint = open_checkpoint(write(tmp_path, tensors, {**GPTQ, "checkpoint_format": "gptq_v2"}))
    np.testing.assert_array_equal(checkpoint.read(f"{NAME}.weight"), golden("gptq_4_32_act")["weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, 'quant_method is \'bitsandbytes\'; it must be "gptq" or "awq"'),
        ({**GPTQ, "bits": 3}, "bits is 3; it must be 4 or 8"),
        ({**AWQ, "bits": 8}, "bits is 8; it must be 4"),
        ({**AWQ, "version": "gemv"}, "version is 'gemv'; it must be \"gemm\""),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; it must be \"gptq\" or"),
        ({**GPTQ, "is_marlin_format": True}, 'it must be "gptq" or "gptq_v2"'),
        ({**GPTQ, "dynamic": {"-:lm_head": {}}}, "dynamic is"),
        ({**GPTQ, "group_size": 0}, "group_size is 0; it must be -1"),
        ({**GPTQ, "group_size": 64}, f"tensor {NAME}.scales is float16 [3, 64]; with 96 inputs"),
        ({**GPTQ, "bits": 8}, f"tensor {NAME}."),
        ({**AWQ}, f"tensor {NAME}."),
        ("int4", "quantization_config is 'int4'; it must be an object"),
    ],
)
def test_what_is_refused_by_name(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write(tmp_path, stored("gptq_4_32_act"), settings))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_part_is_missing(tmp_path: Path, part: str) -> None:
    tensors = stored("gptq_4_32_act")
    del tensors[f"{NAME}.{part}"]
    with pytest.raises(CheckpointError, match=rf"tensor {NAME}.{part} is missing"):
        open_checkpoint(write(tmp_path, tensors, GPTQ))


def test_a_group_that_is_not_there(tmp_path: Path) -> None:
    tensors = stored("gptq_4_32_act")
    tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"] + 1
    checkpoint = open_checkpoint(write(tmp_path, tensors, GPTQ))
    with pytest.raises(CheckpointError, match="g_idx names groups beyond the 3 there are"):
        checkpoint.read(f"{NAME}.weight")


def test_no_linear_is_quantised(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no tensor \*.qweight"):
        open_checkpoint(write(tmp_path, {"x.weight": np.zeros((2, 2), np.float32)}, GPTQ))
