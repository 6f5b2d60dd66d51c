"""Meta's consolidated.*.pth: cut by ranks as Meta cuts, read as Hugging Face has it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_samples import interleaved, one_line

from llm_boost.checkpoint import TensorInfo, open_checkpoint
from llm_boost.checkpoint.meta_pth import LAYER_NAMES, MetaCheckpoint
from llm_boost.errors import CheckpointError
from llm_boost.models.config import ModelConfig, check_tensors

HEADS, KV_HEADS, DIM, INNER, VOCAB = 8, 4, 64, 96, 40
PARAMS = {
    "dim": DIM,
    "n_layers": 1,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}


class Shard:
    """One rank's tensors in memory, in the place of torch's file."""

    def __init__(self, path: Path, tensors: dict[str, np.ndarray]) -> None:
        self.path, self._tensors = path, tensors

    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(name, a.shape, a.dtype.name) for name, a in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._tensors[name][start:stop]

    def forget(self) -> None: ...

    def close(self) -> None: ...


def whole_model() -> dict[str, np.ndarray]:
    """Under Hugging Face's names."""
    rng = np.random.default_rng(0)
    kv = DIM // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (DIM, DIM), "self_attn.k_proj": (kv, DIM), "self_attn.v_proj": (kv, DIM),
        "self_attn.o_proj": (DIM, DIM), "mlp.gate_proj": (INNER, DIM), "mlp.up_proj": (INNER, DIM),
        "mlp.down_proj": (DIM, INNER), "input_layernorm": (DIM,), "post_attention_layernorm": (DIM,),
    }  # fmt: skip
    named = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    named |= {
        "model.embed_tokens.weight": (VOCAB, DIM),
        "model.norm.weight": (DIM,),
        "lm_head.weight": (VOCAB, DIM),
    }
    return {
        name: rng.standard_normal(shape).astype(np.float32).astype(ml_dtypes.bfloat16)
        for name, shape in named.items()
    }


def meta_ranks(model: dict[str, np.ndarray], ranks: int, embedding_axis: int) -> list[dict[str, np.ndarray]]:
    """What Meta's release of it would hold, rank by rank."""
    cut: dict[str, tuple[np.ndarray, int | None]] = {
        "tok_embeddings.weight": (model["model.embed_tokens.weight"], embedding_axis),
        "output.weight": (model["lm_head.weight"], 0),
        "norm.weight": (model["model.norm.weight"], None),
    }
    for theirs, (ours, axis) in LAYER_NAMES.items():
        array = model[f"model.layers.0.{ours}.weight"]
        heads = {"attention.wq": HEADS, "attention.wk": KV_HEADS}.get(theirs)
        cut[f"layers.0.{theirs}.weight"] = (interleaved(array, heads) if heads else array, axis)
    parts = [{"rope.freqs": np.zeros(4, np.float32)} for _ in range(ranks)]
    for name, (array, axis) in cut.items():
        shares = [array] * ranks if axis is None else np.split(array, ranks, axis)
        for rank, share in zip(parts, shares, strict=True):
            rank[name] = share
    return parts


def folder_of(path: Path, ranks: int, params: dict = PARAMS) -> Path:
    path.mkdir(exist_ok=True)
    (path / "params.json").write_text(json.dumps(params))
    for rank in range(ranks):
        (path / f"consolidated.{rank:02}.pth").write_bytes(b"x")
    return path


def opened(path: Path, parts: list[dict[str, np.ndarray]], params: dict = PARAMS) -> MetaCheckpoint:
    files = {f"consolidated.{rank:02}.pth": tensors for rank, tensors in enumerate(parts)}
    folder = folder_of(path, len(parts), params)
    return MetaCheckpoint(folder, open_file=lambda file: Shard(file, files[file.name]))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("embedding_axis", [0, 1])
