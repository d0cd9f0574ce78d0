"""Held-out scores of the model that also hears and draws. Its images are judged by ``nano``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image

from mobilevlm.accuracy import Score, score
from mobilevlm.nano import beeps
from mobilevlm.nano.evaluate import is_right
from mobilevlm.nano.questions import NAMES, SHORT_STYLE, Question, at, questions, with_article
from mobilevlm.nano.scenes import TRAINING_SEEDS, Item
from mobilevlm.nano.simple import (
    codes_of,
    draw_exactly,
    draw_varied,
    simple_caption,
    simple_scene,
)
from mobilevlm.nano.training.any_files import KINDS

if TYPE_CHECKING:
    from mobilevlm.runtime import VLM

LONGEST = 24
"""Tokens of an answer; the longest true ones take fewer."""


def seeing_scores(vlm: VLM, count: int) -> dict[str, Score]:
    """Return the shares of right answers to so many questions of each kind about held-out
    scenes."""
    found: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    seed = TRAINING_SEEDS
    while any(len(right) < count for right in found.values()):
        seed += 1
        scene = simple_scene(seed, "evaluation")
        image = Image.fromarray(draw_varied(scene, seed))
        for one in questions(scene, 12, KINDS):
            if one.style == "full" and len(found[one.kind]) < count:
                text = one.text.removesuffix(SHORT_STYLE)
                said = vlm.generate(text, [image], max_new_tokens=LONGEST).text
                found[one.kind].append(is_right(one, said))
    return {kind: score(right) for kind, right in found.items()}


def hearing_scores(vlm: VLM, count: int) -> tuple[Score, Score]:
    """Return the shares of held-out clips that are right as a whole, and of letters."""
    clips, letters = list[bool](), list[bool]()
    for seed in range(TRAINING_SEEDS, TRAINING_SEEDS + count):
        clip = beeps.sample_clip(seed, "evaluation")
        sound = (beeps.sound(clip), beeps.SAMPLE_RATE)
        said = vlm.generate(beeps.QUESTION, audio=[sound], max_new_tokens=LONGEST).text.strip()
        clips.append(said == clip.answer)
        heard = [*said.split(), *[""] * len(clip.letters)]
        letters += [a == b for a, b in zip(heard, clip.letters, strict=False)]
    return score(clips), score(letters)


def asked_at(item: Item) -> Question:
    """Return the question that a judge is asked about an item's place."""
    place = at(item.cell)
    sentence = f"There is {with_article(item.name)} {place}."
    return Question("what", f"What is {place}?", sentence, "full", item.name, NAMES)


def drawing_scores(artist: VLM, judge: VLM, count: int) -> tuple[Score, Score, Score]:
    """Return the shares of held-out captions whose image shows all that it says, of shapes that are
    there, and of images that have the very codes. ``judge``: nano."""
    captions, shapes, exact = list[bool](), list[bool](), list[bool]()
    for seed in range(TRAINING_SEEDS, TRAINING_SEEDS + count):
        scene = simple_scene(seed, "evaluation")
        [drawn] = artist.drawn(simple_caption(scene), seed=seed - TRAINING_SEEDS)
        same = codes_of(draw_exactly(scene)).tolist()
        exact.append(drawn.codes == same)
        found = []
        for item in scene.items:
            question = asked_at(item)
            said = judge.generate(question.text, [drawn.image], max_new_tokens=LONGEST).text
            found.append(is_right(question, said))
        captions.append(all(found))
        shapes += found
    return score(captions), score(shapes), score(exact)


def scores(vlm: VLM, judge: VLM, count: int) -> Iterator[tuple[str, Score]]:
    """Yield all scores by their names, each of so many questions of a kind, clips or captions."""
    clips, letters = hearing_scores(vlm, count)
    yield "clips heard", clips
    yield "letters heard", letters
    captions, shapes, exact = drawing_scores(vlm, judge, count)
    yield "captions drawn, as nano sees it", captions
    yield "shapes drawn, as nano sees it", shapes
    yield "images with the very codes", exact
    for kind, found in seeing_scores(vlm, count).items():
        yield f"seen: {kind}", found
