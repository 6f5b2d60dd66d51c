"""A tokenizer as files of another format: Hugging Face's from GGUF metadata, GGUF metadata from any.

The way between the two is `tokenizers`' own serialisation, the text of a tokenizer.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_boost.errors import TokenizerError
from llm_boost.tokenization.pipelines import PRETOKENIZERS
from llm_boost.tokenization.sentencepiece_model import PieceType
from llm_boost.tokenization.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_PADDING = "[PAD{}]"  # what llama.cpp calls a row of the embedding without a token
_UNREACHABLE_SCORE = -1e6
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def huggingface_files(metadata: Mapping[str, Any], source: str, max_length: int) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json and chat templates, by name: the same ids as the GGUF file's.

    TokenizerError: see `Tokenizer.from_gguf`.
    """
    tokenizer = Tokenizer.from_gguf(_without_padding(metadata), source=source)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json says it all
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **tokenizer.special_tokens.as_variables(),
    }
    files = {
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
    for name, template in tokenizer.chat_templates.items():
        file = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        files[file] = template
    return files


def gguf_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """`tokenizer.*` of a GGUF file whose embedding has `rows` rows.

    TokenizerError: a vocabulary of another kind, or larger than the embedding; a way to cut text that
    llama.cpp has no name for; merges that no scores can stand for.
    """
    spec = json.loads(tokenizer.to_json())
    model, source = spec["model"], tokenizer.source
    if model["type"] != "BPE":
        raise TokenizerError(f"{source}: its model is {model['type']}; GGUF output is supported for BPE")
    if tokenizer.vocab_size > rows:
        raise TokenizerError(f"{source}: {tokenizer.vocab_size} tokens, the embedding has {rows} rows")
    tokens = [_PADDING.format(i) for i in range(rows)]
    types = np.full(rows, PieceType.UNUSED, np.int32)
    for token, token_id in model["vocab"].items():
        is_byte = model["byte_fallback"] and _BYTE_PIECE.fullmatch(token)
        tokens[token_id], types[token_id] = token, PieceType.BYTE if is_byte else PieceType.NORMAL
    for added in spec["added_tokens"]:
        kind = PieceType.CONTROL if added["special"] else PieceType.USER_DEFINED
        kind = PieceType.UNKNOWN if added["content"] == model["unk_token"] else kind
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    byte_level = any(part["type"] == "ByteLevel" for part in _parts(spec["decoder"], "decoders"))
    if byte_level:
        kind_of = {"model": "gpt2", "pre": _pretokenizer(spec, source)}
        pieces: dict[str, Any] = {"merges": [" ".join(merge) for merge in merges]}
    else:
        kind_of = {"model": "llama", "pre": "default"}
        pieces = {"scores": _scores(model["vocab"], merges, types, source), **_spaces(spec)}
    return {
        **{_PREFIX + key: value for key, value in kind_of.items()},
        _PREFIX + "tokens": tokens,
        _PREFIX + "token_type": types,
        **{_PREFIX + key: value for key, value in pieces.items()},
        **_roles(tokenizer),
        **_templates(tokenizer),
    }


def _without_padding(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The vocabulary without the rows at its end that have no token."""
    tokens, types = metadata.get(_PREFIX + "tokens"), metadata.get(_PREFIX + "token_type")
    if not isinstance(tokens, list) or types is None or len(types) != len(tokens):
        return dict(metadata)
    end = len(tokens)
    while end and types[end - 1] == PieceType.UNUSED and tokens[end - 1] == _PADDING.format(end - 1):
        end -= 1
    cut = {_PREFIX + key: metadata.get(_PREFIX + key) for key in ("tokens", "token_type", "scores")}
    return {**metadata, **{key: value[:end] for key, value in cut.items() if value is not None}}


def _parts(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A pipeline's step, or the steps of a sequence."""
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _pretokenizer(spec: Mapping[str, Any], source: str) -> str:
    """The name that llama.cpp has for this way to cut text."""
    splits: list[str] = []
    for part in _parts(spec["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            splits.append(part["pattern"].get("Regex") or re.escape(part["pattern"]["String"]))
        elif part["type"] == "Digits" and part["individual_digits"]:
            splits.append(r"\p{N}")
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            splits += PRETOKENIZERS["gpt-2"].splits if part["use_regex"] else ()
        else:
            raise TokenizerError(
                f"{source}: llama.cpp cannot cut text as the pre-tokenizer {part['type']} does"
            )
    normalizers = {part["type"] for part in _parts(spec["normalizer"], "normalizers")}
    if normalizers - {"NFC"}:
        raise TokenizerError(f"{source}: llama.cpp cannot normalise text by {', '.join(sorted(normalizers))}")
    names = [name for name, known in PRETOKENIZERS.items() if known.splits == tuple(splits)]
    exact = [
        name
        for name in names
        if PRETOKENIZERS[name].nfc == bool(normalizers)
        and PRETOKENIZERS[name].ignore_merges == bool(spec["model"].get("ignore_merges"))
    ]
    if not names:
        raise TokenizerError(f"{source}: llama.cpp has no name for its way to cut text, {splits!r}"[:400])
    return (exact or names)[0]


def _scores(
    vocab: Mapping[str, int], merges: list[tuple[str, ...]], types: np.ndarray[Any, Any], source: str
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Sentencepiece's score of every piece, of which the order alone counts: the rank of its first merge.

    Joining by score makes every merge that two pieces of the vocabulary allow, so each must be in the list.
    """
    scores = np.full(len(types), _UNREACHABLE_SCORE, np.float32)
    mergeable = {
        piece for piece, token_id in vocab.items() if types[token_id] in (PieceType.NORMAL, PieceType.UNUSED)
    }
    products = list(dict.fromkeys(left + right for left, right in merges))
    runs = sum(1 for at, (a, b) in enumerate(merges) if at == 0 or "".join(merges[at - 1]) != a + b)
    possible = sum(
        piece[:cut] in mergeable and piece[cut:] in mergeable
        for piece in products
        for cut in range(1, len(piece))
    )
    if runs != len(products) or possible != len(merges) or not mergeable.issuperset(products):
        raise TokenizerError(
            f"{source}: its merges do not follow from scores, which GGUF's sentencepiece vocabulary has; "
            "put the model's tokenizer.model in their place"
        )
    for rank, piece in enumerate(products):
        scores[vocab[piece]] = -rank
    scores[(types != PieceType.NORMAL) & (types != PieceType.UNUSED)] = 0
    return scores


def _spaces(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What sentencepiece does with spaces, by the steps that `pipelines.sentencepiece_bpe` makes of it."""
    normalize = _parts(spec["normalizer"], "normalizers")
    cut = _parts(spec["pre_tokenizer"], "pretokenizers")
    prepends = any(part["type"] == "Prepend" for part in normalize) or any(
        part["type"] == "Metaspace" and part["prepend_scheme"] != "never" for part in cut
    )
    strips = any(part["type"] == "Replace" and part["content"] in ("", " ") for part in normalize)
    return {"add_space_prefix": prepends, "remove_extra_whitespaces": strips}


def _roles(tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of tokens with a role. A text may end in three ways: the end of it, of a turn, of a message."""
    boundaries = tokenizer.encode("")
    begins = tokenizer.bos_token_id is not None and boundaries[:1] == [tokenizer.bos_token_id]
    ends = [i for i in (tokenizer.eos_token_id,) if i is not None]
    ends += sorted(tokenizer.eos_token_ids - set(ends))
    ids = {
        "bos": tokenizer.bos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        **dict(zip(("eos", "eot", "eom"), ends, strict=False)),
    }
    return {
        **{f"{_PREFIX}{role}_token_id": token_id for role, token_id in ids.items() if token_id is not None},
        _PREFIX + "add_bos_token": begins,
        _PREFIX + "add_eos_token": len(boundaries) > begins,
    }


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
    named = dict(tokenizer.chat_templates)
    found: dict[str, Any] = {"tokenizer.chat_template": named.pop("default")} if "default" in named else {}
    if named:
        found["tokenizer.chat_templates"] = list(named)
        found |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    return found
