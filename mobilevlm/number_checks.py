"""Checks of single numbers of a manifest: each names a field and what is expected."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from mobilevlm.linear_groups import LinearGroup

Check: TypeAlias = tuple[str, object, bool, str]
"""Field, value, whether it is right, and what is expected"""
MOST_LAYERS = 1 << 12
LEAST_BITS = 2
"""Least bits of a weight in a file"""


def shortened(value: object) -> str:
    """Return a value for a message."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.80}"


def check_whole(part: str, spec: object, names: str, least: int = 1) -> Iterator[Check]:
    """Check that these fields are whole numbers of 31 bits, from ``least`` on. ``names``: separated
    by spaces."""
    for name in names.split():
        value = getattr(spec, name)
        yield f"{part}.{name}", value, least <= value < 1 << 31, f"{least} or more"


def check_positive(part: str, spec: object, names: str) -> Iterator[Check]:
    """Check that these fields are finite and above 0, where there are any."""
    for name in names.split():
        value = getattr(spec, name)
        is_right = value is None or 0 < value < math.inf
        yield f"{part}.{name}", value, is_right, "a positive number"


def check_weights(part: str, count: int, total: int) -> Check:
    """Check that so many weights may be in the files."""
    what = f"the number of weights that {part} needs"
    return what, count, count * LEAST_BITS <= 8 * total, f"what {total} bytes of files can hold"


def size_of(groups: Iterable[LinearGroup]) -> int:
    """Return the number of weights of layers."""
    return sum(group.size for group in groups)


def check_layers(name: str, count: int) -> Check:
    """Check the number of layers."""
    return name, count, count <= MOST_LAYERS, f"at most {MOST_LAYERS}"


def check_heads(part: str, spec: Any) -> Check:
    """Check that a width is shared out among attention heads."""
    hidden, heads = spec.hidden_size, spec.num_attention_heads
    remedy = f"a multiple of {shortened(heads)} heads"
    return f"{part}.hidden_size", hidden, hidden % heads == 0, remedy
