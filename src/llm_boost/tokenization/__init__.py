"""Text to token ids and back, from every form in which checkpoints carry a tokenizer; chat templates."""

from llm_boost.tokenization.detokenize import DetokenizeStream
from llm_boost.tokenization.load import load_tokenizer
from llm_boost.tokenization.tokenizer import Tokenizer

__all__ = ["DetokenizeStream", "Tokenizer", "load_tokenizer"]
