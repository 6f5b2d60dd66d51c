"""Finds and reads the tokenizer of a model directory, and the files beside it that say how it is used."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Backend

from llm_boost.errors import TokenizerError
from llm_boost.tokenization.pipelines import (
    PRETOKENIZERS,
    SentencePieceOptions,
    add_boundaries,
    byte_level_bpe,
    library_errors,
    one_line,
    sentencepiece_bpe,
)
from llm_boost.tokenization.sentencepiece_model import PieceType, read_sentencepiece_model
from llm_boost.tokenization.tokenizer import ChatTemplates, SpecialTokens, Tokenizer

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")

# What `overrides`, a YAML's `processor.tokenizer`, may set; any other key is an error.
OVERRIDE_KEYS = frozenset(
    {"type", "vocab_file", "merges_file", "chat_template", "model_max_length", "legacy", "add_prefix_space"}
    | {"add_bos_token", "add_eos_token", "additional_special_tokens", *_ROLES}
)

# Without a tokenizer_config.json these are the tokens beyond vocab.json, in the order of their ids.
_QWEN2_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN2_ROLES = {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def load_tokenizer(
    model_dir: Path,
    *,
    vocab_file: Path | None = None,
    merges_file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """The tokenizer of a checkpoint: tokenizer.json, else vocab.json and merges.txt, else tokenizer.model.

    `vocab_file` and `merges_file` say which files to read instead: both for vocab.json and merges.txt, or the
    vocabulary alone for a tokenizer.model, a tokenizer.json or a directory with one of them. The settings
    beside it (tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja,
    config.json, generation_config.json) are taken from `model_dir`, or else from beside `vocab_file`.

    `overrides` are the keys of a YAML's `processor.tokenizer`; they beat every file, and `vocab_file` and
    `merges_file` as arguments beat those inside it.

    As in transformers 5, a tokenizer.json decides itself whether text begins with BOS, whatever
    tokenizer_config.json says; and with the class Qwen2Tokenizer text is brought to NFC even if the file does
    not ask for it, because that class does. A tokenizer.model begins texts with BOS unless add_bos_token is
    false, and puts a space before the text and before what follows a special token, as sentencepiece does;
    `"legacy": false` gives transformers' newer way, with that space at the start of the text only.

    TokenizerError: a file is missing, damaged or of a kind not supported, an override is wrong.
    """
    settings_above = _checked_overrides(overrides or {})
    vocab_file = vocab_file or _path(settings_above.get("vocab_file"))
    merges_file = merges_file or _path(settings_above.get("merges_file"))
    files = _find(Path(model_dir), _path(vocab_file), _path(merges_file))
    settings = _Settings.read(files.folders, settings_above)
    if files.merges is not None:
        backend, defaults = _from_vocab_and_merges(files.vocabulary, files.merges, settings)
    elif files.vocabulary.suffix == ".json":
        backend, defaults = _from_tokenizer_json(files.vocabulary, settings), _Defaults()
    else:
        backend, defaults = _from_sentencepiece(files.vocabulary, settings)
    return _finish(backend, defaults, settings, files.vocabulary)


@dataclass(frozen=True)
class _Files:
    vocabulary: Path
    merges: Path | None
    folders: tuple[Path, ...]  # where the settings may lie, the first that has them wins


def _path(value: Any) -> Path | None:
    return Path(value) if value else None


def _find(model_dir: Path, vocab_file: Path | None, merges_file: Path | None) -> _Files:
    if vocab_file is None and merges_file is None:
        return _find_in(model_dir, (model_dir,))
    if vocab_file is None:
        vocab_file = model_dir / "vocab.json"
    if vocab_file.is_dir():
        if merges_file is None:
            return _find_in(vocab_file, (model_dir, vocab_file))
        vocab_file = vocab_file / "vocab.json"
    folders = (model_dir, vocab_file.parent)
    for path in (vocab_file, merges_file):
        if path is not None and not path.is_file():
            raise TokenizerError(f"{path}: no such file; check vocab_file and merges_file")
    if merges_file is None and vocab_file.suffix == ".json" and _is_vocabulary(vocab_file):
        merges_file = vocab_file.parent / "merges.txt"
        if not merges_file.is_file():
            raise TokenizerError(
                f"{vocab_file}: a vocabulary without merges; give merges_file (merges.txt) too"
            )
    return _Files(vocab_file, merges_file, folders)


def _is_vocabulary(path: Path) -> bool:
    """A vocab.json, whose values are ids ("model" may be a token); in a tokenizer.json it is an object."""
    return not isinstance(_read_object(path).get("model"), dict)


def _find_in(folder: Path, folders: tuple[Path, ...]) -> _Files:
    if not folder.is_dir():
        raise TokenizerError(f"{folder}: no such directory")
    if (folder / "tokenizer.json").is_file():
        return _Files(folder / "tokenizer.json", None, folders)
    if (folder / "vocab.json").is_file():
        if not (folder / "merges.txt").is_file():
            raise TokenizerError(f"{folder}: it has vocab.json but no merges.txt, they belong together")
        return _Files(folder / "vocab.json", folder / "merges.txt", folders)
    if (folder / "tokenizer.model").is_file():
        return _Files(folder / "tokenizer.model", None, folders)
    raise TokenizerError(f"{folder}: no tokenizer.json, vocab.json with merges.txt, or tokenizer.model in it")


def _checked_overrides(overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in overrides:
        if key not in OVERRIDE_KEYS:
            near = difflib.get_close_matches(str(key), OVERRIDE_KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(OVERRIDE_KEYS))}"
            raise TokenizerError(f"processor.tokenizer.{key}: unknown key; {hint}")
    return overrides


# ---- the settings beside a vocabulary ----


@dataclass(frozen=True)
class _Settings:
    """tokenizer_config.json and its companions, overrides on top; values are checked when asked for."""

    values: Mapping[str, Any]
    origin: str
    added_tokens: Mapping[int, AddedToken]
    templates: ChatTemplates
    eos_token_ids: tuple[int, ...]
    overridden: frozenset[str]

    @classmethod
    def read(cls, folders: tuple[Path, ...], overrides: Mapping[str, Any]) -> _Settings:
        path = _beside(folders, "tokenizer_config.json")
        config = _read_object(path) if path else {}
        origin = str(path or folders[0] / "tokenizer_config.json")
        special = _beside(folders, "special_tokens_map.json")
        values = dict(config)
        if special is not None and "added_tokens_decoder" not in config:
            values.update(_read_object(special))
        overridden = {key: value for key, value in overrides.items() if value is not None}
        values.update(overridden)
        if "type" in overridden:
            values["tokenizer_class"] = overridden["type"]
        return cls(
            values=values,
            origin=origin,
            added_tokens=dict(_added_tokens(folders, values, origin)),
            templates=_chat_templates(folders, config, origin, overridden.get("chat_template")),
            eos_token_ids=tuple(_eos_token_ids(folders)),
            overridden=frozenset(overridden),
        )

    @property
    def tokenizer_class(self) -> str | None:
        name = self._typed("tokenizer_class", str)
        return name.removesuffix("Fast") if isinstance(name, str) else None

    def flag(self, key: str) -> bool | None:
        value = self._typed(key, bool)
        return value if isinstance(value, bool) else None

    def token(self, key: str, default: str | None) -> str | None:
        """A token by its role: text, {"content": text}, or null for none."""
        if key not in self.values:
            return default
        value = self.values[key]
        if value is None:
            return None
        text = _token_text(value)
        if not text:
            raise TokenizerError(f"{self._where(key)}: {value!r}, it must be the text of a token")
        return text

    def more_special_tokens(self) -> Iterator[str]:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = self.values.get(key) or []
            tokens = list(value.values()) if isinstance(value, dict) else value
            if not isinstance(tokens, list) or not all(_token_text(token) for token in tokens):
                raise TokenizerError(f"{self._where(key)}: it must be a list of tokens")
            yield from (str(_token_text(token)) for token in tokens)

    @property
    def model_max_length(self) -> int | None:
        """None too for the huge number that stands for "no limit"."""
        value = self.values.get("model_max_length")
        if value is None or (isinstance(value, (int, float)) and value > 1e15):
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise TokenizerError(
                f"{self._where('model_max_length')}: {value!r}, it must be a positive whole number"
            )
        return value

    def _typed(self, key: str, kind: type) -> object:
        value = self.values.get(key)
        if value is not None and not isinstance(value, kind):
            raise TokenizerError(f"{self._where(key)}: {value!r}, it must be of type {kind.__name__}")
        return value

    def _where(self, key: str) -> str:
        return f"processor.tokenizer.{key}" if key in self.overridden else f"{self.origin}: {key}"


def _token_text(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _added_tokens(
    folders: tuple[Path, ...], config: Mapping[str, Any], origin: str
) -> Iterator[tuple[int, AddedToken]]:
    """The tokens beyond the vocabulary by id, of tokenizer_config.json or the older added_tokens.json."""
    described = config.get("added_tokens_decoder")
    if described is None:
        path = _beside(folders, "added_tokens.json")
        special = {_token_text(config.get(role)) for role in _ROLES}
        special.update(map(_token_text, config.get("additional_special_tokens") or []))
        for content, token_id in (_read_object(path) if path else {}).items():
            is_special = content in special
            token = AddedToken(content, normalized=not is_special, special=is_special)
            yield _token_id(token_id, f"{path}: {content!r}"), token
        return
    if not isinstance(described, dict):
        raise TokenizerError(f"{origin}: added_tokens_decoder must be an object from ids to tokens")
    for key, entry in described.items():
        where = f"{origin}: added_tokens_decoder.{key}"
        text = _token_text(entry)
        if not text or not isinstance(entry, dict) or not key.isascii() or not key.isdigit():
            raise TokenizerError(f"{where}: it must go from an id to an object with a content")
        flags = {
            name: bool(entry.get(name, False))
            for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        }
        yield _token_id(int(key), where), AddedToken(text, **flags)


def _chat_templates(
    folders: tuple[Path, ...], config: Mapping[str, Any], origin: str, override: Any
) -> ChatTemplates:
    """An override, else chat_template.jinja (and additional_chat_templates/), else the configuration's."""
    if override is not None:
        if not isinstance(override, str):
            raise TokenizerError(
                f"processor.tokenizer.chat_template: {override!r}, it must be a template's text"
            )
        return ChatTemplates({"default": override}, "processor.tokenizer.chat_template")
    path = _beside(folders, "chat_template.jinja")
    if path is not None:
        more = sorted((path.parent / "additional_chat_templates").glob("*.jinja"))
        return ChatTemplates(
            {**{file.stem: _read_text(file) for file in more}, "default": _read_text(path)}, str(path)
        )
    return parse_chat_templates(config.get("chat_template"), origin)


