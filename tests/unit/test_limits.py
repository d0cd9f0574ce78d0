"""Limits of a recipe: every one that is missed is told, with its stage, figure and layer."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path

import pytest

from mobilevlm.bundle import StageQuality
from mobilevlm.errors import MobileVLMError, QualityError
from mobilevlm.export.quality.limits import (
    LIMITED,
    MTMD_ERROR,
    check_limits,
    quality_error,
    require_checks,
    unchecked_error,
    unchecked_limits,
    with_limits,
)
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.recipe import Limits

pytestmark = pytest.mark.pure

STAGES = {
    "vision": StageQuality({"relative_error": 0.1, "cosine": 0.9}),
    "decoder": StageQuality({"kl": 0.2, "top1_agreement": 0.8}),
    "prefill": StageQuality({"kl": 0.2}),
    "end_to_end": StageQuality(
        {"perplexity_ratio": 1.1, "greedy_match": 0.7, "accuracy_loss": 0.02}
    ),
}
ONNX = {stage: stage for stage in STAGES}
DOCUMENT = Path(__file__).parents[2] / "docs" / "explanation" / "quality.md"
GENEROUS = Limits(1, 1, 0.1, 0.1, 2, 0.1, 0.5, 1)


def test_every_field_of_limits_has_a_figure() -> None:
    assert set(LIMITED) == {field.name for field in dataclasses.fields(Limits)}


def test_limits_that_are_met_pass() -> None:
    checks = check_limits(STAGES, GENEROUS, ONNX)
    assert len(checks) == len(LIMITED) and all(check.passed for check in checks)


@pytest.mark.parametrize("field", LIMITED)
def test_each_limit_can_be_missed_on_its_own_side(field: str) -> None:
    _, figure, sense = LIMITED[field]
    beyond = 0.0 if sense == "most" else 0.99
    limits = dataclasses.replace(GENEROUS, **{field: beyond})
    missed = [check for check in check_limits(STAGES, limits, ONNX) if not check.passed]
    assert [check.figure for check in missed] == [figure]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_no_number_misses_its_limit(value: float) -> None:
    stages = {**STAGES, "decoder": StageQuality({"kl": value})}
    (check,) = [item for item in check_limits(stages, Limits(1, 1), ONNX) if item.figure == "kl"]
    assert not check.passed


def test_figures_that_were_not_measured_are_not_checked() -> None:
    limits = Limits(1, 1, accuracy_loss=0.0)
    stages = {**STAGES, "end_to_end": StageQuality({"greedy_match": 1.0})}
    assert "accuracy_loss" not in {check.figure for check in check_limits(stages, limits, ONNX)}


def test_a_hybrid_is_checked_by_the_artifacts_that_it_runs() -> None:
    names = {**ONNX, "decoder": "decoder_gguf", "end_to_end": "end_to_end_hybrid"}
    del names["prefill"]
    stages = {names[stage]: STAGES[stage] for stage in names}
    found = {check.stage for check in check_limits(stages, GENEROUS, names)}
    assert found == set(stages)


def test_llama_cpp_may_be_off_by_what_its_float16_tables_make() -> None:
    names = {stage: f"{stage}_gguf" for stage in STAGES}
    stages = {"vision_gguf": StageQuality({"relative_error": MTMD_ERROR})}
    (check,) = check_limits(stages, Limits(1e-6, 1), names)
    assert check.passed


def test_all_missed_limits_are_told_a_line_each() -> None:
    missed = check_limits(STAGES, Limits(0.01, 0.02), ONNX)
    lines = str(quality_error("mine", missed, {"decoder": "layer 3 hurts most: "})).splitlines()
    assert lines[0].startswith("quality of recipe 'mine': vision relative_error is 0.1, the limit")
    assert "decoder kl is 0.2, the limit is 0.02: layer 3 hurts most: choose" in lines[1]
    assert len(lines) == 2


def test_built_in_recipes_limit_what_a_person_notices() -> None:
    for name in ("int8", "int4"):
        limits = RECIPES[name].limits
        assert limits.accuracy_loss is not None and limits.perplexity_ratio is not None


def documented_limits() -> dict[str, dict[str, float]]:
    """Limits of each recipe in the table of docs/explanation/quality.md."""
    lines = DOCUMENT.read_text("utf-8").splitlines()
    start = next(index for index, line in enumerate(lines) if "| `decoder_kl` |" in line)
    names = re.findall(r"`(\w+)`", lines[start])
    found: dict[str, dict[str, float]] = {}
    for row in itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :]):
        recipes, *cells = row.strip("|").split("|")
        limits = dict(zip(names, (float(cell.split(",")[0]) for cell in cells), strict=True))
        further = re.findall(r"`(\w+)` ([\d.]+)", row)
        limits |= {name: float(value) for name, value in further}
        found |= dict.fromkeys(re.findall(r"`([\w-]+)`", recipes), limits)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "fp32",
        "fp16-weights",
        "int8",
        "int8-calibrated",
        "int8-portable",
        "int4",
        "fast",
        "int4-small",
    ],
)
def test_limits_of_a_built_in_recipe_are_the_documented_ones(name: str) -> None:
    limits = dataclasses.asdict(RECIPES[name].limits)
    assert {key: value for key, value in limits.items() if value} == documented_limits()[name]


def test_limits_that_a_person_gives_replace_the_recipe_s() -> None:
    found = with_limits(RECIPES["int4"], {"decoder_kl": 0.2, "vision_cosine": 0.9})
    assert (found.limits.decoder_kl, found.limits.vision_cosine) == (0.2, 0.9)
    assert found.limits.vision_relative_error == RECIPES["int4"].limits.vision_relative_error
    assert dataclasses.replace(found, limits=RECIPES["int4"].limits) == RECIPES["int4"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("kl", 0.2), ("decoder_kl", math.nan), ("decoder_kl", -1.0), ("decoder_kl", math.inf)],
)
def test_a_limit_that_is_none_is_refused(name: str, value: float) -> None:
    with pytest.raises(MobileVLMError, match=f"limit '?{name}'? is"):
        with_limits(RECIPES["int4"], {name: value})


def test_a_limit_that_a_person_gives_is_checked_or_the_export_fails() -> None:
    checks = check_limits(STAGES, Limits(1, 1), ONNX)
    require_checks(["decoder_kl", "vision_relative_error"], checks, "")
    with pytest.raises(QualityError, match=r"accuracy_loss was not checked \(an export does not"):
        require_checks(["decoder_kl", "accuracy_loss"], checks, "")
    with pytest.raises(QualityError, match=r"decoder_kl was not checked \(no torch"):
        require_checks(["decoder_kl"], (), "no torch")


def test_a_limit_without_its_figure_can_be_a_failure() -> None:
    limits = Limits(1, 1, accuracy_loss=0.01, prefill_kl=1)
    stages = {**STAGES, "end_to_end": StageQuality({"greedy_match": 1.0})}
    checks = check_limits(stages, limits, ONNX)
    assert unchecked_limits(limits, checks, ONNX) == ["accuracy_loss"]
    assert str(unchecked_error(["accuracy_loss"])) == (
        "limit accuracy_loss was not checked, and --require-measured asks for it: add --suite "
        "scenes"
    )
    del stages["prefill"]
    assert "prefill_kl" in unchecked_limits(limits, check_limits(stages, limits, ONNX), ONNX)
    without = {kind: name for kind, name in ONNX.items() if kind != "prefill"}
    checks = check_limits(stages, limits, without)
    assert unchecked_limits(limits, checks, without) == ["accuracy_loss"]
