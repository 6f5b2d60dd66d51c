"""The text that a model is calibrated on: a file's, or the source of Python's own standard library.

The standard library is code and English prose, is on every machine that runs this, and is never passed on.
benchmarks/DIARY.md compares it with other texts.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm_boost.checkpoint.checkpoint import Checkpoint
from llm_boost.errors import ConfigError, RequestError
from llm_boost.tokenization import Tokenizer, load_tokenizer

HELD_OUT = 4  # sequences that are measured on, and not calibrated on
BEGINNING = 6000  # characters of each file of the standard library

Tokens = NDArray[np.int32]


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """A checkpoint's own tokenizer."""
    if checkpoint.format == "gguf":
        return Tokenizer.from_gguf(checkpoint.metadata, source=str(checkpoint.path))
    return load_tokenizer(checkpoint.folder)


def file_text(path: Path) -> Iterator[str]:
    """The text of a file, which must be UTF-8."""
    try:
        yield path.read_text("utf-8")
    except OSError as error:
        raise RequestError(f"{path}: cannot read the text: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 text (byte {error.start})") from None


def standard_library_text() -> Iterator[str]:
    """The beginnings of the standard library's modules, always in the same order."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    if not files:
        raise ConfigError("--calibration: Python's standard library is not here as source; give a text file")
    random.Random(0).shuffle(files)
    for file in files:
        yield file.read_text("utf-8", errors="replace")[:BEGINNING]


def sequences(tokenizer: Tokenizer, texts: Iterator[str], num_samples: int, context: int) -> Tokens:
    """Sequences [at most num_samples + HELD_OUT, context] from all over the texts.

    The last HELD_OUT are for measuring.

    Each begins with the beginning-of-sequence token, if the model wants one.

    Raises:
        RequestError: too little text.
    """
    bos = tokenizer.bos_token_id
    start = [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []
    length = context - len(start)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= 2 * (num_samples + HELD_OUT) * length:  # twice: of a long text not the beginning alone
            break
    windows = [start + ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if len(windows) <= HELD_OUT:
        raise RequestError(
            f"calibration: the text has {len(ids)} tokens, at least {(HELD_OUT + 1) * length} are needed: "
            f"{HELD_OUT + 1} sequences of {length}"
        )
    order = np.random.default_rng(0).permutation(len(windows))[: num_samples + HELD_OUT]
    return np.array(windows, np.int32)[order]
