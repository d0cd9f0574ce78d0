"""Names of a vocabulary's tokens (how sentencepiece writes a space, and byte-level BPE a byte), and
the bytes that tokens add to an answer."""

from __future__ import annotations

import re

from tokenizers import Tokenizer, decoders

from mobilevlm.tokenizers.library import LibraryTokenizer

SPACE = "\u2581"
"""The character that stands for a space inside pieces."""


def _byte_letters() -> list[str]:
    """Return the letter of each byte in byte-level BPE (GPT-2's ``bytes_to_unicode``): printable
    Latin-1 stands for itself, letters from 256 on for the others."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE = re.compile("<0x([0-9A-F]{2})>")
_LETTERS = _byte_letters()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}


def byte_level_name(text: bytes) -> str:
    """Return the name of a token of these bytes in a byte-level vocabulary."""
    return "".join(_LETTERS[byte] for byte in text)


def token_bytes(token: str) -> bytes:
    """Return the bytes of a token of a byte-level vocabulary; added ones are their own text."""
    if all(letter in _BYTES for letter in token):
        return bytes(_BYTES[letter] for letter in token)
    return token.encode()


class AnswerBytes:
    """Bytes of each token of a vocabulary, and the tokens that are left out of answers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(index for index, token in added.items() if token.special)
        self.byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self.library = tokenizer if isinstance(tokenizer, LibraryTokenizer) else None

    def __call__(self, token: int) -> bytes:
        """Return what a token adds behind others; nothing for special and unknown ones."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token in self.special:
            return b""
        if self.library is not None:
            return self.library.token_bytes(token, first=False)
        if self.byte_level:
            return token_bytes(piece)
        byte = lone_byte(piece)
        return piece.replace(SPACE, " ").encode() if byte is None else byte

    def name(self, token: int) -> str:
        """Return a token's text for people: its own if it is special, U+FFFD for what is no whole
        character."""
        if token in self.special:
            return str(self._tokenizer.id_to_token(token))
        return self(token).decode("utf-8", "replace")


def lone_byte(piece: str) -> bytes | None:
    """Return the byte that sentencepiece's byte fallback writes as ``<0xE2>``; none for others."""
    if not piece.startswith("<") or (match := _BYTE.fullmatch(piece)) is None:
        return None
    return bytes([int(match[1], 16)])
