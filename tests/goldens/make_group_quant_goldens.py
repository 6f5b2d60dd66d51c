"""Writes tests/goldens/group_quants.npz: linears as AutoGPTQ and AutoAWQ store them, and their weights.

    pip download --no-deps auto-gptq==0.7.1 autoawq==0.2.9, unpacked into the folders AUTO_GPTQ and AUTO_AWQ
    python tests/goldens/make_group_quant_goldens.py AUTO_GPTQ AUTO_AWQ

Needs the `reference` extra. Of both packages only the packing of a linear is used, which is plain torch.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

INPUTS, OUTPUTS = 96, 64


def load(file: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def affine(weights: torch.Tensor, bits: int, group: torch.Tensor, symmetric: bool):
    """Scales (of float16) and zero points, at least 1, of each group's range: [outputs, groups]."""
    top = (1 << bits) - 1
    scales, zeros = [], []
    for g in range(int(group.max()) + 1):
        part = weights[:, group == g]
        low, high = part.min(1).values.clamp(max=0), part.max(1).values.clamp(min=0)
        if symmetric:
            reach = torch.maximum(-low, high)
            scales.append((2 * reach / top).half().float())
            zeros.append(torch.full_like(reach, (top + 1) // 2))
        else:
            scale = ((high - low) / top).half().float()
            scales.append(scale)
            zeros.append((-low / scale).round().clamp(1, top))
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def linear(seed: int) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(INPUTS, OUTPUTS, bias=False)


def gptq(module, bits: int, group_size: int, desc_act: bool, symmetric: bool) -> dict[str, np.ndarray]:
    source = linear(bits)
    size = group_size if group_size > 0 else INPUTS
    group = torch.arange(INPUTS) // size
    if desc_act:
        group = group[torch.randperm(INPUTS, generator=torch.Generator().manual_seed(0))]
    scales, zeros = affine(source.weight.data, bits, group, symmetric)
    packed = module.QuantLinear(bits, group_size, INPUTS, OUTPUTS, bias=False, weight_dtype=torch.float16)
    packed.pack(source, scales.clone(), zeros.clone(), g_idx=group.int())
    stored = {part: getattr(packed, part).numpy() for part in ("qweight", "qzeros", "scales", "g_idx")}
    stored["scales"] = stored["scales"].astype(
        np.float16
    )  # which they are, in the type of the float32 linear
    return {**stored, "weight": packed(torch.eye(INPUTS)).T.float().numpy()}


def awq(module, packing, group_size: int) -> dict[str, np.ndarray]:
    source = linear(7)
    size = group_size if group_size > 0 else INPUTS
    scales, zeros = affine(source.weight.data, 4, torch.arange(INPUTS) // size, symmetric=False)
    source = source.half()
    packed = module.WQLinear_GEMM.from_linear(
        source, 4, size, scales=scales.T.half(), zeros=zeros.T.contiguous()
    )
    weight = packing.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, size)
    return {
        "qweight": packed.qweight.numpy(),
        "qzeros": packed.qzeros.numpy(),
        "scales": packed.scales.numpy(),
        "weight": weight.T.float().numpy(),
    }


def main(auto_gptq: Path, auto_awq: Path) -> None:
    quant_linear = load(auto_gptq / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py", "qlinear_cuda")
    utils = {"module": {"try_import": lambda name: (None, "")}, "utils": {"get_best_device": lambda: "cpu"}}
    for name in ("awq", "awq.utils"):
        sys.modules[name] = types.ModuleType(name)
    for name, members in utils.items():
        stub = sys.modules[f"awq.utils.{name}"] = types.ModuleType(name)
        vars(stub).update(members)
    packing = load(auto_awq / "awq/utils/packing_utils.py", "awq.utils.packing_utils")
    gemm = load(auto_awq / "awq/modules/linear/gemm.py", "awq_gemm")
    cases = {
        "gptq_4_32_sym": gptq(quant_linear, 4, 32, desc_act=False, symmetric=True),
        "gptq_4_32_act": gptq(quant_linear, 4, 32, desc_act=True, symmetric=False),
        "gptq_4_all": gptq(quant_linear, 4, -1, desc_act=False, symmetric=False),
        "gptq_8_32": gptq(quant_linear, 8, 32, desc_act=False, symmetric=False),
        "gptq_8_all_sym": gptq(quant_linear, 8, -1, desc_act=False, symmetric=True),
        "awq_4_32": awq(gemm, packing, 32),
        "awq_4_all": awq(gemm, packing, -1),
    }
    arrays = {f"{case}/{name}": array for case, members in cases.items() for name, array in members.items()}
    np.savez_compressed(Path(__file__).with_name("group_quants.npz"), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
