"""Grammars over tokens: which token may come next, so that the text obeys a rule. llguidance does the work.

A rule comes from a client, and a line of it can ask for minutes and gigabytes. So it is first compiled in a
process that may be ended (`grammar_worker`); what passes there is compiled again here, in the thread that
checks requests, never in the engine's. What each step may cost is bounded by llguidance's own limits.
"""

from __future__ import annotations

import json
import signal
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llm_boost.engine.batch import Int32Array
from llm_boost.engine.structured_outputs import StructuredOutputsParams
from llm_boost.errors import RequestError
from llm_boost.worker_process import WorkerProcess

if TYPE_CHECKING:
    import llguidance

# To compile a rule. By the clock it may take longer: the machine may be busy.
MAX_CPU_SECONDS = 3.0
MAX_SECONDS = 20.0
MATCHER_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,  # about 7 ms, once a state of the lexer
    "max_lexer_states": 50_000,  # about 2 KB each
    "verbose_errors": False,
}
MAX_CACHED_GRAMMARS = 128
MAX_CACHED_BYTES = 512 << 20  # of all cached grammars, as far as can be measured


class GrammarError(Exception):
    """A text cannot go on under its rule."""


class Vocabulary(Protocol):
    """What grammars need of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, special ones by name; nothing for ids without a token."""
        ...

    @property
    def special_token_ids(self) -> Collection[int]: ...


