"""The scene generator: determinism, disjoint splits, true answers, balanced answers."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from mobilevlm.nano.drawing import RGB, render
from mobilevlm.nano.evaluate import evaluate, is_right, normalize
from mobilevlm.nano.pairs import INTERLEAVED, STACKED, pair_questions
from mobilevlm.nano.questions import (
    KINDS,
    SHORT_STYLE,
    Question,
    caption,
    questions,
)
from mobilevlm.nano.scenes import (
    COLORS,
    HELD_OUT,
    POSITIONS,
    SHAPES,
    SIZES,
    TRAINING_SEEDS,
    Item,
    Scene,
    sample_scene,
)
from mobilevlm.nano.suite import SUITE_KINDS, evaluation_set
from mobilevlm.nano.text_only import text_questions
from mobilevlm.nano.training.dense import CLASSES, dense_targets

pytestmark = pytest.mark.pure

TRAINING = [sample_scene(seed) for seed in range(400)]
EVALUATION = [sample_scene(TRAINING_SEEDS + seed, "evaluation") for seed in range(400)]


def test_a_seed_fixes_scene_picture_and_questions() -> None:
    for seed in range(20):
        again = sample_scene(seed)
        assert again == TRAINING[seed]
        assert render(again).tobytes() == render(TRAINING[seed]).tobytes()
        assert questions(again) == questions(TRAINING[seed])
    assert len({render(scene).tobytes() for scene in TRAINING[:20]}) == 20


def test_the_generator_covers_what_it_promises() -> None:
    items = [item for scene in TRAINING for item in scene.items]
    assert {item.shape for item in items} == set(SHAPES) and len(SHAPES) >= 8
    assert {item.color for item in items} == set(COLORS) and len(COLORS) >= 8
    assert {item.size for item in items} == set(SIZES) and len(SIZES) == 3
    assert len({scene.background.kind for scene in TRAINING}) >= 5
    assert len({scene.label.font for scene in TRAINING if scene.label}) >= 5
    assert any(scene.label.text.isdigit() for scene in TRAINING if scene.label)


def test_training_never_shows_or_names_a_held_out_combination() -> None:
    assert len({color for color, _ in HELD_OUT}) == len({shape for _, shape in HELD_OUT}) == 8
    names = {f"{color} {shape}" for color, shape in HELD_OUT}
    for scene in TRAINING:
        asked = " ".join(q.text + q.answer for q in questions(scene, 20))
        assert not names & {item.name for item in scene.items}
        assert not any(name in asked + caption(scene) for name in names)
    shown = Counter(item.name in names for scene in EVALUATION for item in scene.items)
    assert shown[True] > 0.3 * shown.total()


def test_a_seed_belongs_to_one_split() -> None:
    with pytest.raises(ValueError, match="does not belong"):
        sample_scene(TRAINING_SEEDS)
    with pytest.raises(ValueError, match="does not belong"):
        sample_scene(0, "evaluation")
    assert all(seed >= TRAINING_SEEDS for e in evaluation_set(120) for seed in e.seeds)


def test_items_lie_inside_their_own_cells() -> None:
    for scene in TRAINING + EVALUATION:
        cells = [item.cell for item in scene.items]
        assert len(set(cells)) == len(cells)
        for item in scene.items:
            column, row = int(item.x // 64), int(item.y // 64)
            assert (row, column) == (item.row, item.column)
            assert scene.label is None or scene.label.row != item.row


def test_pixels_show_the_colors_that_the_scene_states() -> None:
    """At the centre of a solid shape the nearest named color is the item's, light aside."""
    names = list(RGB)
    table = np.array([RGB[name] for name in names], float)
    right = []
    for scene in TRAINING[:150]:
        if abs(scene.light[2] - 1) > 0.08 or scene.noise > 5:
            continue
        pixels = np.asarray(render(scene), float)
        for item in scene.items:
            if item.shape in ("circle", "square", "star", "cross", "heart", "triangle"):
                seen = pixels[round(item.y), round(item.x)]
                right.append(names[((table - seen) ** 2).sum(1).argmin()] == item.color)
    assert len(right) > 50 and np.mean(right) > 0.95


