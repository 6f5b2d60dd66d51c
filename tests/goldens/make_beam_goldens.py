"""What transformers' beam search finds with the tiny checkpoints, in float32.

    python tests/goldens/make_beam_goldens.py

Needs the `reference` extra. Writes tests/goldens/beam_search.json: a list of cases, each with the tokens (the
prompt left out, ends of sequence included) and the scores of the texts that were found, the best first.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
# Random models hardly ever say that a text ends. So ends are tokens that they do say: the commonest of these.
CASES = [
    {
        "model": model,
        "prompt": prompt,
        "beam_width": width,
        "max_tokens": 24,
        "length_penalty": penalty,
        "ends": ends,
    }
    for model in ("llama", "qwen2")
    for prompt in ("prompt_1", "prompt_17")
    for width, penalty, ends in (
        (1, 1.0, 0),
        (2, 1.0, 1),
        (4, 1.0, 0),
        (4, 0.0, 2),
        (5, 2.0, 1),
        (8, -1.0, 3),
    )
]


@torch.inference_mode()
def search(case: dict[str, object]) -> dict[str, object]:
    model = AutoModelForCausalLM.from_pretrained(HERE.parent / "golden_models" / str(case["model"]))
    model = model.float().eval()
    with np.load(HERE / f"{case['model']}.npz") as golden:
        prompt = torch.from_numpy(golden[str(case["prompt"])])[None].long()
    options = {
        "num_beams": case["beam_width"],
        "num_return_sequences": case["beam_width"],
        "max_new_tokens": case["max_tokens"],
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "pad_token_id": 257,
    }
    free = model.generate(prompt, eos_token_id=267, **{**options, "num_beams": 8, "num_return_sequences": 8})
    said = free.sequences[:, prompt.shape[1] :].flatten().tolist()
    common = sorted(set(said), key=lambda token: (-said.count(token), token))
    eos = common[1 : 1 + int(str(case["ends"]))] or [267]
    found = model.generate(
        prompt, eos_token_id=eos, length_penalty=case["length_penalty"], early_stopping=False, **options
    )
    texts = []
    for row in found.sequences[:, prompt.shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        texts.append(row[:end])
    scores = found.sequences_scores.tolist() if int(str(case["beam_width"])) > 1 else None
    return {**case, "eos": eos, "texts": texts, "scores": scores}


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = ",\n".join(json.dumps(search(case)) for case in CASES)
    (HERE / "beam_search.json").write_text(f"[\n{lines}\n]\n")
