"""Families in the hub's layout as graphs of fixed shapes: whole bundles give the official visual
tokens, logits and answers in float, stay near them in fixed point, and split images as a target
says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import HUB_FIXTURES, BundleOf, Fixture, fixture_named, relative_error
from PIL import Image
from test_npu_graphs import REFUSED

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.errors import MobileVLMError
from mobilevlm.export import settled
from mobilevlm.export.formats.npu import fixed_context, npu_jobs, with_fewer_tiles
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.export.targets import find_target, target_names
from mobilevlm.families import open_checkpoint
from mobilevlm.input_spec import DynamicImage, Tiled, Tiles
from mobilevlm.model import Model, OpenOptions
from mobilevlm.preparation import most_pieces
from mobilevlm.prompt import count_positions
from mobilevlm.spec import with_image

WHOLE = [name for name in HUB_FIXTURES if not fixture_named(name).suffix and name not in REFUSED]
"""Fixtures of whole checkpoints that have such graphs, each once."""
TILED = ("smolvlm2", "internvl3", "llava_next")
SHAPES = ((640, 480), (480, 640), (2000, 300), (40, 40))


def exported(fixture: Fixture, folder: Path, recipe: str | None, target: str | None = None) -> Path:
    """A bundle of graphs of fixed shapes; fixed point is calibrated on one sample."""
    sample = {
        "image": str(fixture.image),
        "prompt": "Describe the image.",
        "answer": "It is small.",
    }
    data = folder.with_suffix(".jsonl")
    data.write_text(json.dumps(sample))
    mobilevlm.export(
        fixture.checkpoint, folder, recipe=recipe, formats=["npu"] if target is None else None,
        measure=False, calibration=None if recipe == "fp32" else data, target=target,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", WHOLE)
def test_float_bundles_of_fixed_shapes_give_the_official_answer(name: str, tmp_path: Path) -> None:
    fixture = fixture_named(name)
    with mobilevlm.load(exported(fixture, tmp_path / "bundle", "fp32"), engine="npu") as vlm:
        tokens = np.concatenate([vlm.encode_image(image) for image in fixture.images])
        expected = fixture.arrays["projector_output"].reshape(tokens.shape)
        assert relative_error(tokens, expected) <= 1e-4
        prompt = fixture.templated_prompt
        logits = vlm.prompt_logits(prompt, fixture.images, raw=True)
        assert relative_error(logits, fixture.logits) <= 1e-4
        answer = vlm.generate(prompt, fixture.images, raw=True, max_new_tokens=24, ignore_eos=True)
        assert answer.token_ids == fixture.generated_ids


# Measured with random weights: visual tokens 0.016 and 0.015, logits 0.036 and 0.029.
@pytest.mark.parametrize("name", ["smolvlm2", "internvl3"])
def test_fixed_point_bundles_stay_near_the_official_logits(name: str, tmp_path: Path) -> None:
    fixture = fixture_named(name)
    with mobilevlm.load(exported(fixture, tmp_path / "bundle", "a16w8"), engine="npu") as vlm:
        tokens = np.concatenate([vlm.encode_image(image) for image in fixture.images])
        expected = fixture.arrays["projector_output"].reshape(tokens.shape)
        assert relative_error(tokens, expected) < 0.03
        logits = vlm.prompt_logits(fixture.prompt, fixture.images)
        assert relative_error(logits, fixture.logits) < 0.06


# Measured with random weights: in int8 visual tokens 0.021 and 0.014, logits 0.043 and 0.034; in
# a16w8, whose one calibration sample is one tile too, 0.017 and 0.012, 0.084 and 0.077.
@pytest.mark.parametrize("name", ["smolvlm2", "internvl3"])
@pytest.mark.parametrize(("form", "limit"), [("int8", 0.06), ("a16w8", 0.12)])
def test_an_image_of_one_tile_in_int8_and_fixed_point_stays_near_float(
    name: str,
    form: str,
    limit: float,
    bundle_of: BundleOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the page (target web-wasm) and targets with graphs of fixed shapes have images."""
    fixture, folder = fixture_named(name), tmp_path / "bundle"
    if form == "int8":
        mobilevlm.export(fixture.checkpoint, folder, target="web-wasm", measure=False)
    else:
        npu = replace(find_target("ios-coreml"), recipe=form, provider=None, package=False)
        monkeypatch.setattr(settled, "find_target", lambda _: npu)
        exported(fixture, folder, None, target="ios-coreml")
    with mobilevlm.load(bundle_of(name, "fp32"), max_tiles=1) as exact:
        tokens = exact.encode_image(fixture.image)
        logits = exact.prompt_logits(fixture.prompt, fixture.images)
    assert len(tokens) == fixture.model.spec.image.connector.num_tokens
    with mobilevlm.load(folder, engine="onnx" if form == "int8" else "npu") as vlm:
        assert relative_error(vlm.encode_image(fixture.image), tokens) < 0.03
        found = vlm.prompt_logits(fixture.prompt, fixture.images)
        assert relative_error(found, logits) < limit


