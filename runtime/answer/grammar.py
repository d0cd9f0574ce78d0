"""Answers that follow a JSON schema or a grammar (llguidance, extra ``[structured]``).

A grammar says after each token which tokens may come next; all others lose their logits before one
is chosen. Where the likeliest token is allowed, and tokens are chosen greedily, no mask is made.
Where one token alone is allowed, the text that must follow it is taken without asking again.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mobilevlm.console.terminal import shown
from mobilevlm.errors import FileWarning, GrammarError, MissingExtraError, require
from mobilevlm.runtime.answer.keywords import about_unknown, unknown_keywords
from mobilevlm.runtime.engines import Float32
from mobilevlm.tokenizers.json_file import encode, foreign
from mobilevlm.tokenizers.pieces import AnswerBytes

MOST_CHARACTERS = 1 << 20
"""Longest schema or grammar."""
KEPT = 8
"""Compiled grammars that are kept for later answers."""
KEPT_TEXTS, LONGEST_KEPT = 4096, 200
"""Texts that grammars force whose tokens are kept, and the characters of one."""
SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON's separators as Python writes them: a small model does not lose itself in spaces."""
JSON_CHARACTERS = '{}[]":,-.0123456789aeflnrstu\\'
"""That JSON needs whatever it says."""
FEW = 32
"""Tokens that are compared one by one: less work than a mask over a vocabulary."""
_NEVER = np.float32(-np.inf)


