"""Token ids to text, at once or one by one.

Every token stands for a few bytes; text is their concatenation read as UTF-8. Working on bytes makes
streaming exact (half a character simply waits for its other half) and linear in the number of tokens.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

from llm_boost.errors import TokenizerError
from llm_boost.tokenization.pipelines import SPACE

_EACH_BYTE = "llm_boost.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for each byte that is not UTF-8, as sentencepiece does it ("replace" joins some)."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class Detokenizer:
    """What the tokens of a vocabulary stand for.

    Equal to the `decode` of the tokenizer's own pipeline, but for one thing: where byte tokens of a
    sentencepiece vocabulary are not UTF-8, the good characters beside the bad bytes stay (as in sentencepiece
    itself), while the pipeline would give up the whole run of byte tokens.
    """

    def __init__(self, backend: Backend, source: str) -> None:
        self._backend = backend
        self._token_bytes, self.errors, self.strip = _understand_decoder(backend, source)
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._cache: dict[int, bytes] = {}

    def token_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes:
        """The bytes of one token; none for ids outside the vocabulary (models pad theirs)."""
        if skip_special_tokens and token_id in self.special_token_ids:
            return b""
        found = self._cache.get(token_id)
        if found is None:
            token = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
            found = self._cache[token_id] = b"" if token is None else self._token_bytes(token)
        return found

    def decode(self, ids: Iterable[int], skip_special_tokens: bool) -> str:
        data = b"".join(self.token_bytes(token_id, skip_special_tokens) for token_id in ids)
        text = data.decode("utf-8", self.errors)
        return text[_leading_spaces(text, self.strip) :]


class DetokenizeStream:
    """Text as it is made: all that `push` returns, and `finish` at the end, joined, is `decode` of all ids.

    No call ever returns part of a character, and each takes time in its own token alone.
    """

    def __init__(self, detokenizer: Detokenizer, skip_special_tokens: bool) -> None:
        self._detokenizer = detokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(detokenizer.errors)
        self._strip = detokenizer.strip

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        return self._emit(self._detokenizer.token_bytes(token_id, self._skip_special_tokens), final=False)

    def finish(self) -> str:
        """What is left: a character that never was finished, as U+FFFD."""
        return self._emit(b"", final=True)

    def _emit(self, data: bytes, final: bool) -> str:
        text = self._utf8.decode(data, final)
        if self._strip and text:
            stripped = _leading_spaces(text, self._strip)
            self._strip = self._strip - stripped if stripped == len(text) else 0
            text = text[stripped:]
        return text


def _leading_spaces(text: str, at_most: int) -> int:
    count = 0
    while count < min(at_most, len(text)) and text[count] == " ":
        count += 1
    return count


def _understand_decoder(backend: Backend, source: str) -> tuple[Callable[[str], bytes], str, int]:
    """(bytes of a token, UTF-8 error handler, leading spaces to drop) of the pipeline's decoder."""
    steps = _decoder_steps(backend)
    names = [step["type"] for step in steps]
    if [name for name in names if name != "Fuse"] == ["ByteLevel"]:
        return _byte_level_bytes, "replace", 0
    spaces = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    if names[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == spaces:
        rest = steps[3:]
        if not rest:
            return _byte_fallback_bytes, _EACH_BYTE, 0
        if names[3:] == ["Strip"] and rest[0]["content"] == " " and rest[0]["stop"] == 0:
            return _byte_fallback_bytes, _EACH_BYTE, int(rest[0]["start"])
    raise TokenizerError(
        f"{source}: decoder {'+'.join(names) or 'null'} is not supported; "
        "supported are ByteLevel, and Replace+ByteFallback+Fuse+Strip of sentencepiece vocabularies"
    )


def _decoder_steps(backend: Backend) -> list[Mapping[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the other 68 for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    spelled.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return spelled


_BYTE_OF = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:  # an added token is plain text, not spelled bytes
        return token.encode("utf-8")


def _byte_fallback_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(SPACE, " ").encode("utf-8")
