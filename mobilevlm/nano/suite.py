"""The held-out set of the ``scenes`` suite: balanced over kinds of question and their answers."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mobilevlm.nano.drawing import render
from mobilevlm.nano.pairs import pair_questions
from mobilevlm.nano.questions import KINDS, Question, ask
from mobilevlm.nano.scenes import IMAGE_SIZE, TRAINING_SEEDS, Scene, sample_scene
from mobilevlm.nano.text_only import text_questions

SUITE_KINDS = (*KINDS, "two_images", "text")
"""Kinds of question in the suite."""

ANSWERS = {
    "color": 8, "shape": 8, "size": 3, "what": 20, "where": 9, "count": 7, "exists": 2,
    "relation": 6, "compare": 2, "read": 1100, "two_images": 4, "text": 100,
}  # fmt: skip
"""Answers per kind, none of which may be right more often than its share. ``what`` has 64, but
the eight never seen in training are asked about more often."""


@dataclass(frozen=True)
class Example:
    """A question and the seeds of the scenes it is about (none for text-only questions)."""

    question: Question
    seeds: tuple[int, ...]


def evaluation_set(n: int = 2000) -> tuple[Example, ...]:
    """``n`` examples from evaluation scenes, the same ones every time.

    Every kind has as many questions (give or take one), and within a kind no answer is right more
    often than its share, so neither the majority answer nor a lucky kind flatters a model.
    """
    wanted = {
        kind: n // len(SUITE_KINDS) + (index < n % len(SUITE_KINDS))
        for index, kind in enumerate(SUITE_KINDS)
    }
    share = {kind: max(2, -(-count // ANSWERS[kind])) for kind, count in wanted.items()}
    rng = random.Random(n)
    filled: Counter[str] = Counter()
    answered: Counter[tuple[str, str]] = Counter()
    examples: list[Example] = []
    seed = TRAINING_SEEDS
    previous = sample_scene(seed, "evaluation")
    while len(examples) < n:
        seed += 1
        scene = sample_scene(seed, "evaluation")
        open_kinds = [kind for kind in SUITE_KINDS if filled[kind] < wanted[kind]]
        # The emptiest kinds first, at most two questions about one scene.
        open_kinds.sort(key=lambda kind: filled[kind] / wanted[kind])
        taken = 0
        for kind in open_kinds:
            question, seeds = _draw(kind, scene, previous, rng)
            if question is None:
                continue
            if answered[kind, question.truth] >= share[kind]:
                continue
            filled[kind] += 1
            answered[kind, question.truth] += 1
            examples.append(Example(question, seeds))
            taken += 1
            if taken == 2:
                break
        previous = scene
    return tuple(examples[:n])


def _draw(
    kind: str, scene: Scene, previous: Scene, rng: random.Random
) -> tuple[Question | None, tuple[int, ...]]:
    if kind == "text":
        return text_questions(scene.seed, 1)[0], ()
    if kind == "two_images":
        asked = pair_questions(previous, scene, 1)
        return (asked[0] if asked else None), (previous.seed, scene.seed)
    return ask(scene, kind, rng), (scene.seed,)


def images_of(example: Example) -> list[Image.Image]:
    """The rendered scenes of an example."""
    return [render(sample_scene(seed, "evaluation")) for seed in example.seeds]


def noise(example: Example) -> list[Image.Image]:
    """Uniform noise in place of each image: what a blind model sees."""
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
        for seed in example.seeds
    ]
