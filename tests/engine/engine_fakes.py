"""A model, a tokenizer and an LLM small enough to check the engine by."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from llm_boost.engine import llm as llm_module
from llm_boost.engine.batch import Batch, FloatArray

HISTORY = 4  # tokens that decide on the next one


class FakeRunner:
    """A model whose logits are a hash of the last tokens, read back from a paged cache that it writes itself.

    A wrong block table, position, or a block given to two sequences at once changes the logits, so the engine
    cannot be wrong and the text right. The rules of a Batch are asserted on the way.
    """

    weight_bytes = 1234
    cache_bytes = 4321
    threads = 2
    isa = "fake"

    def __init__(
        self, vocab_size: int = 128, num_blocks: int = 64, block_size: int = 4, max_model_len: int = 64
    ) -> None:
        self.vocab_size = vocab_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.cache = np.full((num_blocks, block_size), -1, np.int64)
        self.batches: list[Batch] = []
        self.poisoned_tokens: set[int] = set()  # a sequence that ends with one gets NaN logits
        self.crash = False

    def position_salt(self, num_prompt_tokens: int) -> int:
        return 0

    def run(self, batch: Batch) -> FloatArray:
        self.batches.append(batch)
        if self.crash:
            raise RuntimeError("the fake model crashed")
        counts = np.diff(batch.seq_starts)
        assert batch.seq_starts[0] == 0
        assert batch.seq_starts[-1] == len(batch.token_ids)
        assert (counts >= 1).all()
        assert len(batch.context_lens) == len(batch.prompt_lens) == len(batch.block_tables) == len(counts)
        for array in (
            batch.token_ids,
            batch.seq_starts,
            batch.context_lens,
            batch.prompt_lens,
            batch.block_tables,
        ):
            assert array.dtype == np.int32
        assert (np.diff(batch.logit_rows) > 0).all()

        written: set[tuple[int, int]] = set()
        logits: dict[int, FloatArray] = {}

        def write(s: int, count: int) -> None:
            end = int(batch.context_lens[s])
            assert 0 < end <= self.max_model_len
            table = batch.block_tables[s]
            for i in range(count):
                position = end - int(count) + i
                block = int(table[position // self.block_size])
                slot = (block, position % self.block_size)
                assert 0 <= block < self.num_blocks
                assert slot not in written, "two tokens of a step share a cache slot"
                written.add(slot)
                # A slot remembers its position too, so that a misplaced token is found out.
                self.cache[slot] = position << 32 | int(batch.token_ids[batch.seq_starts[s] + i])

        def read(s: int, count: int) -> None:
            for i in range(count):
                row = int(batch.seq_starts[s]) + i
                if row in batch.logit_rows:
                    position = int(batch.context_lens[s] - count) + i
                    logits[row] = self._logits(batch.block_tables[s], position)

        passes = [(write,), (read,)] if (counts > 1).any() else [(write, read)]
        for work in passes:
            for s in reversed(range(len(counts))):
                for do in work:
                    do(s, int(counts[s]))
        return (
            np.stack([logits[row] for row in batch.logit_rows.tolist()])
            if logits
            else np.zeros((0, self.vocab_size), np.float32)
        )

    def _logits(self, table: Any, last: int) -> FloatArray:
        positions = range(last + 1)
        seen = [int(self.cache[table[p // self.block_size], p % self.block_size]) for p in positions]
        assert [value >> 32 for value in seen] == list(positions), "the cache holds other positions"
        tokens = [value & 0xFFFFFFFF for value in seen]
        if tokens[-1] in self.poisoned_tokens:
            return np.full(self.vocab_size, np.nan, np.float32)
        return self.logits_after(tokens)

    def logits_after(self, tokens: list[int]) -> FloatArray:
        """[vocab_size]; the sum takes the whole history in, so that a wrong early token shows too."""
        key = zlib.crc32(repr((tokens[-HISTORY:], sum(tokens), len(tokens))).encode())
        return np.random.default_rng(key).normal(0, 3, self.vocab_size).astype(np.float32)

    def greedy(self, prompt: Iterable[int], count: int) -> list[int]:
        """What the model says, computed without any engine."""
        tokens = list(prompt)
        start = len(tokens)
        for _ in range(count):
            tokens.append(int(np.argmax(self.logits_after(tokens))))
        return tokens[start:]


class FakeStream:
    def __init__(self, tokenizer: FakeTokenizer, skip: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip

    def push(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=self._skip)

    def finish(self) -> str:
        return ""


class FakeTokenizer:
    """A token is a character; 0 begins a text and 1 ends it."""

    bos_token_id = 0
    eos_token_ids = frozenset({1})
    special_token_ids = frozenset({0, 1})
    vocab_size = 128

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [ord(c) for c in text]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) if i > 1 else "" if skip_special_tokens else f"<{i}>" for i in ids)

    def token_bytes(self, token_id: int) -> bytes:
        return self.decode([token_id], skip_special_tokens=False).encode()

    def stream(self, skip_special_tokens: bool = True, *, after: Iterable[int] = ()) -> FakeStream:
        return FakeStream(self, skip_special_tokens)

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        *,
        add_generation_prompt: bool = True,
        tools: Any = None,
        chat_template: str | None = None,
    ) -> str:
        assert tools is None
        text = "".join(f"{m['role']}:{m['content']}{chat_template or ';'}" for m in messages)
        return text + "assistant:" * add_generation_prompt


def fake_parts(runner: FakeRunner | None = None, **generation_config: Any) -> Any:
    return SimpleNamespace(
        runner=runner or FakeRunner(),
        tokenizer=FakeTokenizer(),
        model_config=SimpleNamespace(architecture="Fake"),
        generation_config=generation_config,
    )


def fake_llm(runner: FakeRunner | None = None, **options: Any) -> Any:
    """An LLM on a fake runner, where no fixture is at hand."""
    with mock.patch.object(llm_module, "load_parts", return_value=fake_parts(runner)):
        return llm_module.LLM("model", **options)