class Grammar:
    """Where one completion is in its rule."""

    __slots__ = ("_ends", "_hold_ends", "_matcher", "_stops")

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        ends: Sequence[int],
        stops: Sequence[int] = (),
        hold_ends: bool = False,
    ) -> None:
        """`ends` are the tokens that end a text for the matcher.

        `stops` end it too, where `ends` may; with `hold_ends` these come only when nothing else can.
        """
        self._matcher = matcher
        self._ends = ends
        self._stops = stops
        self._hold_ends = hold_ends

    @property
    def error(self) -> str:
        """Why it cannot go on; empty while it can."""
        return _one_line(self._matcher.get_error()) if self._matcher.is_error() else ""

    @property
    def is_finished(self) -> bool:
        """The text is complete, and nothing may follow."""
        return self._matcher.is_stopped()

    def accept(self, token: int) -> None:
        """Goes on by a token; GrammarError for one that the rule does not allow, or cannot cope with."""
        if not self._matcher.consume_token(token):
            raise GrammarError(self.error or f"the rule does not allow the token {token}")

    def copy(self, stops: Sequence[int] = (), hold_ends: bool = False) -> Grammar:
        """Another text at the same place of the rule."""
        return Grammar(self._matcher.deep_copy(), self._ends, stops, hold_ends)

    def fill(self, mask: Int32Array) -> None:
        """Sets the bits of the tokens that may come next; of no others."""
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._stops or self._hold_ends:
            self._adapt(mask.view(np.uint32))

    def _adapt(self, words: NDArray[np.uint32]) -> None:
        """Applies the request's own wishes for the end of its text."""
        if not any(words[end // 32] >> np.uint32(end % 32) & 1 for end in self._ends):
            return
        if self._hold_ends:
            for end in self._ends:
                words[end // 32] &= ~np.uint32(1 << end % 32)
        for stop in self._stops:
            words[stop // 32] |= np.uint32(1 << stop % 32)
        if not words.any():
            words[self._ends[0] // 32] = np.uint32(1 << self._ends[0] % 32)


class GrammarCompiler:
    """Makes grammars of rules, and keeps the latest. Safe to use from any thread."""

    def __init__(self, tokenizer: Vocabulary, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        # One id beyond the model's stands for the end where the model names none.
        self._ends = sorted(eos_token_ids) or [vocab_size]
        self._lock = threading.Lock()  # guards the cache
        self._making = threading.Lock()  # of the llguidance tokenizer
        self._words: llguidance.LLTokenizer | None = None
        self._cache: OrderedDict[str, tuple[Grammar | RequestError, int]] = OrderedDict()
        self._cached_bytes = 0

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """The rule at its beginning.

        Raises:
            RequestError: the rule is at fault, or would take too much time or memory.
        """
        key = params.key()
        found = self._cached(key)
        if found is None:
            try:
                made, size = self._compile(params.kind, key)
            except RequestError as error:
                self._keep(key, error, 0)
                raise
            self._keep(key, made, size)
            return made.copy()
        if isinstance(found, RequestError):
            raise RequestError(str(found))
        return found

    def _cached(self, key: str) -> Grammar | RequestError | None:
        with self._lock:
            if key not in self._cache:
                return None
            self._cache.move_to_end(key)
            found, _ = self._cache[key]
            return found.copy() if isinstance(found, Grammar) else found

    def _keep(self, key: str, made: Grammar | RequestError, size: int) -> None:
        with self._lock:
            if key in self._cache:
                return
            self._cache[key] = made, size + len(key)
            self._cached_bytes += size + len(key)
            while len(self._cache) > MAX_CACHED_GRAMMARS or self._cached_bytes > MAX_CACHED_BYTES:
                self._cached_bytes -= self._cache.popitem(last=False)[1][1]

    def _compile(self, kind: str, key: str) -> tuple[Grammar, int]:
        import llguidance

        special = {
            token: _name(self._tokenizer.token_bytes(token)) for token in self._tokenizer.special_token_ids
        }
        request = {
            "key": key,
            "vocab_size": self._vocab_size,
            "special": special,
            "limits": MATCHER_LIMITS,
            "cpu_seconds": MAX_CPU_SECONDS,
            "seconds": MAX_SECONDS,
        }
        answer, status = _worker.ask(json.dumps(request))
        if answer is None:
            if -status in (signal.SIGALRM, signal.SIGPROF):
                limit = f"{MAX_CPU_SECONDS:g} s of computing, or {MAX_SECONDS:g} s in all"
                why = f"compiling it takes more than {limit}"
            else:
                why = f"compiling it takes too much memory, or too deep a stack (status {status})"
            raise RequestError(f"structured_outputs.{kind}: {why}; simplify it")
        if "error" in answer:
            raise RequestError(f"structured_outputs.{kind}: {_one_line(answer['error'])}")
        limits = llguidance.LLParserLimits(**MATCHER_LIMITS)
        matcher = llguidance.LLMatcher(self._tokens(), answer["grammar"], log_level=0, limits=limits)
        matcher.compute_bitmask()  # the first one takes longest, here it delays nobody else
        grammar = Grammar(matcher, self._ends)
        if grammar.error:
            raise RequestError(f"structured_outputs.{kind}: {grammar.error}")
        return grammar, answer["bytes"]

    def _tokens(self) -> llguidance.LLTokenizer:
        """The vocabulary as llguidance wants it: half a second for 150,000 tokens, done once."""
        import llguidance

        with self._making:
            if self._words is None:
                self._words = llguidance.LLTokenizer(
                    _Tokens(self._tokenizer, self._vocab_size),  # type: ignore[arg-type]
                    n_vocab=self._vocab_size + 1,
                    eos_token=self._ends,
                )
        return self._words


class GrammarMasks:
    """The masks of a step: a bit for each token, of each row that has a grammar.

    Filled one after another: a mask takes some 40 microseconds, and llguidance's own threads, which spin
    before they sleep, would slow down the model's by more than they save.
    """

    def __init__(self, vocab_size: int) -> None:
        self._masks = np.empty((0, (vocab_size + 1 + 31) // 32), np.int32)

    def fill(self, grammars: Sequence[Grammar]) -> Int32Array:
        """Masks [grammars, words]; bit i % 32 of word i // 32 says whether token i may come next."""
        count = len(grammars)
        if count > len(self._masks):
            self._masks = np.empty((count, self._masks.shape[1]), np.int32)
        for grammar, mask in zip(grammars, self._masks, strict=False):
            grammar.fill(mask)
        return self._masks[:count]


class _Tokens:
    """A tokenizer in the form that llguidance takes."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Vocabulary, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = vocab_size
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)] + [b"<|end|>"]
        self.special_token_ids = [*tokenizer.special_token_ids, vocab_size]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _name(token: bytes) -> str:
    return token.decode("utf-8", "replace")


def _one_line(message: Any) -> str:
    line = " ".join(str(message).replace("<non-verbose/>", "").split())
    return line if len(line) <= 300 else line[:297] + "..."


_worker = WorkerProcess(Path(__file__).with_name("grammar_worker.py"))
