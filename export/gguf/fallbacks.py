"""Matrices that are stored in another GGUF type, as their rows are no multiple of its blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mobilevlm.console import progress
from mobilevlm.export.gguf.tensors import BLOCK, K_BLOCK, TYPES
from mobilevlm.gguf.file import read_gguf
from mobilevlm.spec import GGUFType


def fallback_note(path: Path, kind: GGUFType, matrices: Iterable[str]) -> str:
    """Return how many of the matrices that ``kind`` was asked for are stored in another type, as
    their rows are no multiple of its blocks, and in which; empty if none is. ``matrices``: names in
    the finished file."""
    if kind in ("f32", "f16", "bf16"):
        return ""
    block = BLOCK if kind in TYPES else K_BLOCK
    names = set(matrices)
    tensors = [tensor for name, tensor in read_gguf(path).tensors.items() if name in names]
    other = Counter(tensor.type for tensor in tensors if tensor.shape[-1] % block)
    if not other:
        return ""
    stored = ", ".join(f"{count} in {name}" for name, count in sorted(other.items()))
    return (
        f"{kind}: the rows of {other.total()} of {len(tensors)} matrices are no multiple of its "
        f"blocks of {block} weights: {stored}"
    )


def say_fallbacks(path: Path, kind: GGUFType, matrices: Iterable[str]) -> None:
    """Show :func:`fallback_note` as progress."""
    if note := fallback_note(path, kind, matrices):
        progress.say(f"types       {note}")
