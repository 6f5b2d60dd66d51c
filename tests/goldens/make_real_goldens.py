"""Greedy continuations of real checkpoints by transformers in float32, one JSON file a model.

    python tests/goldens/make_real_goldens.py ~/.cache/llm-boost/models/smollm2-135m

Needs the `reference` extra. The end-of-sequence token is a token like any other here, so that every
continuation has the same length. `margins` tells how far the best logit stood above the second at each step:
where it is within float32 noise, two right implementations may part.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 64

CHATS = [
    "帮我制定一份去上海的旅游攻略",
    "你好,请介绍一下你自己。",
    "用一句话解释什么是机器学习。",
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Translate to French: The weather is nice today.",
    "¿Cuál es la capital de Perú?",
]

TEXTS = [
    "帮我制定一份去上海的旅游攻略",
    "北京是中国的首都,",
    "人工智能的未来发展趋势包括",
    "春眠不觉晓,处处闻啼鸟。",
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def quicksort(items):\n",
    "#include <vector>\n\nint main() {\n",
    "SELECT name, COUNT(*) FROM orders",
    '{"name": "Ada", "born": 1815, "works": [',
    "1, 1, 2, 3, 5, 8, 13,",
    "Q: What is 17 * 23?\nA:",
    "Les trois mousquetaires sont",
    "日本の首都は",
    "Москва — это",
    "The mitochondrion is the powerhouse of the cell. " * 12,
    "🎉 Happy birthday! 🎂",
    "I",
]


@torch.inference_mode()
def continue_greedily(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The next NEW_TOKENS tokens, and by how much each one's logit was the largest."""
    tokens, margins = [], []
    output = model(torch.tensor([prompt]), use_cache=True)
    while True:
        best, second = output.logits[0, -1].topk(2).values.tolist()
        margins.append(round(best - second, 5))
        tokens.append(int(output.logits[0, -1].argmax()))
        if len(tokens) == NEW_TOKENS:
            return tokens, margins
        output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a Hugging Face directory; its name names the file written")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    prompts = [(text, tokenizer(text)["input_ids"]) for text in TEXTS]
    for text in CHATS:
        chat = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompts.append((rendered, tokenizer(rendered, add_special_tokens=False)["input_ids"]))

    lines = []
    for text, prompt in prompts:
        tokens, margins = continue_greedily(model, prompt)
        print(f"{min(margins):8.5f}  {text[-40:]!r} -> {tokenizer.decode(tokens)[:60]!r}", flush=True)
        case = {"text": text, "prompt": prompt, "tokens": tokens, "margins": margins}
        lines.append(json.dumps(case, ensure_ascii=False))
    target = Path(__file__).parent / f"{arguments.model.name}.json"
    target.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
