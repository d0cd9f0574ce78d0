"""Calibration data that a model makes itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Fixture, fixture_named

from mobilevlm import plan
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.calibration import own, talking
from mobilevlm.export.calibration.data import find_samples
from mobilevlm.export.calibration.own import answered, own_samples
from mobilevlm.export.calibration.prompts import IMAGES, TEXTS
from mobilevlm.export.calibration.samples import (
    Sample,
    sample_pieces,
    samples_digest,
    scene_samples,
)
from mobilevlm.export.calibration.statistics import sample_groups
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.model import Model
from mobilevlm.prompt import Rows, count_positions
from mobilevlm.runtime.engines.onnx import engine


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mobilevlm" / "answers"


def test_the_model_answers_prompts_about_text_and_images_and_scenes_are_among_them(
    mobilevlm_v2: Fixture,
) -> None:
    samples = find_samples("own", mobilevlm_v2.model)
    prompts = [sample.prompt for sample in samples if sample.answer]
    assert set(TEXTS) <= set(prompts)
    assert set(prompts) & set(IMAGES)
    assert len({sample.answer for sample in samples}) > len(TEXTS) - 2
    scenes = {sample.prompt for sample in scene_samples(2)}
    assert scenes <= {sample.prompt for sample in samples[: len(samples) // 2]}
    context = mobilevlm_v2.model.spec.decoder.context_length
    for sample in samples:
        assert "<image>" not in sample.answer
        assert count_positions(sample_pieces(mobilevlm_v2.model, sample)) <= context


def test_the_same_seed_gives_the_same_answers_and_another_one_others(
    mobilevlm_v2: Fixture, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [Sample(prompt, "", ()) for prompt in TEXTS[:3]]
    first = answered(mobilevlm_v2.model, asked)
    [kept] = cache.iterdir()
    kept.unlink()
    again = answered(mobilevlm_v2.model, asked)
    assert samples_digest(again) == samples_digest(first)
    other = answered(mobilevlm_v2.model, asked, seed=1)
    assert not {sample.answer for sample in other} & {sample.answer for sample in first}

    def never(*_: object) -> None:
        raise AssertionError("the model answered again")

    monkeypatch.setattr(talking, "open_talking", never)
    assert answered(mobilevlm_v2.model, asked) == first


def test_answers_do_not_depend_on_how_many_processors_there_are(
    mobilevlm_v2: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []

    def noted(path: Path, threads: int, *given: Any, **named: Any) -> Any:
        found.append(threads)
        return open_session(path, threads, *given, **named)

    open_session = engine.open_session
    monkeypatch.setattr(engine, "open_session", noted)
    monkeypatch.setattr(talking, "open_session", noted)
    for count in (1, 16):
        monkeypatch.setattr(plan, "default_threads", lambda count=count: count)
        monkeypatch.setattr(talking, "default_threads", lambda count=count: count)
        for batches in (True, False):
            monkeypatch.setattr(talking, "_has_batches", lambda spec, found=batches: found)
            with talking.open_talking(mobilevlm_v2.model):
                pass
    assert found == [talking.THREADS] * 8


@pytest.mark.parametrize("damage", ["", "[1, 2, 3]", '["one"]', "{"])
def test_damaged_answers_in_the_cache_folder_are_made_again(
    mobilevlm_v2: Fixture, cache: Path, damage: str
) -> None:
    asked = [Sample(prompt, "", ()) for prompt in TEXTS[:3]]
    first = answered(mobilevlm_v2.model, asked)
    [kept] = cache.iterdir()
    kept.write_text(damage)
    assert answered(mobilevlm_v2.model, asked) == first
    assert len(json.loads(kept.read_text())) == 3


def test_the_cache_folder_keeps_a_bounded_number_of_files(
    mobilevlm_v2: Fixture, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "KEPT", 2)
    for seed in range(4):
        answered(mobilevlm_v2.model, [Sample(TEXTS[0], "", ())], seed)
    assert len(list(cache.iterdir())) == 2


def test_prompts_without_room_in_the_context_are_left_out(mobilevlm_v2: Fixture) -> None:
    long = Sample("word " * 3000, "", ())
    found = answered(mobilevlm_v2.model, [long, Sample(TEXTS[0], "", ())])
    assert [sample.prompt for sample in found] == [TEXTS[0]]


def with_context(model: Model, length: int, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Return a model with a small context, which answers nothing."""
    monkeypatch.setattr(own, "_answers", lambda model, samples, seed: ["" for _ in samples])
    decoder = replace(model.spec.decoder, context_length=length)
    return replace(model, spec=replace(model.spec, decoder=decoder))


@pytest.mark.parametrize(("length", "has_scenes"), [(512, True), (256, True), (128, False)])
def test_scenes_without_room_in_the_context_are_left_out(
    mobilevlm_v2: Fixture, length: int, has_scenes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_context(mobilevlm_v2.model, length, monkeypatch)
    samples = own_samples(model)
    assert sum(map(len, sample_groups(model, samples))) == len(samples) > 0
    scenes = {sample.prompt for sample in scene_samples(9)}
    assert bool(scenes & {sample.prompt for sample in samples}) == has_scenes


def test_a_context_without_room_for_any_prompt_is_refused(
    mobilevlm_v2: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_context(mobilevlm_v2.model, 32, monkeypatch)
    with pytest.raises(MobileVLMError, match="no prompt fits into the context of 32 tokens"):
        own_samples(model)


def test_a_model_with_an_encoder_gets_drawn_scenes_alone() -> None:
    found = own_samples(fixture_named("blip2_t5").model)
    assert {sample.prompt for sample in found} <= {sample.prompt for sample in scene_samples(9)}


def test_sequences_of_a_batch_have_the_logits_that_each_has_alone(
    mobilevlm_v2: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: one range for the whole tensor makes int8 depend on the neighbours."""
    model = mobilevlm_v2.model
    monkeypatch.setattr(talking, "talking_recipe", lambda: RECIPES["fp32"])
    found: list[list[Any]] = []
    ids = [[5, 9, 12, 40], [7] * 11, [3, 8]]
    steps = [[4, 5, 6], [10, 11, 12]]
    with talking.open_talking(model) as together:
        assert together.decoder.batch > 1
        prompts = [Rows(together.decoder.embed(part)) for part in ids]
        found.append(list(together.decoder.begin(prompts, 4)))
        found += [list(together.decoder.step(tokens)) for tokens in steps]
    monkeypatch.setattr(talking, "_has_batches", lambda spec: False)
    with talking.open_talking(model) as alone:
        for index, prompt in enumerate(prompts):
            [logits] = alone.decoder.begin([prompt], 4)
            np.testing.assert_allclose(found[0][index], logits, atol=1e-4)
            for step, tokens in enumerate(steps, 1):
                [logits] = alone.decoder.step([tokens[index]])
                np.testing.assert_allclose(found[step][index], logits, atol=1e-4)
