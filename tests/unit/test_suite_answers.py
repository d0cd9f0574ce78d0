"""Scorers of open answers against cases worked out from their official rules."""

from __future__ import annotations

import pytest

from mobilevlm.runtime.suites import cmmmu
from mobilevlm.runtime.suites.documents import anls, edit_distance, ocrbench_match, relaxed_match
from mobilevlm.runtime.suites.mmmu import (
    judge_mmmu,
    normalized,
    open_match,
    open_values,
    read_choice,
    read_pro_choice,
)
from mobilevlm.runtime.suites.question import Question
from mobilevlm.runtime.suites.vqa import gqa_match, soft_accuracy, tokenized
from mobilevlm.runtime.suites.vqa import normalized as vqa_words

pytestmark = pytest.mark.pure
TEXTS = ("cats", "dogs", "birds of prey", "fish")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("B (C)", "C"),  # brackets go first
        ("(A) or (D)", "D"),  # the last
        ("A or B", "B"),
        ("B, not A", "A"),
        ("B,", "B"),
        ("A: cats", ""),  # no word by itself, and too short for a text
        ("it must be dogs", ""),  # no more than five words
        ("I am sure these are dogs", "B"),
        ("first dogs then cats and then dogs", "B"),
        ("the dogs chase all the FISH there", "D"),
        ("b", ""),
        ("", ""),
        ("...B!", "B"),
    ],
)
def test_mmmu_reads_a_choice(text: str, expected: str) -> None:
    assert read_choice(text, TEXTS) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: B", "B"),
        ("A? Answer: C\nAnswer: $D$", "D"),
        ("Answer: A or B", "B"),  # not one: read as a sentence, the last word
        ("C. birds", "C"),  # with a period
        ("B.", "B"),
        ("CAB ", "B"),  # a letter before a space, not only as a word
        ("(A) D ", "A"),
        ("A. or C.?", "A"),  # neither is a word alone: the first
    ],
)
def test_mmmu_pro_reads_the_stated_answer_first(text: str, expected: str) -> None:
    assert read_pro_choice(text, TEXTS) == expected


def test_mmmu_draws_an_unreadable_choice_by_the_question() -> None:
    questions = [Question(f"q{n}", "", (), ("A",), "", TEXTS) for n in range(400)]
    rights = [judge_mmmu(question, "hm") for question in questions]
    assert rights == [judge_mmmu(question, "well") for question in questions]
    assert 70 < sum(rights) < 130  # a quarter of 400, within 3.5 standard deviations


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 1,234.567 ", [1234.57]),
        ("-3", [-3.0]),
        ("1e3", [1000.0]),
        ("Paris", ["paris"]),
        ("X", [" x", "x "]),
        ("5%", ["5%"]),
    ],
)
def test_mmmu_normalizes_numbers_and_text(text: str, expected: list[object]) -> None:
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("text", "truths", "right"),
    [
        ("The answer is 24.", ["24"], True),
        ("x = 3 + 4 = 7", ["7"], True),
        ("7 = x", ["7"], False),
        ("It is 1,234 m", ["1234"], True),
        ("It is 1234", ["123"], False),
        ("Therefore it could be Paris, I think", ["paris"], True),
        ("not paris\nso London", ["paris"], False),  # the line with a key word alone counts
        ("about 0.333", ["0.33"], True),
        ("the value is 12.5 kg", ["12.5"], True),
        ("xy", ["x"], False),  # one letter needs a space beside it
        ("A x b", ["x"], True),
        ("5", ["five", "5.00"], True),
        ("is ", ["is"], True),  # nothing behind the key word: the whole answer
        ("is ,.", ["is"], True),
        ("3e2 apples", ["300"], True),
        ("", ["1"], False),
    ],
)
def test_mmmu_reads_open_answers(text: str, truths: list[str], right: bool) -> None:
    assert open_match(text, truths) is right