class Guide:
    """Grammar of one answer, and how far the answer is in it. ``matcher``: of llguidance;
    ``size``: of its vocabulary."""

    def __init__(self, matcher: Any, size: int, end: frozenset[int]) -> None:
        self._matcher, self._end = matcher, end
        self._words = np.zeros((size + 31) // 32, np.int32)
        self._mask: NDArray[np.uint8] = self._words.view(np.uint8)
        self._place, self._size = self._words.ctypes.data, self._words.nbytes
        self._forced: list[int] = []
        """Tokens that must come next, the first at the end; the grammar is behind them"""

    @property
    def complete(self) -> bool:
        """True if nothing may follow."""
        return not self._forced and bool(self._matcher.is_stopped())

    def forced(self) -> int | None:
        """Return the token that must come next, where that is known from the last one."""
        return self._forced.pop() if self._forced else None

    def took(self, token: int) -> bool:
        """Go on behind a token if it is allowed; return whether it is."""
        if token in self._end:
            return bool(self._matcher.is_accepting())
        return bool(self._matcher.try_consume_tokens([token]) == 1)

    def allowed(self) -> list[int] | None:
        """Return the tokens that may come next; none if they are more than a few.

        Raises:
            GrammarError: none may.
        """
        self._matcher.unsafe_compute_mask_ptr(self._place, self._size)
        count = int.from_bytes(self._mask).bit_count()
        if count == 0:
            told = f" ({shown(self._matcher.get_error())})" if self._matcher.is_error() else ""
            raise GrammarError(
                f"the grammar leaves no token that this model can go on with{told}: ask for less "
                f"unusual characters or a simpler grammar"
            )
        if count > FEW:
            return None
        found: list[int] = []
        places = self._words.nonzero()[0]
        for place, word in zip(places.tolist(), self._words[places].tolist(), strict=True):
            rest = word & 0xFFFFFFFF
            while rest:
                found.append(32 * place + (rest & -rest).bit_length() - 1)
                rest &= rest - 1
        return found

    def masked(self, logits: Float32) -> Float32:
        """Return logits ``(vocab_size,)`` with minus infinity for tokens that may not come next, by
        the last :meth:`allowed`."""
        bits = np.unpackbits(self._mask, bitorder="little", count=len(logits))
        found: Float32 = np.where(bits.view(np.bool_), logits, _NEVER)
        return found

    def take(self, token: int, only: bool = False) -> None:
        """Go on behind a token that is allowed; if it is the ``only`` one, behind those that must
        follow it too."""
        if token in self._end:
            return
        if not self.took(token):
            raise GrammarError(
                f"the grammar cannot be followed ({shown(self._matcher.get_error())}): make it "
                f"simpler"
            )
        if only and (following := self._matcher.compute_ff_tokens()):
            taken = self._matcher.try_consume_tokens(following)
            self._forced = following[:taken][::-1]


class GuideMaker:
    """Maker of guides for one vocabulary. ``end``: ids of tokens that end an answer;
    ``vocab_size``: of the logits."""

    def __init__(self, tokenizer: Tokenizer, end: Iterable[int], vocab_size: int) -> None:
        try:
            import llguidance
        except ModuleNotFoundError as error:
            if error.name != "llguidance":
                raise
            raise missing() from None
        self._library = llguidance
        self._end = frozenset(index for index in end if index < vocab_size)
        self._words = _Vocabulary(tokenizer, self._end, vocab_size)
        with foreign("the bundle's vocabulary is of no use for grammars", GrammarError):
            self._tokenizer = llguidance.LLTokenizer(
                self._words,
                n_vocab=vocab_size,
                eos_token=sorted(self._end),
                slices=llguidance.LLTokenizer.json_slices(),
            )
        self._words.library = self._tokenizer
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def schema(self, schema: object) -> Guide:
        """Return a guide to JSON of a schema: the text of one, or the data.

        Raises:
            GrammarError: no schema, one that nothing fulfils, or one with what cannot be checked
                while an answer is made.
        """
        data = _schema_data(schema)
        text, unknown = _schema_text(data), unknown_keywords(data)
        for character in JSON_CHARACTERS:
            if character.encode() not in self._words.single:
                raise GrammarError(
                    f"json_schema: this model's vocabulary has no token for {character!r}: it "
                    f"cannot write JSON"
                )
        with foreign("json_schema", GrammarError):
            grammar = self._library.LLMatcher.grammar_from_json_schema(text, overrides=SEPARATORS)
        return self._guide("json_schema", grammar, unknown)

    def grammar(self, text: object) -> Guide:
        """Return a guide to a grammar of Lark's notation, or of llama.cpp's (GBNF).

        Raises:
            GrammarError: no grammar, or one that nothing fulfils.
        """
        if not isinstance(text, str) or not text.strip():
            kind = "empty" if isinstance(text, str) else type(text).__name__
            raise GrammarError(f"grammar is {kind}, expected rules as text (Lark or GBNF)")
        _check_length("grammar", text)
        if "::=" in text:
            from llguidance.gbnf_to_lark import any_to_lark

            with foreign("grammar", GrammarError):
                text = any_to_lark(text)
        with foreign("grammar", GrammarError):
            grammar = self._library.LLMatcher.grammar_from_lark(text)
        return self._guide("grammar", grammar)

    def calls(self, grammar: str) -> Guide:
        """Return a guide to calls of tools, by a grammar of Lark's notation.

        Raises:
            GrammarError: as of :meth:`schema`, of the parameters of a tool.
        """
        _check_length("tools", grammar)
        with foreign("tools", GrammarError):
            found = self._library.LLMatcher.grammar_from_lark(grammar)
        return self._guide("tools", found)

    def _guide(self, name: str, grammar: str, unknown: Sequence[str] = ()) -> Guide:
        with self._lock:
            known = self._compiled.get(grammar)
            if known is None:
                known = self._compile(name, grammar)
                if unknown:
                    told = f"{name}: {about_unknown(unknown)}"
                    # Without a registry: Python's keeps each text for ever.
                    warnings.warn_explicit(told, FileWarning, f"<{name}>", 1)
                self._compiled[grammar] = known
                while len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return Guide(known.deep_copy(), self._words.size, self._end)

    def _compile(self, name: str, grammar: str) -> Any:
        with foreign(name, GrammarError):
            matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
            able = not matcher.is_error() and any(matcher.deep_copy().compute_bitmask())
        if matcher.is_error():
            told = shown(matcher.get_error(), 300)
            hint = ": use anyOf" if "coerce_one_of" in told else ""
            raise GrammarError(f"{name} cannot be followed: {told.split(' Enable ')[0]}{hint}")
        if not able:
            raise GrammarError(f"{name} cannot be followed: nothing fulfils it")
        return matcher


def missing() -> MissingExtraError:
    """Return the error for a package that is not installed."""
    return require("llguidance", "structured", "an answer by a schema or grammar")


class _Vocabulary:
    """The tokens as llguidance asks for them (its ``TokenizerWrapper``)."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end: frozenset[int], vocab_size: int) -> None:
        self._tokenizer, self._bytes = tokenizer, AnswerBytes(tokenizer)
        self.size = vocab_size
        self.tokens = [self._bytes(token) for token in range(vocab_size)]
        self.single = {token for token in self.tokens if len(token) == 1}
        special = self._bytes.special | end
        for token in special:
            if token < vocab_size:
                self.tokens[token] = self._bytes.name(token).encode()
        self.special_token_ids = sorted(token for token in special if token < vocab_size)
        self.eos_token_id = min(end, default=0)
        self.library: Any = None
        self._before = encode(tokenizer, "\n", add_special_tokens=False)
        first = encode(tokenizer, "a", add_special_tokens=False)
        self._adds_space = b"".join(map(self._bytes, first)) == b" a"
        self._known = lru_cache(KEPT_TEXTS)(self._ids)

    def __call__(self, text: str) -> Sequence[int]:
        """Return ids whose bytes are the text: the tokenizer's where it keeps them. Asked at each
        token of text that the grammar forces, on the way to a mask."""
        return self._known(text) if len(text) <= LONGEST_KEPT else self._ids(text)

    def _ids(self, text: str) -> tuple[int, ...]:
        wanted = text.encode()
        if not self._adds_space:
            ids = encode(self._tokenizer, text, add_special_tokens=False)
            if b"".join(map(self._bytes, ids)) == wanted:
                return tuple(ids)
        joined = encode(self._tokenizer, f"\n{text}", add_special_tokens=False)
        rest = joined[len(self._before) :]
        is_split = joined[: len(self._before)] == self._before
        if is_split and b"".join(map(self._bytes, rest)) == wanted:
            return tuple(rest)
        return tuple(self.library.greedy_tokenize(text))


def _schema_data(schema: object) -> dict[str, Any]:
    """Return a JSON schema as an object."""
    if isinstance(schema, str):
        _check_length("json_schema", schema)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"json_schema is no JSON ({shown(error)})") from None
    if isinstance(schema, bool):
        if not schema:
            raise GrammarError("json_schema is false: nothing fulfils it")
        return {}
    if not isinstance(schema, dict):
        raise GrammarError(f"json_schema is {type(schema).__name__}, expected an object")
    return schema


def _schema_text(schema: dict[str, Any]) -> str:
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"json_schema is no JSON ({shown(error)})") from None
    _check_length("json_schema", text)
    return text


def _check_length(name: str, text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise GrammarError(f"{name} has {len(text)} characters, more than {MOST_CHARACTERS}")
