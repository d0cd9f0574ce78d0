"""Keys of calibrated artifacts and of kept answers: all that they depend on is in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from conftest import Fixture
from tokenizers import Tokenizer

from mobilevlm.export.calibration import own, stages
from mobilevlm.export.calibration.samples import Sample, scene_samples
from mobilevlm.export.formats import code_digest, code_files
from mobilevlm.export.formats import onnx as onnx_format
from mobilevlm.export.formats.onnx import onnx_jobs
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.model import Model
from mobilevlm.recipe import LinearFormat, Recipe

ASKED = [Sample("Name a fruit.", "", ())]


@pytest.fixture(autouse=True)
def drawn_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_format, "find_samples", lambda name, model: scene_samples(2))


def other_tokenizer(model: Model) -> Tokenizer:
    found = Tokenizer.from_str(model.tokenizer.to_str())
    found.add_tokens(["zzyzx"])
    return found


def with_tokenizer(model: Model) -> Model:
    return replace(model, tokenizer=other_tokenizer(model))


def with_instruction_tokenizer(model: Model) -> Model:
    return replace(model, instruction_tokenizer=other_tokenizer(model))


def keys(model: Model, recipe: Recipe) -> dict[str, str]:
    return {job.artifact.stage: job.artifact.key for job in onnx_jobs(model, recipe)}


@pytest.mark.parametrize("change", [with_tokenizer, with_instruction_tokenizer])
def test_statistics_and_kept_answers_depend_on_both_tokenizers(
    mobilevlm_v2: Fixture, change: Callable[[Model], Model]
) -> None:
    model = mobilevlm_v2.model
    other = change(model)
    assert stages.calibration_key(other, ASKED) != stages.calibration_key(model, ASKED)
    assert own._kept_path(other, ASKED, 0) != own._kept_path(model, ASKED, 0)


def test_kept_answers_depend_on_the_code(
    mobilevlm_v2: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = own._kept_path(mobilevlm_v2.model, ASKED, 0)
    monkeypatch.setattr(own, "code_digest", lambda: "0" * len(code_digest()))
    assert own._kept_path(mobilevlm_v2.model, ASKED, 0) != kept


@pytest.mark.parametrize(
    "module",
    ["export/calibration/own.py", "runtime/engines/onnx/engine.py", "runtime/answer/sampling.py",
     "checkpoint.py", "preparation.py", "conversation.py", "state_buffers.py",
     "reference/streaming.py", "rotary.py"],
)  # fmt: skip
def test_the_code_is_that_which_calibration_runs(module: str) -> None:
    assert [path for path in code_files() if path.as_posix().endswith(f"/{module}")]


def test_scales_of_keys_and_values_depend_on_all_stages_that_are_run(
    mobilevlm_v2: Fixture,
) -> None:
    model, recipe = mobilevlm_v2.model, replace(RECIPES["fp32"], kv_cache="int8")
    first = keys(model, recipe)["decoder"]
    half = LinearFormat("fp16")
    others = [
        keys(model, replace(recipe, tower=half)),
        keys(model, replace(recipe, projector=half)),
        keys(model, replace(recipe, embeddings="fp16")),
        keys(with_tokenizer(model), recipe),
    ]
    assert first not in [other["decoder"] for other in others]
    plain = RECIPES["fp32"]
    assert keys(model, replace(plain, tower=half))["decoder"] == keys(model, plain)["decoder"]
