"""Scorers against what the suites' own code says of many answers.

``tests/data/suite_oracles.json`` holds answers made here and the results of the official code,
which was run on them; it names repository and commit of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mobilevlm.runtime.suites import cmmmu, mmmu
from mobilevlm.runtime.suites.choices import matched_choice, scienceqa_choice
from mobilevlm.runtime.suites.documents import anls, relaxed_match
from mobilevlm.runtime.suites.tmmlu import read_letter
from mobilevlm.runtime.suites.vqa import normalized, soft_accuracy, tokenized
from mobilevlm.runtime.suites.yes_no import mme_answer, pope_answer

pytestmark = pytest.mark.pure
DATA = json.loads((Path(__file__).parents[1] / "data/suite_oracles.json").read_text("utf-8"))
CHOICES, CHINESE = DATA["choices"], DATA["chinese_choices"]
SCORERS: dict[str, Callable[..., Any]] = {
    "mmmu_choice": lambda text: mmmu.read_choice(text, CHOICES),
    "mmmu_pro_choice": lambda text: mmmu.read_pro_choice(text, CHOICES),
    "mmmu_open": mmmu.open_match,
    "vlmevalkit_choice": lambda text: matched_choice(text, CHOICES),
    "vqa_words": normalized,
    "cmmmu_choice": lambda text: cmmmu.read_letters(text, CHINESE),
    "cmmmu_blank": cmmmu.blank_match,
    "cmmmu_statement": cmmmu.read_statement,
    "chartqa": relaxed_match,
    "anls": anls,
    "textvqa": lambda text, people: soft_accuracy(text, people, tokenized),
    "pope": pope_answer,
    "mme": mme_answer,
    "scienceqa": lambda text: scienceqa_choice(text, 4),
    "tmmlu_letter": read_letter,
}


@pytest.mark.parametrize("name", SCORERS)
def test_scorers_agree_with_the_official_code(name: str) -> None:
    score, cases = SCORERS[name], DATA["cases"][name]
    assert len(cases) > 20
    for *given, expected in cases:
        found = score(*given)
        same = (
            found == pytest.approx(expected) if isinstance(expected, float) else found == expected
        )
        assert same, (given, expected, found)


def test_every_case_has_a_scorer() -> None:
    assert set(DATA["cases"]) == set(SCORERS)
