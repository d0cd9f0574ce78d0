"""A tokenizer that lives in another library than tokenizers: the part of its interface that prompts
and answers use."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Encoded:
    """Ids of a text."""

    ids: list[int]


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in text as it stands."""

    content: str
    special: bool
    """True if it is left out of answers."""


class LibraryTokenizer(ABC):
    """Stands where a ``tokenizers.Tokenizer`` is expected."""

    decoder = None

    def __init__(self, tokens: list[str], added: dict[int, AddedToken], begin: int | None) -> None:
        """``tokens``: by id; ``begin``: id that texts begin with, if any."""
        self._tokens, self._added, self._begin = tokens, added, begin

    @abstractmethod
    def _ids(self, text: str, special: bool) -> list[int]:
        """Return the ids of a text, without the one that texts begin with. ``special``: added
        tokens are found in it."""

    @abstractmethod
    def token_bytes(self, token: int, first: bool) -> bytes:
        """Return what a token adds to an answer. ``first``: a space that only parts words is left
        out."""

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        """Return the ids of a text."""
        return Encoded([*self._start(add_special_tokens), *(self._ids(text, True) if text else [])])

    def encode_marked(self, text: str, mark: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text in which added tokens with a ``mark`` inside are plain words."""
        ids = self._start(add_special_tokens)
        for index, part in enumerate(self._names.split(text)):
            if index % 2:
                ids += self._ids(part, True)
            elif plain := part.replace(mark, ""):
                ids += self._ids(plain, False)
        return ids

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Return added tokens by id."""
        return self._added

    def get_vocab(self) -> dict[str, int]:
        """Return the ids by token."""
        return self._by_text

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token."""
        return self._by_text.get(token)

    def id_to_token(self, token: int) -> str | None:
        """Return the token of an id."""
        return self._tokens[token] if 0 <= token < len(self._tokens) else None

    def _start(self, wanted: bool) -> list[int]:
        return [] if self._begin is None or not wanted else [self._begin]

    @cached_property
    def _by_text(self) -> dict[str, int]:
        return {text: index for index, text in enumerate(self._tokens)}

    @cached_property
    def _names(self) -> re.Pattern[str]:
        """Pattern of an added token, the longest first."""
        names = sorted({token.content for token in self._added.values()}, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