def parse_chat_templates(value: Any, origin: str) -> ChatTemplates:
    """One template's text, or a list of {"name", "template"}."""
    if value is None:
        return ChatTemplates({}, origin)
    if isinstance(value, str):
        return ChatTemplates({"default": value}, origin)
    if not isinstance(value, list) or not all(
        isinstance(entry, Mapping)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
        for entry in value
    ):
        raise TokenizerError(
            f"{origin}: chat_template must be a text or a list of objects with name and template"
        )
    return ChatTemplates({entry["name"]: entry["template"] for entry in value}, origin)


def _eos_token_ids(folders: tuple[Path, ...]) -> Iterator[int]:
    """All ids that end a text, by generation_config.json and config.json."""
    for name in ("generation_config.json", "config.json"):
        path = _beside(folders, name)
        value = _read_object(path).get("eos_token_id") if path else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        yield from (_token_id(token_id, f"{path}: eos_token_id") for token_id in ids)


def _token_id(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise TokenizerError(f"{where}: {value!r} is not a token id")
    return value


# ---- the vocabularies ----


@dataclass(frozen=True)
class _Defaults:
    """What holds where the settings are silent; `add_bos` None: the file's own post-processor decides."""

    roles: Mapping[str, str | None] | None = None
    add_bos: bool | None = None


def _from_tokenizer_json(path: Path, settings: _Settings) -> Backend:
    with library_errors(f"{path}: not a usable tokenizer.json"):
        backend = Backend.from_file(str(path))
    if settings.tokenizer_class == "Qwen2Tokenizer" and backend.normalizer is None:
        backend.normalizer = normalizers.NFC()
    known = backend.get_added_tokens_decoder()
    missing = {token_id: token for token_id, token in settings.added_tokens.items() if token_id not in known}
    backend.add_tokens([missing[token_id] for token_id in sorted(missing)])
    for token_id, token in missing.items():
        if backend.token_to_id(token.content) != token_id:
            raise TokenizerError(
                f"{settings.origin}: added_tokens_decoder.{token_id} is {token.content!r}, "
                f"for which {path.name} has no room at that id"
            )
    return backend


def _from_vocab_and_merges(
    vocab_path: Path, merges_path: Path, settings: _Settings
) -> tuple[Backend, _Defaults]:
    name = settings.tokenizer_class or "Qwen2Tokenizer"
    families = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}
    if name not in families:
        raise TokenizerError(
            f"{vocab_path}: vocab.json and merges.txt are supported for {' and '.join(families)}, not {name}"
        )
    if settings.flag("add_prefix_space"):
        raise TokenizerError(f"{settings.origin}: add_prefix_space true is not supported with vocab.json")
    vocab = _read_object(vocab_path)
    for token, token_id in vocab.items():
        _token_id(token_id, f"{vocab_path}: {token!r}")
    added = dict(settings.added_tokens)
    if not added and name == "Qwen2Tokenizer":
        new = [token for token in _QWEN2_TOKENS if token not in vocab]
        ids = {**vocab, **dict(zip(new, count(1 + max(vocab.values(), default=-1)), strict=False))}
        added = {ids[token]: AddedToken(token, normalized=False, special=True) for token in _QWEN2_TOKENS}
    merges = _read_merges(merges_path)
    family = PRETOKENIZERS[families[name]]
    backend = byte_level_bpe(_with_added(vocab, added), merges, family, str(merges_path))
    backend.add_tokens([added[token_id] for token_id in sorted(added)])
    return backend, _Defaults(_QWEN2_ROLES if name == "Qwen2Tokenizer" else None, add_bos=False)


