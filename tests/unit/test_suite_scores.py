"""Scorers of benchmarks against cases worked out from their official rules."""

from __future__ import annotations

import pytest

from mobilevlm.runtime.suites.choices import matched_choice, scienceqa_choice
from mobilevlm.runtime.suites.question import Judged, Question, Suite, units
from mobilevlm.runtime.suites.tmmlu import read_letter, tmmlu_figures
from mobilevlm.runtime.suites.yes_no import mme_answer, mme_figures, pope_answer, pope_figures

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not a dog in it.", "no"),
        ("Yes. No doubt.", "yes"),  # the first sentence counts
        ("NO", "yes"),  # only these spellings are looked for
        ("Nothing", "yes"),
        ("", "yes"),
        ("No.", "no"),
        ("Well, no, it is", "no"),
    ],
)
def test_pope_reads_no_by_words_of_the_first_sentence(text: str, expected: str) -> None:
    assert pope_answer(text) == expected


def test_pope_counts_precision_recall_f1_and_the_share_of_yes() -> None:
    said = [("yes", "Yes"), ("yes", "No"), ("no", "Yes"), ("no", "No"), ("yes", "Yes, it is")]
    judged = [Judged(Question("", "", (), (truth,)), answer, 0) for truth, answer in said]
    judged.append(Judged(Question("", "", (), ("no",)), "", 0, "a broken image"))
    assert pope_figures(judged) == pytest.approx(
        {"precision": 2 / 4, "recall": 2 / 3, "f1": 2 * 0.5 * (2 / 3) / (0.5 + 2 / 3),
         "yes_ratio": 4 / 6, "f1_mean": 2 * 0.5 * (2 / 3) / (0.5 + 2 / 3)}
    )  # fmt: skip
    assert set(pope_figures([]).values()) == {0}


def test_pope_averages_the_f1_of_its_categories_whatever_their_size() -> None:
    said = [("random", "yes", "yes")] * 3 + [("popular", "yes", "yes"), ("popular", "no", "yes")]
    judged = [
        Judged(Question(str(place), "", (), (truth,), kind), answer, 0)
        for place, (kind, truth, answer) in enumerate(said)
    ]
    found = pope_figures(judged)
    assert found["f1_mean"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["f1"] == pytest.approx(8 / 9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        (" NO, it is not", "no"),
        ("It's a dog, yes", "other"),  # the first four characters count
        ("", "other"),
        ("not", "no"),
        ("a no", "no"),
        ("Well no", "other"),
    ],
)
def test_mme_reads_the_first_four_characters(text: str, expected: str) -> None:
    assert mme_answer(text) == expected


def test_mme_scores_answers_plus_images_with_both_right() -> None:
    rights = {"count": [(1, 1), (1, 0)], "OCR": [(0, 0)], "code_reasoning": [(1, 1)]}
    judged = [
        Judged(Question("", "", (), (), kind, group=f"{kind}/{place}"), "", right)
        for kind, images in rights.items()
        for place, pair in enumerate(images)
        for right in pair
    ]
    assert mme_figures(judged) == {
        "perception": 125.0, "cognition": 200.0,
        "count": 100 * (3 / 4 + 1 / 2), "OCR": 0.0, "code_reasoning": 200.0,
    }  # fmt: skip


CHOICES = ("a red apple", "a green pear", "a plum", "nothing")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("D.", "D"),
        ("The answer is B.", "B"),
        ("A", "A"),
        ("A. a red apple", "A"),  # of four words, so by its text
        ("A man eats fruit", "A"),  # one of the last four words
        ("A man eats some fruit", ""),  # an article, and too far from the end
        ("B is what I see in this image", ""),
        ("The correct answer is **B**, since it is green", "B"),
        ("The answer is a dog", "A"),  # in any case, as the official expression has it
        ("Cannot determine the answer: B", ""),
        ("Z. a plum", ""),
        ("Well, " * 30 + "a plum", ""),  # more than twice as long as all choices
        ("A or B", ""),
        ("It is a green pear", "B"),
        ("I see a red apple and a plum", ""),
        ("b", ""),
        ("E", ""),
        ("A. a plum", "A"),  # three words
        ("", ""),
    ],
)
def test_a_choice_is_the_only_letter_or_the_only_text(text: str, expected: str) -> None:
    assert matched_choice(text, CHOICES) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("B. a pear", "B"),
        ("B) a pear", ""),
        ("The answer is C.", "C"),
        ("The answer is C. The answer is B.", ""),
        ("The answer is E.", ""),
        ("E", ""),
        ("b", ""),
        (" D\n", "D"),
    ],
)
def test_scienceqa_reads_a_letter_or_the_stated_answer(text: str, expected: str) -> None:
    assert scienceqa_choice(text, 4) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        (" B. 東京", "B"),
        ("答案是B。", "B"),
        ("正確答案為(C)", "C"),
        ("答案應該是: 選項 C", "C"),
        ("答案：A\n答案：D", "D"),
        ("選B", "B"),
        ("（C）因為", "C"),
        ("因為甲，所以是 D 。", "D"),
        ("A或B", "A"),  # the first character
        ("甲是A，乙是B。", "B"),  # the last
        ("應選東京", ""),
        ("e", ""),
        ("", ""),
    ],
)
def test_tmmlu_reads_the_letter_that_is_first_or_stated(text: str, expected: str) -> None:
    assert read_letter(text) == expected


def test_tmmlu_averages_subjects_and_then_categories() -> None:
    rights = {"physics": [1, 1, 1, 0], "music": [1], "dentistry": [0, 0], "taxation": [1, 0],
              "of its own": [1]}  # fmt: skip
    judged = [
        Judged(Question("", "", kind=kind), "", right)
        for kind, scores in rights.items()
        for right in scores
    ]
    assert tmmlu_figures(judged) == pytest.approx(
        {"STEM": 0.75, "humanities": 0.5, "other": 2 / 3, "average": (0.75 + 0.5 + 2 / 3) / 3}
    )
    assert tmmlu_figures([]) == {}


def test_circular_eval_counts_a_question_once_if_all_its_turns_are_right() -> None:
    suite = Suite("mmbench", lambda data, split: [], lambda q, a: 0.0, 8, grouped=True)
    judged = [
        Judged(Question(f"{name}+{turn}", "", (), (), "kind", group=name), "", right)
        for name, turns in (("1", (1, 1, 1)), ("2", (1, 0, 1)), ("3", (1, 1)))
        for turn, right in enumerate(turns)
    ]
    assert [(unit.id, unit.score) for unit in units(suite, judged)] == [
        ("1", 1), ("2", 0), ("3", 1)
    ]  # fmt: skip
