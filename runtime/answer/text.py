"""Tokens to text as they come: whole characters only, ending at stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from mobilevlm.errors import BundleError
from mobilevlm.runtime.settings import check_new_tokens
from mobilevlm.tokenizers.json_file import foreign
from mobilevlm.tokenizers.pieces import SPACE, AnswerBytes, lone_byte, token_bytes


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("mobilevlm_replace_each_byte", _replace_each_byte)


class Detokenizer:
    """Text of a growing list of tokens. Bytes of an unfinished character are held back.

    What belongs to no character comes out as U+FFFD: each byte, as sentencepiece has it, or where
    every token is bytes (byte-level BPE) each broken character. (The tokenizers library decodes a
    run of byte tokens all or nothing, so its text can change after the fact, and its DecodeStream
    raises an error then.) ``keeps_space``: also the leading space of the first token, which
    sentencepiece leaves out of a text.
    """

    def __init__(self, tokenizer: Tokenizer, keeps_space: bool = False) -> None:
        self._tokenizer = tokenizer
        table = AnswerBytes(tokenizer)
        self._special, self._byte_level, self._library = (
            table.special,
            table.byte_level,
            table.library,
        )
        whole = self._byte_level or self._library is not None
        errors = "replace" if whole else "mobilevlm_replace_each_byte"
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors)
        self._begun, self._unfinished = keeps_space, False

    def add(self, token: int) -> str:
        """The text that this token completes (often a word, sometimes nothing)."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token in self._special:
            return self.finish()
        if self._library is not None:
            first, self._begun = not self._begun, True
            return self._bytes.decode(self._library.token_bytes(token, first))
        if self._byte_level:
            return self._bytes.decode(token_bytes(piece))
        first, self._begun = not self._begun, True
        if (byte := lone_byte(piece)) is not None:
            self._unfinished = True
            return self._bytes.decode(byte)
        text = self._first(token) if first else piece.replace(SPACE, " ")
        return self.finish() + text if self._unfinished else text

    def _first(self, token: int) -> str:
        """The first token's text, which may lose its leading space."""
        with foreign("the bundle's tokenizer failed on an answer", BundleError):
            return str(self._tokenizer.decode([token]))

    def finish(self) -> str:
        """Return the text that was held back; an unfinished character becomes U+FFFD."""
        held = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        self._unfinished = False
        return held


class StopStrings:
    """Cuts text at the first stop string; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string was reached."""
        text = self._held + piece if self._held else piece
        found = [index for index in (text.find(stop) for stop in self._stops) if index >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """Return the text that was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """How many last characters of ``text`` begin ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class StopRules:
    """When an answer ends."""

    max_new_tokens: int
    eos_token_ids: frozenset[int]
    strings: Sequence[str]

    def __post_init__(self) -> None:
        check_new_tokens(self.max_new_tokens)