def test_an_equation_counts_in_the_last_line_only() -> None:
    assert open_values("y = 9\nx = 2") == [2.0, 2.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),  # the table has one apostrophe missing alone
        ("t-shirt", "t shirt"),
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("St. Louis", "st louis"),
        ("yes!\n", "yes"),
        ("a\tcat", "cat"),
        ("7:30", "7:30"),
        ("black/white", "black white"),
    ],
)
def test_vqa_words_are_compared_without_their_dress(text: str, expected: str) -> None:
    assert vqa_words(text) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_vqa_accuracy_averages_over_people_left_out(agreeing: int, expected: float) -> None:
    people = ["two dogs"] * agreeing + [f"other {index}" for index in range(10 - agreeing)]
    assert soft_accuracy("2 dogs.", people) == pytest.approx(expected)
    assert soft_accuracy("Yes", ["yes"] * 10) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("red,blue", "redblue"), ("Levi's", "levi 's"), ("Why?", "why"), ("1,000.", "1000"),
     ("two-way", "2 way")],
)  # fmt: skip
def test_textvqa_drops_commas_first_and_splits_off_an_s(text: str, expected: str) -> None:
    assert tokenized(text) == expected


def test_gqa_compares_whole_answers() -> None:
    assert gqa_match("Left.", "left") == 1
    assert gqa_match("to the left", "left") == 0


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("-95", "-100", True),
        ("10%", "0.1", True),
        ("10", "10%", False),
        ("Blue ", "blue", True),
        ("0", "0", True),
        ("0.0", "0", False),  # text, as nothing is within 5% of zero
        ("1,000", "1000", False),
        ("nan", "5", False),
    ],
)
def test_chartqa_allows_five_percent(answer: str, truth: str, right: bool) -> None:
    assert relaxed_match(answer, truth) == right


def test_edit_distance_agrees_with_known_ones() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3 and edit_distance("abc", "") == 3
    assert edit_distance("flaw", "lawn") == 2 and edit_distance("same", "same") == 0


@pytest.mark.parametrize(
    ("answer", "truths", "expected"),
    [
        ("ITC Limited", ["itc limited"], 1),
        ("itc  limited", ["itc limited"], 1),
        ("itc limted", ["itc  limited", "ITC"], 1 - 1 / 12),  # over the length with both spaces
        ("itc limted", ["itc limited", "ITC"], 1 - 1 / 11),
        ("abcd", ["abxy"], 0.5),  # half of it right counts, as in the script
        ("abcd", ["axyz"], 0),
        ("abcde", ["abcxy"], 0.6),
        ("", [""], 1),
        ("", ["a"], 0),
    ],
)
def test_anls_is_the_best_similarity_above_one_half(
    answer: str, truths: list[str], expected: float
) -> None:
    assert anls(answer, truths) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truths", "dataset", "right"),
    [
        ("The word is CENTRE.", ["Centre"], "IIIT5K", True),
        ("two\nlines", ["two lines"], "SROIE", True),
        ("twolines", ["two lines"], "SROIE", False),
        ("x ^ { 2 }", ["x^{2}"], "HME100k", True),
        ("X^{2}", ["x^{2}"], "HME100k", False),
        ("b", ["a", "b"], "docVQA", True),
    ],
)
def test_ocrbench_looks_for_the_truth_in_the_answer(
    answer: str, truths: list[str], dataset: str, right: bool
) -> None:
    assert ocrbench_match(answer, truths, dataset) == right


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("选(A)和(C)", "AC"),
        ("答案是AC", "AC"),
        ("B，因为B对，A不对", "B"),  # said more often
        ("应该是鱼类", "D"),
        ("不知道", ""),
        ("", ""),
    ],
)
def test_cmmmu_reads_the_letters_said_most(text: str, expected: str) -> None:
    assert cmmmu.read_letters(text, ("猫", "狗", "鸟", "鱼")) == expected


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [
        ("答案是12", "12", True),
        ("所以x=3.50", "3.5", True),
        ("因此电压等于220伏", "220", True),
        ("北京", "北京", True),
        ("结果为上海", "北京", False),
        ("它是" + "很" * 30 + "北京", "北京", False),  # more than 20 longer than the truth
        ("1，000", "1", False),  # a number with Chinese commas is no 1
    ],
)
def test_cmmmu_fills_blanks(text: str, truth: str, right: bool) -> None:
    assert cmmmu.blank_match(text, truth) is right


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("对", "对"),
        ("错误", "错"),
        ("这个说法是错误的", "错"),
        ("不正确", "对"),  # as the official code has it
        ("不知道", ""),
        ("判断是否正确", ""),
        ("陈述正确。\n结果错误。\n答案错", "错"),
        ("陈述正确。\n结果错。\n答案错", ""),  # the same words count once
    ],
)
def test_cmmmu_judges_statements_by_their_words(text: str, expected: str) -> None:
    assert cmmmu.read_statement(text) == expected