def test_ranks_become_one_model(tmp_path, ranks, embedding_axis):
    """Grouped-query heads too, whose keys the original converter could not."""
    model = whole_model()
    checkpoint = opened(tmp_path / "m", meta_ranks(model, ranks, embedding_axis))
    check_tensors(ModelConfig.from_hf(checkpoint.config, "params.json"), checkpoint)
    assert set(checkpoint.tensors) == set(model)
    for name, array in model.items():
        assert checkpoint.tensors[name] == TensorInfo(name, array.shape, "bfloat16")
        assert checkpoint.read(name).tobytes() == array.tobytes(), name
        rows = len(array)
        for start, stop in ((0, 0), (3, rows - 2), (rows // 2 - 1, rows // 2 + 1)):
            assert checkpoint.read_rows(name, start, stop).tobytes() == array[start:stop].tobytes(), name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"norm_eps": 1e-6}, {"max_position_embeddings": 2048, "rope_theta": 10000.0}),
        ({}, {"max_position_embeddings": 4096, "num_key_value_heads": 4}),
        ({"rope_theta": 1e6}, {"max_position_embeddings": 16384}),
        ({"rope_theta": 500000.0}, {"max_position_embeddings": 8192, "rope_scaling": None}),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, {"max_position_embeddings": 131072}),
        ({"n_kv_heads": None, "n_heads": 4}, {"num_key_value_heads": 4}),
    ],
)
def test_params_json_becomes_a_config(tmp_path, changes, expected):
    config = opened(tmp_path / "m", meta_ranks(whole_model(), 1, 1), {**PARAMS, **changes}).config
    assert {key: config[key] for key in expected} == expected
    assert (config["hidden_size"], config["intermediate_size"], config["vocab_size"]) == (DIM, INNER, VOCAB)


def test_what_is_wrong_is_named(tmp_path):
    parts = meta_ranks(whole_model(), 2, 1)

    def refused(*arguments) -> str:
        with pytest.raises(CheckpointError) as caught:
            opened(tmp_path / "m", *arguments)
        return one_line(caught.value, tmp_path / "m")

    broken = [parts[0], {name: array for name, array in parts[1].items() if name != "norm.weight"}]
    assert "consolidated.01.pth: tensor 'norm.weight' is missing, consolidated.00.pth has it" in refused(
        broken
    )
    other = [parts[0], {**parts[1], "output.weight": parts[1]["output.weight"][:5]}]
    assert "tensor 'output.weight' is bfloat16 [5, 64], in consolidated.00.pth bfloat16 [20, 64]" in refused(
        other
    )
    strange = [{**part, "layers.0.gate.weight": part["norm.weight"]} for part in parts]
    assert "tensor 'layers.0.gate.weight' is none of a Llama's" in refused(strange)
    assert "params.json: n_heads is 'x'" in refused(parts, {**PARAMS, "n_heads": "x"})
    assert "which 6 heads do not divide" in refused(parts, {**PARAMS, "n_heads": 6, "n_kv_heads": 6})
    folder = folder_of(tmp_path / "gap", 3)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated.01.pth is missing; there are 2 files"):
        open_checkpoint(folder)
    (folder_of(tmp_path / "no-params", 1) / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"params.json is missing"):
        open_checkpoint(tmp_path / "no-params")


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is there")
def test_without_torch_it_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"reading .pth weights needs torch; install it"):
        open_checkpoint(folder_of(tmp_path / "m", 1))


@pytest.mark.reference
@pytest.mark.parametrize("ranks", [1, 2])
def test_torchs_own_files(tmp_path, ranks):
    import torch

    from llm_boost.convert.convert import Options, convert
    from llm_boost.convert.source import open_source

    model = whole_model()
    folder = folder_of(tmp_path / "m", ranks)
    for rank, part in enumerate(meta_ranks(model, ranks, 1)):
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(a).view(np.int16)).view(torch.bfloat16)
            if a.dtype == ml_dtypes.bfloat16
            else torch.from_numpy(a)
            for name, a in part.items()
        }
        torch.save(tensors, folder / f"consolidated.{rank:02}.pth")
    checkpoint = open_checkpoint(folder)
    there = convert(open_source(folder, model="llama"), tmp_path / "hf", Options("hf")).path
    for name, array in model.items():
        assert checkpoint.read(name).tobytes() == array.tobytes()
        checkpoint.forget()
        assert checkpoint.read(name).tobytes() == array.tobytes()
        assert open_checkpoint(there).read(name).tobytes() == array.tobytes()