def _from_sentencepiece(path: Path, settings: _Settings) -> tuple[Backend, _Defaults]:
    model = read_sentencepiece_model(path)
    vocab = {piece.text: token_id for token_id, piece in enumerate(model.pieces)}
    if len(vocab) != len(model.pieces):
        raise TokenizerError(f"{path}: {len(model.pieces) - len(vocab)} pieces appear twice")
    add_prefix_space = settings.flag("add_prefix_space")
    legacy = settings.flag("legacy")
    backend = sentencepiece_bpe(
        _with_added(vocab, settings.added_tokens),
        {
            piece.text: piece.score
            for token_id, piece in enumerate(model.pieces)
            if piece.type in (PieceType.NORMAL, PieceType.UNUSED) and token_id not in settings.added_tokens
        },
        SentencePieceOptions(
            unk_token=model.token(model.unk_id),
            byte_fallback=model.byte_fallback,
            add_dummy_prefix=model.add_dummy_prefix if add_prefix_space is None else add_prefix_space,
            remove_extra_whitespaces=model.remove_extra_whitespaces,
            legacy=True if legacy is None else legacy,
        ),
        str(path),
    )
    reserved = [
        AddedToken(piece.text, normalized=False, special=piece.type is not PieceType.USER_DEFINED)
        for token_id, piece in enumerate(model.pieces)
        if piece.type in (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)
        and token_id not in settings.added_tokens
    ]
    backend.add_tokens([*reserved, *settings.added_tokens.values()])
    roles = {
        "bos_token": model.token(model.bos_id),
        "eos_token": model.token(model.eos_id),
        "unk_token": model.token(model.unk_id),
        "pad_token": model.token(model.pad_id),
    }
    return backend, _Defaults(roles, add_bos=True)


