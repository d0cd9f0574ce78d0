"""Tokens to text as they come: whole characters only, ending at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Text of a growing list of tokens. Bytes of an unfinished character are held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._length = 0

    def add(self, token: int) -> str:
        """The text that this token completes (often a word, sometimes nothing)."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer, token) or ""
        self._length += len(piece)
        return piece

    def finish(self) -> str:
        """What was held back: an unfinished character comes out as U+FFFD."""
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._length :]


class StopStrings:
    """Cuts text at the first stop string; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string was reached."""
        text = self._held + piece
        found = [index for index in (text.find(stop) for stop in self._stops) if index >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many last characters of ``text`` begin ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
