"""The engine beside transformers, live: what test_goldens.py asks of files, on prompts never seen before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from golden import GOLDEN_MODELS, NEW_TOKENS, PROMPT_LENGTHS, LoadRunner, Sequences, model_dir, relative_error

pytestmark = [pytest.mark.reference, pytest.mark.parametrize("name", GOLDEN_MODELS)]


def reference_model(name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir(name), dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def test_float32_logits_and_greedy_tokens(name: str, load_runner: LoadRunner) -> None:
    import torch

    rng = np.random.default_rng()  # new prompts each time; a failure shows them
    prompts = [rng.integers(0, 256, length).tolist() for length in PROMPT_LENGTHS]
    sequences = Sequences(load_runner(name, "float32"), prompts)
    logits = sequences.forward(dict(enumerate(prompts)))
    tokens = sequences.greedy(logits)

    model = reference_model(name)
    for i, prompt in enumerate(prompts):
        with torch.inference_mode():
            rows = model(torch.tensor([prompt + tokens[i]])).logits[0].numpy()
        assert relative_error(logits[i], rows[: len(prompt)]) < 1e-4, prompt
        # Each of our tokens is transformers' choice after the ones before it, or ties with it at float noise.
        choices = rows[len(prompt) - 1 : -1]
        lead = choices.max(-1) - np.take_along_axis(choices, np.array(tokens[i])[:, None], -1)[:, 0]
        assert len(lead) == NEW_TOKENS
        assert lead.max() < 1e-4 * np.abs(choices).max(), (prompt, tokens[i])