@pytest.mark.parametrize("name", TILED)
def test_a_target_fixes_the_tiles_of_an_image(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every image is one run of the encoder and takes the same positions, which the manifest
    holds: the runtime is asked for nothing."""
    fixture = fixture_named(name)
    graphs_alone = replace(find_target("ios-coreml"), provider=None, package=False)
    monkeypatch.setattr(settled, "find_target", lambda _: graphs_alone)
    folder = tmp_path / "bundle"
    mobilevlm.export(fixture.checkpoint, folder, target="ios-coreml", measure=False)
    spec = open_bundle(folder).manifest.spec
    assert isinstance(spec.image.preparation, Tiled) and spec.image.preparation.max_tiles == 1
    expected = open_checkpoint(fixture.checkpoint, OpenOptions()).spec.image
    assert count_positions(most_pieces(expected)) > count_positions(most_pieces(spec.image))
    random = np.random.default_rng(0)
    with mobilevlm.load(folder, engine="npu") as vlm:
        lengths = set()
        for width, height in SHAPES:
            image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
            assert len(vlm.prepare_image(image).arrays) == 1
            lengths.add(len(vlm.prompt_ids("What is it?", [image])))
        assert len(lengths) == 1
        assert vlm.generate("What is it?", [image], max_new_tokens=4, ignore_eos=True).token_ids


def test_all_targets_of_fixed_shapes_split_no_image() -> None:
    fixed = [target for target in map(find_target, target_names()) if "npu" in target.formats]
    assert fixed and {target.max_tiles for target in fixed} == {1}


def large(model: Model, context: int) -> Model:
    """As SmolVLM's published checkpoints split images: up to 4 by 4 tiles of 64 tokens."""
    image = model.spec.image
    assert isinstance(image.preparation, Tiles)
    edge = image.preparation.size * image.preparation.most_per_edge
    tiles = replace(image.preparation, longest_edge=edge)
    decoder = replace(model.spec.decoder, context_length=context)
    return replace(model, spec=with_image(replace(model.spec, decoder=decoder), preparation=tiles))


def test_images_leave_half_of_a_fixed_context_to_text() -> None:
    model = large(fixture_named("smolvlm2").model, 4096)
    whole = count_positions(most_pieces(model.spec.image))
    assert fixed_context(model, replace(RECIPES["fp32"], context_length=2 * whole)) != model
    kept = fixed_context(model, replace(RECIPES["fp32"], context_length=2 * whole))
    assert kept.spec.image == model.spec.image
    cut = fixed_context(model, replace(RECIPES["fp32"], context_length=2 * whole - 1))
    assert isinstance(cut.spec.image.preparation, Tiles)
    most = cut.spec.image.preparation.max_tiles
    assert most > 1 and count_positions(most_pieces(cut.spec.image)) < whole
    more = with_fewer_tiles(model, most + 1)
    assert count_positions(most_pieces(more.spec.image)) == whole
    least = fixed_context(model, replace(RECIPES["fp32"], context_length=8))
    assert isinstance(least.spec.image.preparation, Tiles)
    assert least.spec.image.preparation.max_tiles == 1


def test_models_that_split_no_image_stay_as_they_are(llava_v1: Fixture) -> None:
    assert with_fewer_tiles(llava_v1.model, 1) is llava_v1.model


def test_images_of_any_shape_are_refused_in_one_line(llava_v1: Fixture) -> None:
    image = DynamicImage(14, 2, 3136, 1_003_520, (0.5,) * 3, (0.5,) * 3)
    model = replace(llava_v1.model, spec=with_image(llava_v1.model.spec, preparation=image))
    with pytest.raises(MobileVLMError, match="of images prepared as 'dynamic_image' yet: use --fo"):
        npu_jobs(model, RECIPES["fp32"])
