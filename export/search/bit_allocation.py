"""Choice of bits for each layer: the least divergence within a size.

Divergences of layers are taken to add up. Then the best choices for all sizes lie on the convex
hulls of each layer's (size, divergence) points, and are found by always taking the step that saves
most divergence per byte (Lagrange multipliers; Shoham and Gersho 1988). Between two sizes of that
front the rest of the room goes to the best steps that still fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mobilevlm.recipe import LinearFormat


@dataclass(frozen=True)
class Option:
    """One way to store a group of layers."""

    layers: LinearFormat
    size: int
    """Bytes"""
    kl: float
    """Divergence of the answers by this option alone, in nats"""


@dataclass(frozen=True)
class Allocation:
    """An option for each group."""

    options: tuple[Option, ...]

    @property
    def size(self) -> int:
        return sum(option.size for option in self.options)

    @property
    def kl(self) -> float:
        """Predicted: the sum."""
        return sum(option.kl for option in self.options)


@dataclass(frozen=True)
class _Step:
    group: int
    to: Option
    size: int
    """Bytes more"""
    gain: float
    """Divergence less, per byte"""


def front(choices: Sequence[Sequence[Option]]) -> list[Allocation]:
    """The best allocations from the least size to the least divergence; ``choices``: the options of
    each group."""
    current = [hull(options)[0] for options in choices]
    found = [Allocation(tuple(current))]
    for step in _steps(choices):
        current[step.group] = step.to
        found.append(Allocation(tuple(current)))
    return found


def within_size(choices: Sequence[Sequence[Option]], size: int) -> Allocation | None:
    """The least divergence in this many bytes; none where no allocation is that small."""
    current = [hull(options)[0] for options in choices]
    room = size - sum(option.size for option in current)
    if room < 0:
        return None
    full: set[int] = set()
    for step in _steps(choices):
        if step.group in full or step.size > room:
            full.add(step.group)  # later steps of the group begin where this one ends
            continue
        current[step.group] = step.to
        room -= step.size
    return Allocation(tuple(current))


def within_kl(choices: Sequence[Sequence[Option]], kl: float) -> Allocation | None:
    """The least size with at most this predicted divergence; none where all are beyond."""
    return next((found for found in front(choices) if found.kl <= kl), None)


def hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of the (size, divergence) points, from the smallest on."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.size, option.kl)):
        if kept and option.kl >= kept[-1].kl:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _slope(smaller: Option, larger: Option) -> float:
    return (smaller.kl - larger.kl) / (larger.size - smaller.size)


def _steps(choices: Sequence[Sequence[Option]]) -> list[_Step]:
    """All steps along the hulls, the best first; those of one group stay in order."""
    steps = []
    for group, options in enumerate(choices):
        corners = hull(options)
        for smaller, larger in pairwise(corners):
            size = larger.size - smaller.size
            steps.append(_Step(group, larger, size, _slope(smaller, larger)))
    return sorted(steps, key=lambda step: -step.gain)
