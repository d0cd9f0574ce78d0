"""Mixed precision by sensitivity: what is chosen, and the recipe file that says it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import PLAIN_INT4, Fixture

from mobilevlm.errors import MobileVLMError, QualityError
from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.recipes.file import find_recipe, recipe_text
from mobilevlm.export.search.recipe import check_target
from mobilevlm.export.search.search import Data, Found, Goal, search
from mobilevlm.recipe import Limits, LinearFormat

TEXTS = [
    Sample("What is red?", "Blood is, and so are roses.", ()),
    Sample("Say hello in three words.", "Hello to you.", ()),
]
DATA = Data(TEXTS, TEXTS)
FORMATS = tuple(LinearFormat(p, symmetric=False) for p in ("q2", "q4", "q8"))


@pytest.fixture(scope="module")
def found_for(mobilevlm_v2: Fixture) -> Callable[[Goal], Found]:
    made: dict[Goal, Found] = {}

    def run(goal: Goal) -> Found:
        if goal not in made:
            made[goal] = search(mobilevlm_v2.model, goal, FORMATS, DATA)
        return made[goal]

    return run


def test_a_budget_is_met_and_used(found_for: Callable[[Goal], Found]) -> None:
    """The unused part of the budget is less than the largest step of a layer between formats."""
    found = found_for(Goal(bits_per_weight=5.0))
    step = max(
        abs(unit.stored_bytes(a) - unit.stored_bytes(b))
        for unit in found.units
        for a, b in pairwise(FORMATS)
    )
    weights = sum(unit.size for unit in found.units)
    assert 5.0 - 8 * step / weights < found.bits_per_weight <= 5.0
    assert found.allocation.size == sum(
        unit.stored_bytes(found.layers[unit.name]) for unit in found.units
    )
    assert len(set(found.layers.values())) > 1


def test_a_larger_budget_loses_less(found_for: Callable[[Goal], Found]) -> None:
    losses = [found_for(Goal(bits_per_weight=bits)).effect.kl for bits in (3.5, 5.0, 20.0)]
    assert losses == sorted(losses, reverse=True) and losses[0] > 10 * losses[-1]


def test_the_choice_is_as_good_as_the_front(found_for: Callable[[Goal], Found]) -> None:
    found = found_for(Goal(bits_per_weight=5.0))
    corners = [(found.bits_of(point), point.kl) for point in found.front]
    assert corners == sorted(corners, key=lambda corner: corner[0])
    assert [kl for _, kl in corners] == sorted((kl for _, kl in corners), reverse=True)
    assert found.allocation.kl <= next(kl for bits, kl in reversed(corners) if bits <= 5.0)


def test_a_limit_of_divergence_is_met_by_what_is_measured(
    found_for: Callable[[Goal], Found],
) -> None:
    loose, finest = found_for(Goal(bits_per_weight=3.5)), found_for(Goal(bits_per_weight=20.0))
    limit = (loose.effect.kl * finest.effect.kl) ** 0.5
    found = found_for(Goal(max_kl=limit))
    assert found.effect.kl <= limit
    assert finest.allocation.size > found.allocation.size


def test_what_cannot_be_met_is_refused_with_what_can(
    mobilevlm_v2: Fixture, found_for: Callable[[Goal], Found]
) -> None:
    with pytest.raises(MobileVLMError, match=r"--budget 2bpw: too small: .* take 2\.\d+ to \d+\."):
        search(mobilevlm_v2.model, Goal(2.0), FORMATS, DATA)
    least = found_for(Goal(bits_per_weight=20.0)).effect.kl
    with pytest.raises(QualityError, match="not reached: with the finest candidates") as caught:
        search(mobilevlm_v2.model, Goal(max_kl=least / 100), FORMATS, DATA)
    assert f"{least:.4g}" in str(caught.value)
    for goal in ((None, None), (4.0, 0.1)):
        with pytest.raises(MobileVLMError, match="one goal: --budget or --max-kl"):
            Goal(*goal)


def test_a_recipe_comes_back_from_its_text(tmp_path: Path) -> None:
    folder = tmp_path / "plans"
    folder.mkdir()
    recipe = replace(
        PLAIN_INT4,
        name="mine",
        decoder=LinearFormat("q4", "gptq", "awq", 64, False),
        limits=Limits(0.1, 1e-7),
        layers={"decoder.lm_head": LinearFormat("q8", "hqq"), '*.a"b': LinearFormat("fp16")},
        experts="plain",
        calibration=str(tmp_path / "samples.jsonl"),
        gguf="q4_k_m",
        gguf_imatrix=str(folder / "matrix.gguf"),
    )
    text = recipe_text(recipe, folder, ["Why", ""], {"decoder.lm_head": "0.1, 8.5"})
    assert '"decoder.lm_head" = { precision = "q8", quantizer = "hqq" }  # 0.1, 8.5' in text
    (folder / "mine.toml").write_text(text)
    found = find_recipe(str(folder / "mine.toml"))
    assert Path(found.calibration).resolve() == tmp_path / "samples.jsonl"
    assert replace(found, calibration=recipe.calibration) == recipe


def test_only_the_file_of_an_earlier_search_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    check_target(path)
    path.write_text("# Mixed precision by sensitivity: …\n")
    check_target(path)
    path.write_text('tower = "int8"\n')
    with pytest.raises(MobileVLMError, match="not written by a search, and in the way"):
        check_target(path)
    with pytest.raises(MobileVLMError, match="no such folder: make it first"):
        check_target(tmp_path / "none" / "plan.toml")
    with pytest.raises(MobileVLMError, match=r"name ends with \.toml"):
        check_target(tmp_path / "plan")
