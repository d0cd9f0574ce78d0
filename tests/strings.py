"""Texts that tokenizers are compared on."""

from __future__ import annotations

import random
from collections.abc import Iterator

STRINGS = 4000
WORDS = "What is in the picture? USER: ASSISTANT: The quick brown fox, 3.14; don't"
SNIPPETS = [
    *WORDS.split(),
    *"aAbehinorstTuvwyz0129.,:;!?-_()[]{}<>/\\'\"`#@%&*+=|~^$",
    *[" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\x00", "\x1f", "\x7f"],
    *[
        "é",
        "ß",
        "e\u0301",
        "Привет",
        "日本語",
        "한국어",
        "عربى",
        "ไทย",
        "🙂",
        "👩‍👩‍👧",
        "🇩🇪",
        "\ufeff",
    ],
    *["\u2581", "\u2581\u2581the", "<0x41>", "<", "image", "\U0010ffff", "\u200b", "½", "ﬁ"],
]


def seeded_strings(seed: int) -> Iterator[str]:
    """The corner cases, then random mixtures of words, spaces, controls and rare characters."""
    yield from ["", " ", "  ", "\n", "\t", " a", "  a", "a ", "a  ", "\u2581", "\u2581a", "\x00"]
    generator = random.Random(seed)
    for _ in range(STRINGS):
        pieces = generator.choices(SNIPPETS, k=generator.randrange(1, 12))
        yield generator.choice(["", " "]).join(pieces)
