"""Writes gguf_blocks.npz: rows of float32, and the Q8_0 and Q4_0 blocks that the `gguf` package makes.

Run it where that package is: `pip install gguf`.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def main() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((12, 96)).astype(np.float32)
    rows[0] = 0
    rows[1] *= 1e-30  # its scale is 0 as a float16
    rows[2] = rng.integers(-8, 8, 96)  # exact, and many ties of the largest
    rows[3] = rng.integers(-127, 128, 96) / 2  # halves
    rows[4] *= 1e4
    rows[5] *= 1e-6  # a subnormal scale
    rows[6, ::2] = 0
    blocks = {
        kind: gguf.quants.quantize(rows, getattr(gguf.GGMLQuantizationType, kind))
        for kind in ("Q8_0", "Q4_0")
    }
    np.savez_compressed(Path(__file__).parent / "gguf_blocks.npz", rows=rows, **blocks)


if __name__ == "__main__":
    main()
