"""Makes the files of tests/goldens/mindspore with MindSpore itself: what its save_checkpoint writes.

usage: python tests/goldens/make_mindspore_goldens.py (needs mindspore, from PyPI, with numpy 1)

    types.ckpt, types.safetensors  a tensor of every type, a scalar, MindSpore's own names
    crc.ckpt                       with a checksum at its end
    text.ckpt                      a string beside the parameters, as training writes
    types.npz                      what they hold
"""

import shutil
from pathlib import Path

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, dtype, load_checkpoint, save_checkpoint

HERE = Path(__file__).parent / "mindspore"
FLOATS = ["Float32", "Float16", "BFloat16", "Float64"]
INTEGERS = [f"{sign}Int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)]
TYPES = [*FLOATS, *INTEGERS, "Bool"]


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    rng = np.random.default_rng(0)
    arrays = {f"model.{name}": rng.integers(0, 100, (3, 5)) for name in TYPES}
    arrays["model.Bool"] %= 2
    tensors = {
        name: Tensor(array, getattr(dtype, name[6:].lower().replace("bool", "bool_")))
        for name, array in arrays.items()
    }
    arrays["scalar"], tensors["scalar"] = np.array(2.5), Tensor(2.5, dtype.float32)
    save(HERE / "types.ckpt", tensors)
    save(HERE / "types.safetensors", tensors, format="safetensors")
    save(HERE / "crc.ckpt", {"model.Float32": tensors["model.Float32"]}, crc_check=True)
    save(
        HERE / "text.ckpt",
        {"model.Float32": tensors["model.Float32"]},
        append_dict={"network": "llama", "epoch_num": 3},
    )
    for name, value in load_checkpoint(str(HERE / "text.ckpt")).items():
        print(name, value)
    np.savez_compressed(HERE / "types.npz", version=np.array(mindspore.__version__), **arrays)
    for file in HERE.iterdir():
        file.chmod(0o644)


def save(path: Path, tensors: dict[str, Tensor], **options: object) -> None:
    parameters = [{"name": name, "data": Parameter(tensor, name=name)} for name, tensor in tensors.items()]
    save_checkpoint(parameters, str(path), **options)


if __name__ == "__main__":
    main()
