"""From samples to figures: medians and spread, ratios, and the targets they are held against."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Rows = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Measure:
    """A column of the table. ``scale``: from the samples' unit to the shown one."""

    key: str
    title: str
    unit: str
    scale: float = 1.0
    better: Literal["less", "more"] = "less"
    digits: int = 0


MEASURES = (
    Measure("encode", "image encode", "ms", 1e3),
    Measure("prefill", "prefill, 200 tokens", "ms", 1e3),
    Measure("first", "first token, image + 56", "ms", 1e3),
    Measure("decode", "decode", "tokens/s", 1.0, "more", 1),
    Measure("second", "second question, first token", "ms", 1e3),
    Measure("cold_load", "cold load", "s", 1.0, digits=2),
    Measure("warm_load", "warm load", "s", 1.0, digits=2),
    Measure("load_and_first", "warm load and first token", "s", 1.0, digits=2),
    Measure("import", "import", "s", 1.0, digits=2),
    Measure("peak", "peak memory", "MB"),
    Measure("own", "of it not shared", "MB"),
    Measure("size", "artifacts", "MB"),
    Measure("peak_over_size", "peak memory over artifacts", "MB"),
    Measure("kl_prefill", "KL of prefill, real model", "nats", 1.0, digits=3),
    Measure("kl_decode", "KL of decode, real model", "nats", 1.0, digits=3),
)
STAGES = ("encode", "prefill", "first", "decode", "second")
"""Measures that a part of the model is enough for."""


@dataclass(frozen=True)
class Figure:
    """Samples of one quantity in short."""

    median: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Target:
    """A quantity of ours over llama.cpp's best (``peer``), or over another of our own."""

    key: str
    limit: float
    better: Literal["less", "more"] = "less"
    peer: bool = True
    quality: str | None = None
    """Row that ours may not have worse than the peer's"""


WORSE = 1.02
"""A KL that is at most this many times another counts as equal: windows of text differ by more."""
TARGETS = (
    Target("encode", 0.40),
    Target("prefill", 0.55, quality="kl_prefill"),
    Target("first", 0.40, quality="kl_prefill"),
    Target("decode", 1.15, "more", quality="kl_decode"),
    Target("warm_load", 0.8),
    Target("second_share", 0.15, peer=False),
)
MEMORY_ALLOWANCE = 350.0
"""Megabytes that the peak of int4 may lie over the size of its artifacts."""


@dataclass(frozen=True)
class Verdict:
    """A target and what was reached."""

    key: str
    ours: str
    value: float
    peer: str | None
    peer_value: float | None
    ratio: float
    limit: float
    met: bool


def summarize(samples: Sequence[float]) -> Figure | None:
    """Median, least, most; none without samples."""
    if not samples:
        return None
    return Figure(statistics.median(samples), min(samples), max(samples), len(samples))


def best(
    rows: Mapping[str, Rows], names: Sequence[str], key: str, better: str
) -> tuple[str, float] | None:
    """The candidate with the best median of a row."""
    medians = {name: statistics.median(rows[name][key]) for name in names if rows[name].get(key)}
    if not medians:
        return None
    choose = max if better == "more" else min
    name = choose(medians, key=lambda name: medians[name])
    return name, medians[name]


def verdicts(rows: Mapping[str, Rows], ours: Sequence[str], peers: Sequence[str]) -> list[Verdict]:
    """Each target whose figures were measured: the best of ``peers``, row by row, and our best at
    equal or better quality. (A person picks one candidate; which ones are compared is in each
    line.) Without one of that quality, our best, which then misses the target."""
    result = []
    for target in TARGETS:
        other = best(rows, peers, target.key, target.better) if target.peer else None
        equal = [
            name for name in ours if other is None or not _is_worse(rows, name, other[0], target)
        ]
        mine = best(rows, equal, target.key, target.better)
        is_equal = mine is not None
        mine = mine or best(rows, ours, target.key, target.better)
        if mine is None or (target.peer and other is None):
            continue
        ratio = mine[1] / other[1] if other else mine[1]
        met = ratio >= target.limit if target.better == "more" else ratio <= target.limit
        result.append(
            Verdict(
                target.key,
                mine[0],
                mine[1],
                other[0] if other else None,
                other[1] if other else None,
                ratio,
                target.limit,
                met and is_equal,
            )
        )
    return result


def _is_worse(rows: Mapping[str, Rows], name: str, peer: str, target: Target) -> bool:
    """Return true if the quality of ours is known and worse than the peer's."""
    if target.quality is None:
        return False
    mine, other = (rows[each].get(target.quality) for each in (name, peer))
    return bool(mine and other and mine[0] > other[0] * WORSE)


def peak_over_size(rows: Rows) -> list[float]:
    """Megabytes by which each peak of memory lies over the size of the artifacts."""
    return [peak - size for peak in rows.get("peak", ()) for size in rows.get("size", ())]


def memory_verdict(rows: Mapping[str, Rows], name: str) -> Verdict | None:
    """Peak memory of a candidate over the size of its artifacts, in megabytes."""
    over = summarize(peak_over_size(rows[name]))
    if over is None:
        return None
    met = over.median <= MEMORY_ALLOWANCE
    return Verdict(
        "peak_over_size", name, over.median, None, None, over.median, MEMORY_ALLOWANCE, met
    )