def test_dense_targets_mark_every_item_once() -> None:
    for scene in TRAINING[:50]:
        targets = dense_targets(scene)
        assert targets.shape == (len(CLASSES), 144)
        assert (targets < np.array(list(CLASSES.values()))[:, None]).all()
        assert (targets[3] == 1).sum() == len(scene.items)
        seen = Counter(SHAPES[shape - 1] for shape in targets[0][targets[3] == 1])
        assert seen == Counter(item.shape for item in scene.items)


def described(scene: Scene, words: str) -> list[Item]:
    """Items that a noun phrase of a question means; written apart from the generator's own way."""
    words = words.replace("the ", "").strip()
    place = re.search(r" (?:in|on|at) (.+)$", words)
    if place:
        return [item for item in scene.items if POSITIONS[item.cell] == place[1]]
    wanted = [re.sub(r"(?<=ss)es$|(?<=s)es$|s$", "", word) if word not in ("cross",) else word
              for word in words.split()]  # fmt: skip
    wanted = ["cross" if word in ("cros", "cross") else word for word in wanted]
    return [
        item
        for item in scene.items
        if all(word in ("shape", item.color, item.shape, item.size) for word in wanted)
    ]


def truth_of(scene: Scene, question: Question) -> str:
    """The answer of a one-image question, derived from its text and the scene alone."""
    text = question.text.removesuffix(SHORT_STYLE)

    def match(pattern: str) -> re.Match[str] | None:
        return re.fullmatch(pattern, text)

    if found := match(r"What colou?r is the (.+)\?") or match(r"What is the colou?r of the (.+)\?"):
        (item,) = described(scene, found[1])
        return item.color
    if found := match(r"(?:What size is|How large is) the (.+)\?"):
        (item,) = described(scene, found[1])
        return item.size
    if found := match(r"What shape is the (.+)\?") or match(r"What is the (.+)\?"):
        (item,) = described(scene, found[1])
        return item.shape
    if found := match(r"What (?:is|do you see) (?:at|in|on) the (.+)\?"):
        (item,) = [item for item in scene.items if item.position == found[1]]
        return f"{item.color} {item.shape}"
    if found := match(r"Where is the (.+)\?"):
        (item,) = described(scene, found[1])
        return POSITIONS[3 * int(item.y // 64) + int(item.x // 64)]
    if found := match(r"How many (.+?) are (?:there|in the picture)\?"):
        return str(len(described(scene, found[1])))
    if found := match(r"Is there an? (.+?)(?: in the picture)?\?"):
        return "yes" if described(scene, found[1]) else "no"
    if found := match(r"Is the (.+) (?:to the left or to the right of|above or below) the (.+)\?"):
        (one,), (other,) = described(scene, found[1]), described(scene, found[2])
        if "above" in text:
            return "above" if one.y < other.y else "below"
        return "left" if one.x < other.x else "right"
    if found := match(r"Is the (.+) (to the left of|to the right of|above|below) the (.+)\?"):
        (one,), (other,) = described(scene, found[1]), described(scene, found[3])
        holds = {
            "to the left of": one.x < other.x,
            "to the right of": one.x > other.x,
            "above": one.y < other.y,
            "below": one.y > other.y,
        }[found[2]]
        return "yes" if holds else "no"
    if found := match(r"Are there (more|fewer) (.+) than (.+)\?"):
        one_count, other_count = len(described(scene, found[2])), len(described(scene, found[3]))
        holds = one_count > other_count if found[1] == "more" else one_count < other_count
        return "yes" if holds else "no"
    assert scene.label is not None and question.kind == "read", text
    return scene.label.text


def test_every_answer_is_true_of_its_scene() -> None:
    checked: Counter[str] = Counter()
    for scene in TRAINING + EVALUATION:
        for question in questions(scene, 14):
            assert truth_of(scene, question) == question.truth, question
            assert is_right(question, question.answer)
            assert not question.choices or question.truth in question.choices
            assert question.text.endswith(SHORT_STYLE) == (question.style == "short")
            checked[question.kind] += 1
    assert set(checked) == set(KINDS) and min(checked.values()) > 200


def test_every_answer_about_two_pictures_is_true() -> None:
    for first, second in pairwise(TRAINING[:200]):
        for question in pair_questions(first, second):
            assert question.text.startswith((STACKED, INTERLEAVED))
            text = question.text.rpartition("<image>\n")[2].removesuffix(SHORT_STYLE)
            found = re.fullmatch(
                r"(?:Which picture has (more|fewer|an?)|Do (both) pictures have an?) (.+)\?", text
            )
            assert found, text
            one, other = (len(described(scene, found[3])) for scene in (first, second))
            if found[2]:
                truth = "yes" if one and other else "no"
            else:
                assert one != other
                truth = "second" if (one > other) == (found[1] == "fewer") else "first"
                assert found[1] in ("more", "fewer") or min(one, other) == 0
            assert question.truth == truth


def test_a_caption_names_everything() -> None:
    for scene in TRAINING[:100]:
        sentence = caption(scene).lower()
        assert all(item.name in sentence for item in scene.items)
        assert scene.label is None or f'"{scene.label.text}"' in sentence


def test_training_answers_are_balanced() -> None:
    """The most common answer of a kind is not much above its natural chance."""
    answers: defaultdict[tuple[str, tuple[str, ...]], Counter[str]] = defaultdict(Counter)
    for scene in TRAINING:
        for question in questions(scene, 14):
            if question.choices:
                answers[question.kind, question.choices][question.truth] += 1
    for (kind, choices), counts in answers.items():
        limit = 0.36 if kind == "count" else 1 / len(choices) + 0.08  # six shapes are rare
        assert max(counts.values()) / counts.total() < limit, (kind, counts)


def test_the_evaluation_set_is_balanced_and_fixed() -> None:
    examples = evaluation_set(600)
    assert len(examples) == 600 and examples == evaluation_set(600)
    kinds = Counter(example.question.kind for example in examples)
    assert set(kinds) == set(SUITE_KINDS) and max(kinds.values()) - min(kinds.values()) <= 1
    styles = Counter(example.question.style for example in examples)
    assert min(styles.values()) > 240
    for kind, chance in (("exists", 1 / 2), ("compare", 1 / 2), ("color", 1 / 8), ("count", 1 / 7)):
        truths = Counter(e.question.truth for e in examples if e.question.kind == kind)
        assert max(truths.values()) / truths.total() < chance + 0.03


def test_text_only_answers_hold() -> None:
    for question in text_questions(1, 200):
        text = question.text.removesuffix(SHORT_STYLE)
        if found := re.fullmatch(r"What is (\d+) (plus|minus) (\d+)\?", text):
            one, other = int(found[1]), int(found[3])
            assert int(question.truth) == (one + other if found[2] == "plus" else one - other)
        assert (
            question.truth in normalize(question.answer)
            or " " in question.truth
            or (question.text.startswith(("What can", "Thank", "Hello")))
        )


def test_judging_accepts_the_truth_in_other_words_and_nothing_else() -> None:
    where = Question("where", "Where is the heart?", "", "full", "top left", POSITIONS)
    assert is_right(where, "It is at the Top Left.") and not is_right(where, "At the top.")
    assert not is_right(where, "top left or bottom right")
    count = Question("count", "How many?", "", "full", "3", tuple("0123456"))
    assert is_right(count, "There are three of them.") and not is_right(count, "2 or 3")
    yes = Question("exists", "Is there a heart?", "", "full", "yes", ("yes", "no"))
    assert is_right(yes, "Yes, there is.") and not is_right(yes, "No, yes is wrong")


def test_evaluation_scores_sight_and_blindness_apart() -> None:
    examples = [e for e in evaluation_set(120) if e.question.kind == "color"]
    truths = {e.question.text: e.question.truth for e in examples}
    noisy = evaluate(lambda text, images: truths[text] if _smooth(images) else "red", examples)
    assert noisy.overall.accuracy == 1.0
    assert noisy.blind_overall is not None and noisy.blind_overall.accuracy < 0.4
    assert noisy.to_dict()["kinds"]["color"]["asked"] == len(examples)


def _smooth(images: Sequence[object]) -> bool:
    return all(np.asarray(image, float).std() < 70 for image in images)
