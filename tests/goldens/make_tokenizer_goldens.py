"""Makes tests/goldens/tokenizers: tiny vocabularies, and what the reference makes of the corpus with them.

    python tests/goldens/make_tokenizer_goldens.py [MODELS]

needs the `reference` extra and protobuf. MODELS is the directory with the real checkpoints (smollm2-135m,
qwen2.5-coder-0.5b), whose token ids and chats are written to real.json; without it that file is left alone.

- qwen2/: vocab.json and merges.txt of a byte-level BPE trained on the corpus; ids from Qwen2Tokenizer.
- llama/: tokenizer.model trained by sentencepiece with Llama 2's settings (BPE, byte fallback, identity
  normalisation, digits alone); ids from sentencepiece itself (stretches between special tokens apart, as
  transformers' legacy LlamaTokenizer does it) and from transformers' LlamaTokenizer with legacy=False.
- chats.json: the templates below, rendered by transformers.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

HERE = Path(__file__).parent
OUT = HERE / "tokenizers"
sys.path.insert(0, str(HERE.parent / "tokenization"))

from tokenizer_corpus import PROSE, TEXTS  # noqa: E402

QWEN2_CONFIG = {
    "tokenizer_class": "Qwen2Tokenizer",
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "model_max_length": 32768,
    "added_tokens_decoder": {
        str(600 + index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.startswith("<|"),
        }
        for index, token in enumerate(
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
        )
    },
}

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = """\
{% if messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>\n' + messages[0]['content'] | trim + '\n<</SYS>>\n\n' %}
    {% set messages = messages[1:] %}
{% else %}
    {% set system = '' %}
{% endif %}
{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {% generation %} {{ message['content'] | trim }} {{ eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
TOOLS = """\
{%- macro describe(tool) %}- {{ tool.function.name }}: {{ tool | tojson }}
{% endmacro %}
{%- set ns = namespace(count=0) %}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {%- if tool.type != 'function' %}{% continue %}{% endif %}
        {%- set ns.count = ns.count + 1 %}
        {{- describe(tool) }}
        {%- if ns.count == 2 %}{% break %}{% endif %}
    {%- endfor %}
    {{- tools | map(attribute='function.name') | join(', ') }}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.content is string %}
        {{- message.content.split('</think>')[-1].lstrip('\\n') }}
    {%- elif message.content is not none %}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' ~ call.function.arguments | tojson(indent=2) ~ '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

SYSTEM = {"role": "system", "content": "  Be brief. "}
USER = {"role": "user", "content": "你好 <b>&'\"\n  who?"}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n I am."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "function": {"name": "now", "arguments": {"zone": "Zürich", "n": [1, 2.5]}}}
    ],
}
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}],
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "天气 <°C>",
        "parameters": {"type": "object", "properties": {}},
    },
}
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [USER]},
    {"messages": [SYSTEM, USER, ASSISTANT, USER]},
    {"messages": [USER, ASSISTANT], "add_generation_prompt": False},
]
TOOL_CONVERSATIONS: list[dict[str, Any]] = [
    {
        "messages": [USER, CALL, {"role": "tool", "content": "12:30"}],
        "tools": [WEATHER, {"type": "x", "function": {"name": "y"}}, WEATHER, WEATHER],
    },
    {"messages": [PARTS], "enable_thinking": False},
]


def main() -> None:
    OUT.mkdir(exist_ok=True)
    expected = {"qwen2": make_qwen2(OUT / "qwen2")}
    expected |= make_llama(OUT / "llama")
    write(OUT / "expected.json", expected)
    write(OUT / "chats.json", make_chats())
    if len(sys.argv) > 1:
        write(OUT / "real.json", {name: of_real_model(Path(sys.argv[1]) / name) for name in REAL})


REAL = ("smollm2-135m", "qwen2.5-coder-0.5b")


def make_qwen2(folder: Path) -> list[list[int]]:
    folder.mkdir(exist_ok=True)
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    trained.model.save(str(folder))
    write(folder / "tokenizer_config.json", QWEN2_CONFIG)
    reference = Qwen2Tokenizer.from_pretrained(folder)
    return [reference.encode(text) for text in TEXTS]


def make_llama(folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(
                line for text in TEXTS + PROSE for line in text.split("\n") if "\0" not in line
            ),
            model_writer=file,
            model_type="bpe",
            vocab_size=1000,
            byte_fallback=True,
            character_coverage=0.98,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            num_threads=1,
            minloglevel=2,
        )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    newer = LlamaTokenizer.from_pretrained(folder, legacy=False, add_bos_token=True)
    return {
        "llama": [encode_stretches(processor, text) for text in TEXTS],
        "llama_not_legacy": [newer.encode(text) for text in TEXTS],
    }


def encode_stretches(processor: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    ids = [processor.bos_id()]
    for stretch in re.split("(<unk>|<s>|</s>)", text):
        special = stretch in ("<unk>", "<s>", "</s>")
        ids += [processor.piece_to_id(stretch)] if special else processor.encode(stretch)
    return ids


def make_chats() -> list[dict[str, Any]]:
    reference = LlamaTokenizer.from_pretrained(OUT / "llama")
    chats = []
    for template, conversations in (
        (CHATML, CONVERSATIONS),
        (INST, CONVERSATIONS),
        (TOOLS, [*CONVERSATIONS, *TOOL_CONVERSATIONS]),
    ):
        chats += [
            {
                "template": template,
                "options": options,
                "text": render(reference, options, chat_template=template),
            }
            for options in conversations
        ]
    return chats


def render(reference: Any, options: dict[str, Any], **more: Any) -> str:
    options = {"add_generation_prompt": True, **options, **more}
    return str(reference.apply_chat_template(options.pop("messages"), tokenize=False, **options))


def of_real_model(folder: Path) -> dict[str, Any]:
    reference = AutoTokenizer.from_pretrained(folder)
    answer: dict[str, Any] = {
        "ids": [reference.encode(text) for text in TEXTS],
        "chats": [{"options": options, "text": render(reference, options)} for options in CONVERSATIONS],
    }
    if folder.name.startswith("smollm2"):
        # Here tokenizer.json has lost SmolLM's rule that every digit is a word; the GGUF still has it.
        reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        answer["gguf_ids"] = [reference.encode(text) for text in TEXTS]
    return answer


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
