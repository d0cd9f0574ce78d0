"""Names of a vocabulary's tokens: how sentencepiece writes a space, and byte-level BPE a byte."""

from __future__ import annotations

SPACE = "\u2581"
"""The character that stands for a space inside pieces."""


def _byte_letters() -> list[str]:
    """Return the letter of each byte in byte-level BPE (GPT-2's ``bytes_to_unicode``): printable
    Latin-1 stands for itself, letters from 256 on for the others."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


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
