"""Questions about two images at once."""

from __future__ import annotations

import random

from mobilevlm.nano.questions import (
    YES_NO,
    Draft,
    Question,
    absent_name,
    matching,
    plural,
    styled,
    with_article,
)
from mobilevlm.nano.scenes import COLORS, SHAPES, Scene

PICTURES = ("first", "second")

STACKED = "<image>\n<image>\n"
"""Both images before the question: what a prompt without ``<image>`` becomes."""
INTERLEAVED = "The first picture: <image>\nThe second picture: <image>\n"
LAYOUTS = (STACKED, INTERLEAVED)


def pair_questions(
    first: Scene, second: Scene, count: int = 6, layout: str | None = None
) -> tuple[Question, ...]:
    """``count`` different questions about two scenes, all with the same layout of the images.

    The text of each begins with the layout; by default one is drawn from LAYOUTS.
    """
    rng = random.Random(first.seed * 11 + second.seed * 13)
    prefix = layout or rng.choice(LAYOUTS)
    found: dict[str, Question] = {}
    for _ in range(4 * count):
        if len(found) == count:
            break
        draft = rng.choice((_more, _which, _both))(first, second, rng)
        if draft is not None:
            text, truth, sentence, choices = draft
            question = styled("two_images", (prefix + text, truth, sentence, choices), rng)
            found.setdefault(text, question)
    return tuple(found.values())


def _more(first: Scene, second: Scene, rng: random.Random) -> Draft | None:
    present = [item for scene in (first, second) for item in scene.items]
    subjects = ["shape", "shape"] + [item.shape for item in present]
    subjects += [f"{item.color} shape" for item in present]
    subjects = [name for name in subjects if matching(first, name) != matching(second, name)]
    if not subjects:
        return None
    name = rng.choice(subjects)
    word = rng.choice(("more", "fewer"))
    first_has_more = matching(first, name) > matching(second, name)
    truth = PICTURES[first_has_more != (word == "more")]
    things = plural(name)
    asked = f"Which picture has {word} {things}?"
    return asked, truth, f"The {truth} picture has {word} {things}.", PICTURES


def _which(first: Scene, second: Scene, rng: random.Random) -> Draft | None:
    subjects = []
    for item in (*first.items, *second.items):
        for name in (item.shape, f"{item.color} shape", item.name):
            if (matching(first, name) > 0) != (matching(second, name) > 0):
                subjects.append(name)
    if not subjects:
        return None
    name = rng.choice(subjects)
    truth = PICTURES[matching(first, name) == 0]
    sentence = f"The {truth} picture has {with_article(name)}."
    return f"Which picture has {with_article(name)}?", truth, sentence, PICTURES


def _both(first: Scene, second: Scene, rng: random.Random) -> Draft | None:
    """Draft a question whether both images have something: half are yes; each no is missing from
    one image or from both. None if the scenes allow no such question."""
    names = (*SHAPES, *(f"{color} shape" for color in COLORS))
    in_both = [name for name in names if matching(first, name) and matching(second, name)]
    if rng.random() < 0.5:
        if not in_both:
            return None
        name = rng.choice(in_both)
        return (
            f"Do both pictures have {with_article(name)}?",
            "yes",
            f"Yes, both pictures have {with_article(name)}.",
            YES_NO,
        )
    scene = rng.choice((first, second))
    absent = absent_name(scene, rng, rng.choice(("shape", "color")))
    if absent is None or not in_both:
        return None
    asked = f"Do both pictures have {with_article(absent)}?"
    return asked, "no", f"No, not both pictures have {with_article(absent)}.", YES_NO
