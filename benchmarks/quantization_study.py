"""KL divergence that a packed format costs a real checkpoint, beside llama.cpp's Q4_0 and Q8_0.

    python benchmarks/quantization_study.py MODEL_DIR int8 int4 int4,v=int6,head=int6 q8_0 q4_0 --text FILE...

A scheme is a format for every matrix, then exceptions (`head`, or q, k, v, o, gate, up, down). The weights of
a transformers model are replaced by what the packer makes of them, and every linear layer's input is
quantised as the kernels do it (or as llama.cpp does it), so that KL divergences against the float32 model
compare like with like. Needs the `reference` extra. Speed is measured elsewhere.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_boost import _native

Transform = Callable[[torch.Tensor], torch.Tensor]
GROUP = 64  # columns that are rotated together, and activations that share a scale (csrc/layout.h)


def hadamard(order: int) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard matrix in Sylvester's order."""
    h = torch.ones(1, 1)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / order**0.5


HADAMARD = hadamard(GROUP)


def grouped(x: torch.Tensor, size: int) -> torch.Tensor:
    """[..., cols] as [..., groups, size], padded with zeros."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    return x.reshape(*x.shape[:-1], -1, size)


def rounded(groups: torch.Tensor) -> torch.Tensor:
    """Each group as int8 times (largest magnitude / 127)."""
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return torch.round(groups / scale).nan_to_num(0) * scale


def rotated_int8(x: torch.Tensor) -> torch.Tensor:
    """Activations as the kernels see them, rotated back."""
    return (rounded(grouped(x, GROUP) @ HADAMARD) @ HADAMARD).flatten(-2)[..., : x.shape[-1]]


def q8_0(x: torch.Tensor) -> torch.Tensor:
    """llama.cpp's Q8_0, which also is its format of activations: groups of 32, float16 scales."""
    groups = grouped(x, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    rounded_groups = torch.round(groups / scale).nan_to_num(0) * scale.half().float()
    return rounded_groups.flatten(-2)[..., : x.shape[-1]]


def q4_0(x: torch.Tensor) -> torch.Tensor:
    """llama.cpp's Q4_0: groups of 32, scale = the value of largest magnitude / -8 in float16."""
    groups = grouped(x, 32)
    scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    index = (groups / scale).nan_to_num(0).add(8.5).floor().clamp(0, 15) - 8
    return (index * scale.half().float()).flatten(-2)[..., : x.shape[-1]]


def bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def packed(fmt: str) -> Transform:
    """What a weight is once packed."""

    def transform(w: torch.Tensor) -> torch.Tensor:
        packed = _native.pack_matrix([w.numpy()], fmt, threads=torch.get_num_threads())
        return torch.from_numpy(_native.unpack_rows(packed, fmt, *w.shape))

    return transform


PACKED = {"bfloat16", "int8", "int6", "int4"}
# format -> (weights, activations)
FORMATS: dict[str, tuple[Transform, Transform]] = {
    "bfloat16": (bfloat16, bfloat16),
    **{fmt: (packed(fmt), rotated_int8) for fmt in ("int8", "int6", "int4")},
    "q8_0": (q8_0, q8_0),
    "q4_0": (q4_0, q8_0),
}


def parse_scheme(scheme: str) -> tuple[str, dict[str, str]]:
    base, *exceptions = scheme.split(",")
    formats = dict(e.split("=", 1) for e in exceptions)
    if base == "q4_0":
        formats.setdefault("head", "q8_0")  # as llama.cpp does where 256 does not divide the columns
    return base, formats


class Model:
    """A float32 model with its reference log-probabilities, whose linear layers take on formats."""

    def __init__(self, path: Path, text: list[str], tokens: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.chunks = [torch.tensor([tokenizer(t)["input_ids"][:tokens]]) for t in text]
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        head = self.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())  # apart from the embedding
        self.linears = {
            "head" if name == "lm_head" else name.rsplit(".", 1)[1].removesuffix("_proj") + "/" + name: module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        self.weights = {name: m.weight.detach().clone() for name, m in self.linears.items()}
        self.activations: dict[str, Transform] = {}
        for name, module in self.linears.items():
            module.register_forward_pre_hook(lambda _, args, name=name: self._activate(name, args[0]))
        self.reference = [self._log_probs(chunk) for chunk in self.chunks]

    def quantize(self, base: str, exceptions: dict[str, str]) -> str:
        """Takes on a scheme; returns its bits a weight, head included (of packed formats only)."""
        num_bytes = num_weights = 0
        formats = {name: exceptions.get(name.split("/")[0], base) for name in self.linears}
        for name, fmt in formats.items():
            weights, self.activations[name] = FORMATS[fmt]
            self.linears[name].weight.data = weights(self.weights[name])
        if not set(formats.values()) <= PACKED:
            return "    -"
        for name, fmt in formats.items():
            num_bytes += _native.packed_bytes(fmt, *self.weights[name].shape)
            num_weights += self.weights[name].numel()
        return f"{8 * num_bytes / num_weights:5.2f}"

    def divergence(self) -> tuple[float, float]:
        """(mean KL divergence, share of equal top tokens) against the float32 model."""
        kl, equal = [], []
        for chunk, reference in zip(self.chunks, self.reference, strict=True):
            log_probs = self._log_probs(chunk)
            kl.append((reference.exp() * (reference - log_probs)).sum(-1).mean())
            equal.append((log_probs.argmax(-1) == reference.argmax(-1)).float().mean())
        return torch.stack(kl).mean().item(), torch.stack(equal).mean().item()

    def _activate(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor]:
        transform = self.activations.get(name)
        return (transform(x) if transform else x,)

    def _log_probs(self, chunk: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.model(chunk, use_cache=False).logits[0], -1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("schemes", nargs="+", help="FORMAT[,MATRIX=FORMAT...]: " + ", ".join(FORMATS))
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="one chunk is taken from each")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    schemes = [(scheme, *parse_scheme(scheme)) for scheme in args.schemes]
    model = Model(args.model, [path.read_text()[: args.tokens * 16] for path in args.text], args.tokens)
    for scheme, base, exceptions in schemes:
        start = time.time()
        bits = model.quantize(base, exceptions)
        kl, equal = model.divergence()
        seconds = time.time() - start
        print(f"{scheme:28s} {bits} bits  KL {kl:.6f}  same top {equal:.4f}  [{seconds:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
