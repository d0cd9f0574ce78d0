"""Noun phrases of questions and the cells they mean."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from mobilevlm.nano.questions import Question, plural, questions
from mobilevlm.nano.scenes import sample_scene
from mobilevlm.nano.training.grounding import cells_of, phrases
from mobilevlm.nano.training.packing import add_question, filled_row, start_row
from mobilevlm.nano.training.tokenizer import prompt_text, train_tokenizer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Where is the red circle?", ["red circle"]),
        ("How many stars are in the picture?", ["star"]),
        ("Are there fewer crosses than blue shapes?", ["cross", "blue shape"]),
        ("Is the large moon to the left of the ring?", ["large moon", "ring"]),
        ("What shape is the orange shape?", ["orange shape"]),
        ("What color is the shape at the top left?", []),
        ("What is on the left?", []),
        ("What is 2 plus 3?", []),
    ],
)
def test_phrases(text: str, expected: list[str]) -> None:
    found = phrases(text)
    assert [name for name, _ in found] == expected
    for name, end in found:
        assert text[:end].endswith((f" {name}", f" {plural(name)}"))


def test_cells_hold_what_the_scene_does() -> None:
    scene = sample_scene(5)
    everything = cells_of(scene, "shape")
    assert np.flatnonzero(everything).tolist() == [item.cell for item in scene.items]
    for item in scene.items:
        for name in (item.shape, item.name, f"{item.size} {item.name}"):
            assert cells_of(scene, name)[item.cell] == 1
    absent = [item for item in scene.items if item.color == "green"]
    assert cells_of(scene, "green shape").sum() == len(absent)


def test_a_phrase_is_grounded_at_its_last_token() -> None:
    tokenizer = train_tokenizer(512, scenes=300)
    scene = sample_scene(5)
    asked = questions(scene, 20)
    row = filled_row(asked, (0,), 2000, tokenizer, 144, scene)
    expected = [name for question in asked for name, _ in phrases(question.text)]
    assert len(row.phrases) == len(expected) > 10
    for (column, _), name in zip(row.phrases, expected, strict=True):
        noun = name.split()[-1]
        word = tokenizer.processor.decode(row.ids[column - 6 : column + 1]).split()[-1]
        assert word in (noun, plural(noun))


def test_a_question_that_does_not_fit_leaves_the_row_as_it_is() -> None:
    tokenizer = train_tokenizer(512, scenes=300)
    prompt = tokenizer.prompt_ids(prompt_text("Where is the ring?", 1))
    row = start_row(prompt[:30], (), 144)
    question = Question("where", "Where is the ring?", "top", "short", "top", ())
    before = len(row.ids)
    assert not add_question(row, tokenizer, question, 1, before + 3, sample_scene(5))
    assert len(row.ids) == before and not row.phrases and not row.answers
