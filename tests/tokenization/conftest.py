from __future__ import annotations

import pytest
import sentencepiece
from tokenizer_goldens import GOLDENS

from llm_boost.tokenization import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def qwen2() -> Tokenizer:
    """A tiny byte-level BPE of Qwen2's kind."""
    return load_tokenizer(GOLDENS / "qwen2")


@pytest.fixture(scope="session")
def llama() -> Tokenizer:
    """A tiny sentencepiece BPE of Llama 2's kind."""
    return load_tokenizer(GOLDENS / "llama")


@pytest.fixture(scope="session")
def processor() -> sentencepiece.SentencePieceProcessor:
    """The same vocabulary as `llama`, in sentencepiece itself."""
    return sentencepiece.SentencePieceProcessor(model_file=str(GOLDENS / "llama" / "tokenizer.model"))
