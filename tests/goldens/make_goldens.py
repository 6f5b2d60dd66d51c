"""Tiny random checkpoints, and what transformers makes of them in float32.

    python tests/goldens/make_goldens.py

Needs the `reference` extra. For every architecture of `MODELS` it writes

    tests/golden_models/NAME/   config.json, bfloat16 safetensors, byte-level tokenizer, chat template
    tests/goldens/NAME.npz      for each prompt length n: prompt_n [n], greedy_n [32] and
                                logits_n [rows, vocab], the last rows (all of them for a short prompt)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = Path(__file__).parent
PROMPT_LENGTHS = (1, 17, 300)
LOGIT_ROWS = {1: 1, 17: 17, 300: 2}
NEW_TOKENS = 32
MIN_MARGIN = 1e-3

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# 256 bytes, the special tokens, and a few ids without a token, as padded vocabularies have them. Like some of
# the widths below, it is no multiple of what kernels like best: the padding is tested too.
COMMON = {
    "vocab_size": 268,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-3,  # large, so that a norm which overlooks it is noticed
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": None,
}

Build = Callable[[], PreTrainedModel]
MODELS: dict[str, Build] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            **COMMON,
        )
    ),
    # The original context is shorter than the longest prompt, so that every branch of the scaling is at work.
    "llama3": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=80,
            intermediate_size=40,
            num_attention_heads=5,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            **COMMON,
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=64,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            **COMMON,
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=64,
            intermediate_size=48,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=32,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            **COMMON,
        )
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(
            hidden_size=48,
            intermediate_size=64,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=None,
            tie_word_embeddings=False,
            **COMMON,
        )
    ),
}
SHARDED = "mistral"
OLD_CONFIG = "llama"


def draw_weights(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Random weights under which no part of the model is idle: uneven attention, logits of deviation 2."""
    tied = model.config.tie_word_embeddings
    for name, weight in model.named_parameters():
        fan_in = weight.shape[-1]
        if "norm" in name:
            mean, std = (1.5, 0.3) if "q_norm" in name or "k_norm" in name else (1.0, 0.2)
        elif name.endswith("bias"):
            mean, std = 0.0, 0.3 if "v_proj" in name else 0.7
        elif "lm_head" in name or ("embed_tokens" in name and tied):
            mean, std = 0.0, 2.0 / fan_in**0.5
        elif "embed_tokens" in name:
            mean, std = 0.0, 0.5
        elif "q_proj" in name or "k_proj" in name:
            mean, std = 0.0, 1.6 / fan_in**0.5
        else:  # strong enough that a tied head does not just repeat the last token
            mean, std = 0.0, 1.5 / fan_in**0.5
        values = mean + std * torch.randn(weight.shape, generator=generator)
        weight.data = values.bfloat16().float()


def reference(model: PreTrainedModel, generator: torch.Generator) -> dict[str, np.ndarray] | None:
    """Prompts, logits and greedy tokens; None where a greedy choice is nearly a tie."""
    golden: dict[str, np.ndarray] = {}
    for length in PROMPT_LENGTHS:
        prompt = torch.randint(0, 256, (1, length), generator=generator)
        tokens = prompt
        for _ in range(NEW_TOKENS):
            (best, second), (token, _) = model(tokens).logits[0, -1].topk(2)
            if best - second < MIN_MARGIN:
                return None
            tokens = torch.cat([tokens, token[None, None]], dim=1)
        greedy = tokens[0, length:].numpy()
        if len(set(greedy.tolist())) < NEW_TOKENS // 4:  # a model that repeats itself tests little
            return None
        golden[f"prompt_{length}"] = prompt[0].numpy().astype(np.int32)
        golden[f"greedy_{length}"] = greedy.astype(np.int32)
        golden[f"logits_{length}"] = model(prompt).logits[0, -LOGIT_ROWS[length] :].numpy()
    return golden


def check_health(name: str, model: PreTrainedModel, golden: dict[str, np.ndarray]) -> None:
    """The goldens would notice a fault: logits are spread, attention prefers some tokens to others."""
    spread = float(np.std(golden["logits_17"]))
    assert 1 < spread < 3, f"{name}: logits have standard deviation {spread:.2f}"
    prompt = torch.from_numpy(golden["prompt_300"])[None].long()
    for layer, weights in enumerate(model(prompt, output_attentions=True).attentions):
        last = weights[0, :, -1].double()  # [heads, 300]
        effective = (-(last * last.clamp_min(1e-12).log()).sum(-1)).exp()
        assert 2 < effective.mean() < 200, f"{name}: layer {layer} attends to {effective.tolist()} tokens"
        print(f"{name}: layer {layer} attends to {effective.mean():.0f} of 300 tokens, logits {spread:.2f}")


def save_tokenizer(directory: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)


def rewrite_config_as_transformers_4(path: Path) -> None:
    """The same settings under the names that most checkpoints in the world carry."""
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    config["transformers_version"] = "4.40.0"
    del config["head_dim"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.inference_mode()
def make(name: str, build: Build) -> None:
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        model = build().float().eval()
        model.set_attn_implementation("eager")
        draw_weights(model, generator)
        if golden := reference(model, generator):
            break
    else:
        raise SystemExit(f"{name}: no seed gives greedy tokens without ties")
    check_health(name, model, golden)

    directory = HERE.parent / "golden_models" / name
    shutil.rmtree(directory, ignore_errors=True)
    save_tokenizer(directory)
    model.bfloat16().save_pretrained(directory, max_shard_size="50KB" if name == SHARDED else "1GB")
    (directory / "generation_config.json").unlink(missing_ok=True)
    if name == OLD_CONFIG:
        rewrite_config_as_transformers_4(directory / "config.json")
    np.savez_compressed(HERE / f"{name}.npz", **golden)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, build in MODELS.items():
        make(name, build)
