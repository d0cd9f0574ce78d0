"""Mutations that several fuzzers use: of bytes, of JSON, of numbers."""

from __future__ import annotations

import random
from typing import Any

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 255, 256, 1000, 10**6, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**64,
    10**30, 10**400, -(2**31), 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
"""Numbers at which programs break."""
TEXTS = ("", "\0", "\n", "../..", "/etc/passwd", "a" * 5000, "[/bold]", "\x1b[31m", "\u202eé🙂")
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": None}, [0] * 1000)
VALUES: tuple[Any, ...] = (*NUMBERS, *TEXTS, *_OTHERS)


def mutate_bytes(random: random.Random, content: bytes) -> bytes:
    """Flip, cut, insert, repeat or overwrite a few bytes."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        if not data:
            return bytes(data)
        at = random.randrange(len(data))
        kind = random.randrange(6)
        if kind == 0:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + random.randrange(1, 64)]
        elif kind == 3:
            data[at:at] = random.randbytes(random.randrange(1, 64))
        elif kind == 4:
            end = at + random.randrange(1, 64)
            data[at:at] = data[at:end] * random.choice((1, 2, 50))
        else:
            size = random.choice((1, 2, 4, 8))
            value = random.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1)))
            data[at : at + size] = value.to_bytes(size, "little")
    return bytes(data)


def mutate_json(random: random.Random, data: Any, changes: int | None = None) -> Any:
    """Return a copy of JSON data in which a few places are changed, removed or added."""
    data = copied(data)
    for _ in range(random.choice((1, 1, 1, 2, 5)) if changes is None else changes):
        found = places(data)
        if not found:
            return copied(random.choice(VALUES))
        holder, key = random.choice(found)
        kind = random.randrange(8)
        if kind < 4:
            holder[key] = copied(random.choice(VALUES))
        elif kind == 4:
            del holder[key]
        elif kind == 5 and isinstance(holder[key], int | float):
            holder[key] = random.choice((holder[key] + 1, -holder[key], holder[key] * 1000))
        elif kind == 6:
            other, place = random.choice(found)
            holder[key] = copied(other[place])
        elif isinstance(holder, dict):
            holder[random.choice(("unknown", key + "x" if isinstance(key, str) else "x"))] = 1
        else:
            holder.insert(key, copied(holder[key]))
    return data


def copied(data: Any) -> Any:
    """Return a copy of JSON data, in which no two places share a list or an object.

    Else a change would be made in each of them, and a copy of all into all would grow without end.
    """
    if isinstance(data, dict):
        return {key: copied(value) for key, value in data.items()}
    return [copied(value) for value in data] if isinstance(data, list) else data


def places(data: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) of JSON data."""
    found: list[tuple[Any, Any]] = []
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        found.append((data, key))
        found += places(data[key])
    return found