def _with_added(vocab: Mapping[str, int], added: Mapping[int, AddedToken]) -> dict[str, int]:
    """The vocabulary with the added tokens at their ids; a placeholder that had the id before gives way."""
    kept = {token: token_id for token, token_id in vocab.items() if token_id not in added}
    return {**kept, **{token.content: token_id for token_id, token in added.items()}}


def _finish(backend: Backend, defaults: _Defaults, settings: _Settings, path: Path) -> Tokenizer:
    """Give the tokens with a role their role, and the text its beginning and end."""
    roles = {role: settings.token(role, (defaults.roles or {}).get(role)) for role in _ROLES}
    for role in _ROLES:
        if role in settings.overridden and backend.token_to_id(roles[role] or "") is None:
            raise TokenizerError(
                f"processor.tokenizer.{role}: {roles[role]!r} is not in the vocabulary of {path}"
            )
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    wanted = dict.fromkeys([*filter(None, roles.values()), *settings.more_special_tokens()])
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in wanted if token not in known]
    )
    if defaults.add_bos is not None or not settings.overridden.isdisjoint({"add_bos_token", "add_eos_token"}):
        add_bos, add_eos = settings.flag("add_bos_token"), settings.flag("add_eos_token")
        if add_bos is None:
            add_bos = defaults.add_bos
        add_boundaries(
            backend, roles["bos_token"] if add_bos else None, roles["eos_token"] if add_eos else None
        )
    return Tokenizer(
        backend,
        SpecialTokens(roles["bos_token"], roles["eos_token"], roles["unk_token"], roles["pad_token"]),
        source=str(path),
        eos_token_ids=settings.eos_token_ids,
        chat_templates=settings.templates,
        model_max_length=settings.model_max_length,
    )


# ---- files ----


def _beside(folders: tuple[Path, ...], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}") from None


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 at byte {error.start}") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: it must hold a JSON object, not a {type(value).__name__}")
    return value


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise TokenizerError(
                f"{path}: line {number} is {line[:80]!r}, it must be two tokens with one space"
            )
        merges.append((left, right))
    return merges
