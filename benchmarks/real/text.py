"""Text to measure on: what every machine with Python has, cut into windows of token ids."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from mobilevlm.errors import MobileVLMError

WINDOW = 256
"""Tokens of a window, the first of which begins a text."""
STARTS = (0, 1500, 3000, 4500)
"""Places in a text where its windows begin, in tokens."""
GPL = Path("/usr/share/common-licenses/GPL-3")
MODULES = ("argparse", "decimal", "difflib", "doctest", "heapq", "logging", "optparse", "pickle",
           "random", "statistics", "string", "tarfile", "threading", "unittest",
           "zipfile")  # fmt: skip
"""Modules of the standard library whose docstrings are a text."""


@dataclass(frozen=True)
class Windows:
    """Token ids to measure on."""

    texts: tuple[str, ...]
    """Names of the texts."""
    ids: tuple[tuple[int, ...], ...]
    """Windows, as many of each text, in order."""


def _topics() -> str:
    from pydoc_data import topics

    return "\n".join(text for _, text in sorted(topics.topics.items()))


def _gpl() -> str | None:
    return GPL.read_text("utf-8") if GPL.is_file() else None


def _docstrings() -> str:
    parts: list[str] = []
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(inspect.getdoc(module) or "")
        for member in vars(module).values():
            if inspect.isclass(member) or inspect.isfunction(member):
                parts.append(inspect.getdoc(member) or "")
    return "\n\n".join(dict.fromkeys(part for part in parts if part))


TEXTS: dict[str, Callable[[], str | None]] = {
    "topics": _topics,
    "gpl": _gpl,
    "docstrings": _docstrings,
}
"""Texts by name; none where the machine does not have it. topics: Python's reference (pydoc);
gpl: the licence, where Debian keeps it; docstrings: those of the standard library."""


def default_texts() -> tuple[str, ...]:
    """Return the names of two texts that this machine has."""
    return ("topics", "gpl" if GPL.is_file() else "docstrings")


def read_text(name: str) -> str:
    """Return a text by its name, or a file's.

    Raises:
        MobileVLMError: there is no such text.
    """
    if name in TEXTS:
        text = TEXTS[name]()
        if text is None:
            raise MobileVLMError(f"text {name}: this machine has no {GPL}: choose another")
        return text
    try:
        return Path(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(TEXTS)
        raise MobileVLMError(f"text {name}: not {known}, nor a text file: {error}") from None


def cut_windows(tokenizer: Tokenizer, names: Sequence[str], first: int) -> Windows:
    """Return the windows of some texts. ``first``: id that begins each.

    Raises:
        MobileVLMError: a text is missing or too short.
    """
    found: list[tuple[int, ...]] = []
    for name in names:
        ids = tokenizer.encode(read_text(name), add_special_tokens=False).ids
        if len(ids) < STARTS[-1] + WINDOW - 1:
            raise MobileVLMError(
                f"text {name}: {len(ids)} tokens, at least {STARTS[-1] + WINDOW - 1} are needed"
            )
        found += [(first, *ids[start : start + WINDOW - 1]) for start in STARTS]
    return Windows(tuple(names), tuple(found))
