"""The two pipelines that Llama and Qwen models use, put together from parts of the `tokenizers` library.

- byte-level BPE: split by the family's regular expression, spell every byte as a printable character, merge;
- sentencepiece BPE: spaces become "▁", characters outside the vocabulary fall back to byte tokens, merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llm_boost.errors import TokenizerError

SPACE = "▁"  # sentencepiece's visible space

# Merges come from every way to cut a piece in two: quadratic in its length. Real pieces have under 100.
MAX_PIECE_CHARS = 1024


@dataclass(frozen=True)
class Pretokenizer:
    """How a byte-level BPE family cuts text before merging.

    `splits` are regular expressions applied one after the other, each to what the ones before left over;
    whatever none of them matches is a word of its own.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token as a whole is that token, whatever the merges say
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

# The names are those of GGUF's `tokenizer.ggml.pre`.
PRETOKENIZERS: Mapping[str, Pretokenizer] = {
    "default": Pretokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": Pretokenizer((_GPT2,)),
    "smollm": Pretokenizer((r"\p{N}", _GPT2)),
    "starcoder": Pretokenizer((r"\p{N}", _GPT2)),
    "qwen2": Pretokenizer((_QWEN2,), nfc=True),
    "deepseek-r1-qwen": Pretokenizer((_QWEN2,)),
    "llama-bpe": Pretokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "llama-v3": Pretokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "llama3": Pretokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
}


def byte_level_bpe(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], pretokenizer: Pretokenizer, source: str
) -> Tokenizer:
    """A byte-level BPE pipeline; `source` names the file in errors."""
    with library_errors(f"{source}: the vocabulary and merges do not fit"):
        model = models.BPE(dict(vocab), list(merges), ignore_merges=pretokenizer.ignore_merges)
    tokenizer = Tokenizer(model)
    if pretokenizer.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in pretokenizer.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@dataclass(frozen=True)
class SentencePieceOptions:
    """What of a sentencepiece model's normaliser and trainer matters when text is encoded."""

    unk_token: str | None = "<unk>"
    byte_fallback: bool = True
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    legacy: bool = True


def sentencepiece_bpe(
    vocab: Mapping[str, int], scores: Mapping[str, float], options: SentencePieceOptions, source: str
) -> Tokenizer:
    """A sentencepiece BPE pipeline.

    `scores` holds the pieces that merging may build (neither control nor byte pieces); the higher the score,
    the earlier the merge. With `legacy` each stretch of text between special tokens gets a leading space, as
    in sentencepiece, Llama 2's own code and transformers 4; without, only the start of the text does, and
    not if it begins with a space already, as in transformers 5.
    """
    merges = merges_by_score(vocab, scores, source)
    with library_errors(f"{source}: not a usable vocabulary"):
        model = models.BPE(
            dict(vocab),
            merges,
            unk_token=options.unk_token,
            fuse_unk=True,
            byte_fallback=options.byte_fallback,
        )
    tokenizer = Tokenizer(model)

    normalize: list[normalizers.Normalizer] = []
    if options.remove_extra_whitespaces:
        normalize += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if options.legacy:
        if options.add_dummy_prefix:
            normalize.append(normalizers.Prepend(SPACE))
        normalize.append(normalizers.Replace(" ", SPACE))
    else:
        scheme = "first" if options.add_dummy_prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    if normalize:
        tokenizer.normalizer = normalizers.Sequence(normalize)

    decode: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if options.add_dummy_prefix:
        decode.append(decoders.Strip(" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def merges_by_score(
    vocab: Mapping[str, int], scores: Mapping[str, float], source: str
) -> list[tuple[str, str]]:
    """The merge list equal to sentencepiece's rule "join the neighbours whose joint piece scores highest".

    Every way to cut a piece into two others is a merge; better pieces come first, among equals the older
    piece, and of one piece's cuts the one with the shorter left part.
    """
    ranked: list[tuple[float, int, int, str]] = []
    for piece, score in scores.items():
        if len(piece) > MAX_PIECE_CHARS:
            raise TokenizerError(
                f"{source}: piece {vocab[piece]} has {len(piece)} characters, at most {MAX_PIECE_CHARS} may"
            )
        ranked += [
            (-score, vocab[piece], cut, piece)
            for cut in range(1, len(piece))
            if piece[:cut] in scores and piece[cut:] in scores
        ]
    ranked.sort(key=lambda entry: entry[:3])
    return [(piece[:cut], piece[cut:]) for _, _, cut, piece in ranked]


def add_boundaries(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make `encode` put `bos` before and `eos` after the text (None: nothing); both are in the vocabulary."""
    special = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token is not None]
    template = [token for token in (bos, "$A", eos) if token is not None]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)


@contextmanager
def library_errors(prefix: str) -> Iterator[None]:
    """What the tokenizers library has against a file becomes a TokenizerError."""
    try:
        yield
    except BaseException as error:
        # A Rust panic is no Exception, so that nobody swallows it by accident; here it is a damaged file.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{prefix}: {one_line(error)}") from None
        raise


def one_line(error: BaseException) -> str:
    """The error's text without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
