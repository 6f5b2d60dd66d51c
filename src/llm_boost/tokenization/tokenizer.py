"""The tokenizer that the rest of the house uses, whatever file it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from llm_boost.errors import RequestError, TokenizerError
from llm_boost.tokenization.chat_template import render_chat
from llm_boost.tokenization.detokenize import Detokenizer, DetokenizeStream


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens with a role, as text; None where the model has none."""

    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None

    def as_variables(self) -> dict[str, str]:
        """Under the names that chat templates know."""
        roles = {
            "bos_token": self.bos,
            "eos_token": self.eos,
            "unk_token": self.unk,
            "pad_token": self.pad,
        }
        return {role: token for role, token in roles.items() if token is not None}


class PlacedToken(NamedTuple):
    """A token, and the characters of the text that it stands for."""

    id: int
    text: str
    start: int
    stop: int


@dataclass(frozen=True)
class ChatTemplates:
    """A model's templates by name ("default", "tool_use", ...), and the file they came from."""

    named: Mapping[str, str] = field(default_factory=dict)
    source: str = "chat_template"


class Tokenizer:
    """Text to ids and back, and chats to prompts.

    Made by `load_tokenizer` or `Tokenizer.from_gguf`. Safe to use from several threads at once.

    `vocab_size` counts the ids, added tokens among them; a model may have more rows than that.
    `eos_token_ids` are all ids that end a text, `eos_token_id` is the first of them.
    `model_max_length` (in tokens) is None where the checkpoint names none.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: SpecialTokens,
        *,
        source: str,
        eos_token_ids: Iterable[int] = (),
        chat_templates: ChatTemplates | None = None,
        model_max_length: int | None = None,
    ) -> None:
        """`source` names the file in errors; `eos_token_ids` end a text as the eos token itself does."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = special_tokens
        self._source = source
        self._chat_templates = chat_templates or ChatTemplates()
        self._detokenizer = Detokenizer(backend, source)
        self.model_max_length = model_max_length
        self.vocab_size = max(
            backend.get_vocab_size(), 1 + max(backend.get_added_tokens_decoder(), default=-1)
        )
        self.bos_token_id = self._id_of(special_tokens.bos, "bos_token")
        self.pad_token_id = self._id_of(special_tokens.pad, "pad_token")
        self.unk_token_id = self._id_of(special_tokens.unk, "unk_token")
        eos_token_id = self._id_of(special_tokens.eos, "eos_token")
        more_eos_ids = list(eos_token_ids)
        if eos_token_id is None and more_eos_ids:
            eos_token_id = more_eos_ids[0]
        self.eos_token_id = eos_token_id
        self.eos_token_ids = frozenset(
            more_eos_ids if eos_token_id is None else [eos_token_id, *more_eos_ids]
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, source: str = "GGUF") -> Tokenizer:
        """The tokenizer inside a GGUF file; `metadata` maps its keys to plain values and lists.

        `source` names the file in errors.
        TokenizerError: a key is missing or of the wrong type, or the tokenizer is of a kind not known here.
        """
        from llm_boost.tokenization.gguf import load_gguf_tokenizer

        return load_gguf_tokenizer(metadata, source)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. Special tokens written in it become their ids. RequestError: it is not Unicode.

        `add_special_tokens` puts the beginning-of-sequence token in front where the model wants one.
        """
        return self._encode(text, add_special_tokens).ids

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool = True) -> list[PlacedToken]:
        """The tokens of a text, each with its place in it; those that were added stand for nothing of it."""
        encoding = self._encode(text, add_special_tokens)
        return [
            PlacedToken(
                token, text[start:stop] or self.decode([token], skip_special_tokens=False), start, stop
            )
            for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def _encode(self, text: str, add_special_tokens: bool) -> Encoding:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:
            if not isinstance(text, str):
                raise
            at = next(index for index, character in enumerate(text) if "\ud800" <= character <= "\udfff")
            raise RequestError(
                f"prompt: U+{ord(text[at]):04X} at character {at} is half of a surrogate pair; send both"
            ) from None

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD, ids without a token nothing."""
        return self._detokenizer.decode(ids, skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True, *, after: Iterable[int] = ()) -> DetokenizeStream:
        """Decodes ids as they come.

        `after`: the ids that came before (a prompt). Their text is not repeated, but it counts: a
        sentencepiece vocabulary drops the space before the first word of a text, not of its continuation.
        """
        stream = DetokenizeStream(self._detokenizer, skip_special_tokens)
        for token_id in after:
            stream.push(token_id)
        return stream

    def to_json(self) -> str:
        """What a tokenizer.json would hold: vocabulary, pipeline and added tokens."""
        return self._backend.to_str(pretty=True)

    @property
    def source(self) -> str:
        """The file that it came from, for messages."""
        return self._source

    @property
    def special_tokens(self) -> SpecialTokens:
        return self._special_tokens

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """All chat templates by name."""
        return self._chat_templates.named

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, a special one by its name; nothing for ids without a token."""
        return self._detokenizer.token_bytes(token_id, skip_special_tokens=False)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The ids that are no text: `skip_special_tokens` leaves them out."""
        return self._detokenizer.special_token_ids

    @property
    def chat_template(self) -> str | None:
        """The default chat template, None if the model has none."""
        return self._chat_templates.named.get("default")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a chat: `messages` are {"role", "content", ...}, `tools` JSON schemas of functions.

        `chat_template` is a template's name or text, by default the model's "tool_use" if there are tools,
        else its "default". `variables` are passed on to it (such as enable_thinking). What it may use of time
        and memory is said in the module `chat_template`.
        RequestError: the messages are at fault; TokenizerError: the template is.
        """
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise RequestError(
                    f"messages[{index}]: {type(message).__name__}, it must be an object with a role"
                )
        template, source = self._choose_template(chat_template, tools)
        return render_chat(
            template,
            {
                **self._special_tokens.as_variables(),
                "documents": None,
                **variables,
                "messages": list(messages),
                "tools": None if tools is None else list(tools),
                "add_generation_prompt": add_generation_prompt,
            },
            source,
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The ids of `apply_chat_template(messages, **options)`.

        The template alone decides on the beginning-of-sequence token, so there never are two.
        """
        return self.encode(self.apply_chat_template(messages, **options), add_special_tokens=False)

    def _choose_template(
        self, asked: str | None, tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[str, str]:
        """A template, and where it came from."""
        named, source = self._chat_templates.named, self._chat_templates.source
        if asked is not None and asked not in named:
            return asked, "chat_template"
        for name in (asked,) if asked else ("tool_use", "default") if tools else ("default",):
            if name in named:
                return named[name], source
        if named:
            raise RequestError(
                f"chat_template: {self._source} has no default one; choose one of {', '.join(sorted(named))}"
            )
        raise RequestError(
            f"chat_template: {self._source} has none; give one, or complete a plain prompt instead"
        )

    def _id_of(self, token: str | None, role: str) -> int | None:
        if token is None:
            return None
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(f"{self._source}: {role} {token!r} is not in the vocabulary")
        return token_id
