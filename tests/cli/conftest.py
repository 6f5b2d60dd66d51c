"""An LLM that needs no model: it continues every prompt with the alphabet, a token a character."""

from __future__ import annotations

import copy
import string
from types import SimpleNamespace

import numpy as np
import pytest

from llm_boost import SamplingParams
from llm_boost.cli import main as cli_main
from llm_boost.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from llm_boost.errors import RequestError


class FakeTokenizer:
    bos_token_id = 0
    chat_template = "{{ messages }}"

    def encode(self, text, *, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(character) for character in text]

    def encode_chat(self, messages):
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return self.encode(text + "<assistant>", add_special_tokens=False)


class FakeRunner:
    """Logits that depend on the last token alone, row (7 * token) of a random table."""

    vocab_size, num_blocks, block_size, max_model_len = 256, 64, 4, 256

    def __init__(self, seed=0):
        self.table = np.random.default_rng(seed).normal(0, 2, (256, 256)).astype(np.float32)
        self.batches = []

    def run(self, batch):
        self.batches.append(batch)
        return self.table[batch.token_ids[batch.logit_rows] * 7 % 256]


class FakeLLM:
    weight_bytes, threads, isa, dtype, max_model_len = 123_000_000, 2, "avx2", "bfloat16", 1024
    kv_cache_tokens, kv_cache_bytes = 65_536, 1_510_000_000

    def __init__(self):
        self.tokenizer = FakeTokenizer()
        self.model_config = SimpleNamespace(vocab_size=300)
        self.engine = SimpleNamespace(runner=FakeRunner())
        self.defaults = SamplingParams()
        self.batches = []  # (prompts' ids, their SamplingParams) of each call
        self.reply = string.ascii_lowercase

    def default_sampling_params(self):
        return self.defaults

    def generate(self, prompts, params):
        params = params if isinstance(params, list) else [params] * len(prompts)
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        self.batches.append((ids, params))
        for prompt in ids:
            if len(prompt) >= self.max_model_len:
                raise RequestError(
                    f"prompt: got {len(prompt)} tokens, allowed at most {self.max_model_len - 1}"
                )
        return [self._output(i, prompt, p) for i, (prompt, p) in enumerate(zip(ids, params, strict=True))]

    def stream(self, prompts, params):
        return self._stream(prompts, params)

    def _stream(self, prompts, params):
        for output in self.generate(prompts, params):
            completion = output.outputs[0]
            text = completion.text
            for end in range(1, len(text) + 1):
                completion.text, completion.delta = text[:end], text[end - 1]
                yield output

    def _output(self, index, prompt, params):
        text = (self.reply * 100)[: min(params.max_tokens or 1_000_000, self.max_model_len - len(prompt))]
        text = text if params.ignore_eos else text[: len(self.reply)]
        metrics = RequestMetrics(
            arrival_time=10.0,
            first_token_time=10.5,
            last_token_time=11.5,
            finished_time=11.5,
            num_prompt_tokens=len(prompt),
            num_generated_tokens=len(text),
        )
        completion = CompletionOutput(index, text, [ord(c) for c in text], None, None, "length")
        return RequestOutput(str(index), None, prompt, [completion], True, metrics)


@pytest.fixture
def llm(monkeypatch):
    fake = FakeLLM()
    fake.resolved = []  # what each load was asked for

    def build_llm(resolved):
        fake.resolved.append(resolved)
        loaded = copy.copy(fake)
        loaded.dtype = {"auto": "bfloat16"}.get(resolved.config.dtype, resolved.config.dtype)
        return loaded

    for verb in ("chat", "predict", "eval"):
        monkeypatch.setattr(f"llm_boost.cli.{verb}.build_llm", build_llm)
    return fake


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a command line in an empty directory: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL", "DTYPE", "THREADS", "SEED", "CACHE"):
        monkeypatch.delenv(f"LLM_BOOST_{name}", raising=False)

    def run(*args):
        code = cli_main.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
