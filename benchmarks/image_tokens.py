"""Accuracy and time of fewer visual tokens by method, as Markdown and JSON.

    python benchmarks/image_tokens.py nano --questions 480 --json image_tokens.json
    python benchmarks/image_tokens.py nano --questions 960 --after 480      # other scenes

Each method gets the same rows of the encoder and the same questions of the ``scenes`` suite.
``random`` and ``pooling`` (what ``--image-tokens`` does) are the baselines that another method has
to beat: UniPruneBench (arXiv 2511.02650) found six of eight below random rows. Differences to both
are paired, with 95% intervals.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import mobilevlm
from mobilevlm.accuracy import difference, score
from mobilevlm.nano.evaluate import LONGEST_ANSWER, is_right
from mobilevlm.nano.suite import SUITE_KINDS, Example, evaluation_set, images_of
from mobilevlm.prompt import Prepared, Rows
from mobilevlm.reduction import pooled, with_fewer_rows
from mobilevlm.runtime import VLM, Generation
from mobilevlm.runtime.sequence.encoding import encode_image

KINDS = [kind for kind in SUITE_KINDS if kind != "text"]
READING = "read"
BASELINES = ("random", "pooling")
Float32: TypeAlias = NDArray[np.float32]
Grid: TypeAlias = tuple[int, int]


def _random(rows: Float32, grid: Grid, size: Grid, seed: int) -> Float32:
    """Return rows that are drawn, in their order."""
    drawn = np.random.default_rng(seed).permutation(len(rows))
    return rows[np.sort(drawn[: math.prod(size)])]


def _pooling(rows: Float32, grid: Grid, size: Grid, seed: int) -> Float32:
    """Return means over a coarser grid."""
    return pooled(rows, grid, size)


def _unit(rows: Float32) -> Float32:
    length = np.sqrt((rows**2).sum(1, keepdims=True))
    unit: Float32 = rows / np.maximum(length, np.float32(1e-12))
    return unit


def _diverse(rows: Float32, grid: Grid, size: Grid, seed: int) -> Float32:
    """Return rows that are unlike each other: the one furthest from all, then again and again the
    one whose nearest chosen row is furthest (DivPrune, arXiv 2503.02175), by cosine."""
    unit = _unit(rows)
    likeness = unit @ unit.T
    chosen = [int(np.argmin(likeness.sum(0)))]
    nearest = likeness[chosen[0]].copy()
    while len(chosen) < math.prod(size):
        nearest[chosen[-1]] = np.inf
        chosen.append(int(np.argmin(nearest)))
        np.maximum(nearest, likeness[chosen[-1]], out=nearest)
    return rows[sorted(chosen)]


def _similar(rows: Float32, grid: Grid, size: Grid, seed: int) -> Float32:
    """Merge pairs of the most similar rows, every second one into one of the others, until few
    enough are left (ToMe, arXiv 2210.09461)."""
    count, sizes = math.prod(size), np.ones(len(rows), np.float32)
    while len(rows) > count:
        unit = _unit(rows)
        likeness = unit[::2] @ unit[1::2].T
        best = likeness.argmax(1)
        order = np.argsort(-likeness.max(1), kind="stable")[: len(rows) - count]
        sums, weight = rows * sizes[:, None], sizes.copy()
        target = 1 + 2 * best[order]
        np.add.at(sums, target, sums[2 * order])
        np.add.at(weight, target, weight[2 * order])
        left = np.ones(len(rows), bool)
        left[2 * order] = False
        rows, sizes = (sums / weight[:, None])[left], weight[left]
    return rows


def _regions(rows: Float32, grid: Grid, size: Grid, seed: int) -> Float32:
    """Merge neighbours of the grid into regions: again and again the two whose means lose least
    (Ward's criterion), so that plain parts become few rows and others stay."""
    height, width = grid
    count = len(rows)
    index = np.arange(count).reshape(height, width)
    near = np.zeros((count, count), bool)
    for first, second in ((index[:, :-1], index[:, 1:]), (index[:-1], index[1:])):
        near[first.ravel(), second.ravel()] = near[second.ravel(), first.ravel()] = True
    means, sizes = rows.astype(np.float64), np.ones(count)
    square = (means**2).sum(1)
    apart = square[:, None] + square - 2 * means @ means.T
    cost = np.where(near, apart / 2, np.inf)
    places = np.arange(count, dtype=np.float64)
    for _ in range(count - math.prod(size)):
        one, two = divmod(int(cost.argmin()), count)
        whole = sizes[one] + sizes[two]
        means[one] = (means[one] * sizes[one] + means[two] * sizes[two]) / whole
        places[one] = (places[one] * sizes[one] + places[two] * sizes[two]) / whole
        sizes[one], sizes[two] = whole, 0
        near[one] |= near[two]
        near[:, one] |= near[:, two]
        near[two] = near[:, two] = False
        near[one, one] = False
        others = np.flatnonzero(near[one])
        gap = ((means[others] - means[one]) ** 2).sum(1)
        changed = gap * whole * sizes[others] / (whole + sizes[others])
        cost[one] = cost[:, one] = cost[two] = cost[:, two] = np.inf
        cost[one, others] = cost[others, one] = changed
    left = np.flatnonzero(sizes)
    ordered = left[np.argsort(places[left], kind="stable")]
    return means[ordered].astype(np.float32)


METHODS: Mapping[str, Callable[[Float32, Grid, Grid, int], Float32]] = {
    "random": _random,
    "pooling": _pooling,
    "diverse": _diverse,
    "similar": _similar,
    "regions": _regions,
}


@dataclass
class Outcome:
    """Answers by one method and number of visual tokens."""

    method: str
    asked_tokens: int
    tokens: int = 0
    """Visual tokens of an image"""
    right: list[bool] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    """Seconds"""
    reduction: list[float] = field(default_factory=list)
    """Seconds in which rows are made fewer, all images of a prompt"""

    def add(self, example: Example, answer: Generation, images: int, seconds: float) -> None:
        """Add an answer; ``seconds``: in which rows were made fewer."""
        self.tokens = answer.visual_tokens // images
        self.right.append(is_right(example.question, answer.text))
        self.kinds.append(example.question.kind)
        self.prefill.append(answer.timings.prefill)
        self.reduction.append(seconds)

    def of(self, *kinds: str) -> list[bool]:
        """Return which answers to these kinds of question are right."""
        return [right for right, kind in zip(self.right, self.kinds, strict=True) if kind in kinds]


def ask(vlm: VLM, example: Example, images: Sequence[Prepared], rows: Sequence[Rows]) -> Generation:
    """Return the answer to a question about images whose rows are given. Nothing of earlier
    questions is known."""
    vlm.clear_caches()
    for image, given in zip(images, rows, strict=True):
        vlm._cache.keep_image(image.digest, given)
    answer = vlm.generate(example.question.text, images, max_new_tokens=LONGEST_ANSWER)
    assert answer.reused.images == len(images), "encoded again"
    return answer


def measure(
    vlm: VLM, examples: Sequence[Example], budgets: Sequence[int], methods: Sequence[str]
) -> list[Outcome]:
    """Return outcomes: first with all visual tokens, then of each method by budget."""
    whole = Outcome("all", 0)
    fewer = [Outcome(method, most) for most in budgets for method in methods]
    vision, _ = vlm._engines()
    for number, example in enumerate(examples):
        images = [vlm.prepare_image(image) for image in images_of(example)]
        rows = [encode_image(vision, image) for image in images]
        whole.add(example, ask(vlm, example, images, rows), len(images), 0.0)
        for outcome in fewer:
            made = [with_fewer_rows(image, outcome.asked_tokens) for image in images]
            start, found = time.perf_counter(), []
            for image, given in zip(made, rows, strict=True):
                assert image.reduction is not None, "all visual tokens fit"
                grid, size = image.reduction.grid, image.reduction.size
                found.append(Rows(METHODS[outcome.method](given.embeds, grid, size, number)))
            seconds = time.perf_counter() - start
            outcome.add(example, ask(vlm, example, made, found), len(images), seconds)
    return [whole, *fewer]


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return a row for each outcome, as plain JSON types."""
    found = []
    seeing = [kind for kind in KINDS if kind != READING]
    for outcome in outcomes:
        beside = {
            other.method: asdict(difference(other.right, outcome.right))
            for other in outcomes
            if other.method in BASELINES
            and other.asked_tokens == outcome.asked_tokens
            and other.method != outcome.method
        }
        found.append(
            {
                "method": outcome.method,
                "budget": outcome.asked_tokens or None,
                "tokens": outcome.tokens,
                "seeing": asdict(score(outcome.of(*seeing))),
                "reading": asdict(score(outcome.of(READING))),
                "kinds": {kind: asdict(score(outcome.of(kind))) for kind in KINDS},
                "prefill_ms": 1e3 * statistics.median(outcome.prefill),
                "reduction_ms": 1e3 * statistics.median(outcome.reduction),
                "minus_baseline": beside,
            }
        )
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""

    def share(value: dict[str, Any]) -> str:
        return f"{100 * value['right'] / max(value['asked'], 1):.1f}"

    def change(value: dict[str, Any] | None) -> str:
        if value is None:
            return "–"
        low, high = (f"{100 * value[end]:+.1f}" for end in ("low", "high"))
        return f"{100 * value['mean']:+.1f} ({low} to {high})"

    names = ["tokens", "method", "all but reading", "reading", *KINDS, "− random", "− pooling",
             "prefill ms", "reduction ms"]  # fmt: skip
    lines = [names, ["---"] * len(names)]
    for row in rows:
        compared = [change(row["minus_baseline"].get(name)) for name in BASELINES]
        kinds = [share(row["kinds"][kind]) for kind in KINDS]
        times = [f"{row['prefill_ms']:.1f}", f"{row['reduction_ms']:.1f}"]
        shares = [share(row["seeing"]), share(row["reading"])]
        lines.append([str(row["tokens"]), row["method"], *shares, *kinds, *compared, *times])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Measure a bundle, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--questions", type=int, default=1200)
    parser.add_argument("--budgets", type=int, nargs="*", default=[100, 64, 36, 16])
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--after", type=int, metavar="N", help="leave out the scenes of a run with N questions"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    examples = [example for example in evaluation_set(arguments.questions) if example.seeds]
    if arguments.after:
        last = max(max(example.seeds, default=0) for example in evaluation_set(arguments.after))
        examples = [example for example in examples if min(example.seeds) > last]
    with mobilevlm.load(arguments.bundle, threads=arguments.threads) as vlm:
        rows = summary(measure(vlm, examples, arguments.budgets, arguments.methods))
    if arguments.json is not None:
        text = json.dumps({"bundle": arguments.bundle, "asked": len(examples), "rows": rows})
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
