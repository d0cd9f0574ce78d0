"""A synthetic family whose images take as many visual tokens as their shape asks for: tiles between
marks. Torch reference, ONNX and the cache take it as they take any other."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BundleOf, fixture_named, refusal, relative_error
from numpy.typing import NDArray

import mobilevlm
from mobilevlm.bundle_checks import check_manifest
from mobilevlm.checkpoint import Weights
from mobilevlm.conversation import render, tokenize, user_message
from mobilevlm.errors import MobileVLMError
from mobilevlm.families import open_checkpoint
from mobilevlm.families.mobilevlm import read_mobilevlm
from mobilevlm.families.registry import FAMILIES, Source, register
from mobilevlm.input_spec import DynamicImage, LayoutSpec, Mel, Tiles
from mobilevlm.model import OpenOptions
from mobilevlm.preparation import prepare
from mobilevlm.prompt import count_rows, expand
from mobilevlm.reference import load_reference
from mobilevlm.runtime import VLM
from mobilevlm.runtime.memory.estimate import estimate
from mobilevlm.runtime.sequence.session import Fill, Prompt
from mobilevlm.spec import ModelSpec, with_image

FIXTURE = fixture_named("mobilevlm_v2")
TOKENS = 144
"""Visual tokens of a tile."""


def read_tiled(source: Source) -> tuple[ModelSpec, Weights]:
    spec, weights = read_mobilevlm(source)
    square = spec.image.square
    tiles = Tiles(square.size, 2 * square.size, square.mean, square.std)
    marks = tuple(tuple((300 + 2 * row + column, 310) for column in range(2)) for row in range(2))
    layout = LayoutSpec((320,), tile_ids=marks, row_end_ids=(330,), thumbnail_ids=(340, 341))
    return with_image(spec, preparation=tiles, layout=layout), weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tiled") / "checkpoint"
    shutil.copytree(FIXTURE.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "tiled"}))
    register("tiled", {"tiled"})(read_tiled)
    yield folder
    del FAMILIES["tiled"]


@pytest.fixture(scope="module")
def vlm(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLM]:
    bundle = tmp_path_factory.mktemp("tiled") / "bundle"
    mobilevlm.export(checkpoint, bundle, recipe="fp32", vision_tower=FIXTURE.tower)
    with mobilevlm.load(bundle) as opened:
        yield opened


def pixels(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


WIDE, TALL, SQUARE = pixels(200, 100), pixels(50, 90), pixels(64, 64)


def prompt_of(vlm: VLM, text: str, images: list[NDArray[np.uint8]]) -> Prompt:
    return vlm._prepare(text, images, raw=False)


def test_each_image_takes_the_positions_of_its_own_tiles(vlm: VLM) -> None:
    counts = [count_rows(prompt_of(vlm, "Who?", [image]).pieces) for image in (WIDE, TALL, SQUARE)]
    assert counts == [3 * TOKENS, 5 * TOKENS, 5 * TOKENS]
    answer = vlm.generate("Who?", [WIDE, SQUARE], max_new_tokens=2, ignore_eos=True)
    assert answer.visual_tokens == 8 * TOKENS
    assert vlm.encode_image(WIDE).shape == (3 * TOKENS, 64)


@pytest.mark.parametrize("text", ["What is it?", "<image> or <image>?"])
@torch.no_grad()
def test_two_images_of_different_sizes_have_the_references_logits(
    text: str, checkpoint: Path, vlm: VLM
) -> None:
    model = open_checkpoint(checkpoint, OpenOptions(FIXTURE.tower))
    reference, conversation = load_reference(model), model.spec.conversation
    images = [prepare(image, model.spec.image) for image in (WIDE, SQUARE)]
    rows = [reference.visual_tokens(**arrays) for image in images for arrays in image.arrays]
    tokens = tokenize(model.tokenizer, render(conversation, [user_message(text, 2)]), conversation)
    pieces = expand(tokens, [image.pieces for image in images])
    expected = reference.logits(reference.embed(pieces, rows)).numpy()
    assert relative_error(vlm.prompt_logits(text, [WIDE, SQUARE]), expected) <= 1e-4
    assert relative_error(vlm.prompt_logits(text, [SQUARE, WIDE]), expected) > 1e-2


def test_reused_and_computed_prompts_have_the_same_logits_to_the_bit(vlm: VLM) -> None:
    vlm.clear_caches()
    reused = []
    for text, images in [
        ("Who?", [WIDE, SQUARE]),
        ("Where?", [WIDE, SQUARE]),
        ("Where?", [WIDE]),
        ("Where is it?", [WIDE, SQUARE]),
        ("Who?", [SQUARE, WIDE]),
    ]:
        run, note, prompt = vlm._session("pieces"), Fill(), prompt_of(vlm, text, images)
        found = run.fill(prompt, note).copy()
        assert np.array_equal(found, vlm._session("nothing").fill(prompt, Fill())), text
        run.save()
        reused.append((note.reused_tokens - len(vlm._cache.system), note.reused_images))
    one, two = 3 * TOKENS, 8 * TOKENS
    assert [count > part for (count, _), part in zip(reused, (-1, two, one, two, -1), strict=True)]
    assert reused[0] == (0, 0) and reused[1] == reused[3] and reused[4] == (0, 2)
    assert [images for _, images in reused[1:]] == [2, 1, 2, 2]


def test_a_prompt_too_long_says_how_many_of_its_images_would_fit(vlm: VLM) -> None:
    images = [pixels(64, 64, seed) for seed in range(4)]
    with pytest.raises(MobileVLMError, match=r"732 for each image.*2 of the 4 images"):
        vlm.generate("Who?", images)
    with pytest.raises(MobileVLMError, match=r"for the images.*3 of the 4 images"):
        vlm.generate("Who?", [WIDE, WIDE, SQUARE, SQUARE])


def test_a_model_loaded_with_fewer_tiles_splits_no_image_into_more(vlm: VLM) -> None:
    with mobilevlm.load(vlm.bundle.folder, max_tiles=1) as limited:
        assert limited.encode_image(WIDE).shape == (TOKENS, 64)
        answer = limited.generate("Who?", [WIDE, SQUARE], max_new_tokens=2, ignore_eos=True)
        assert answer.visual_tokens == 2 * TOKENS
        limited.generate("Who?", [SQUARE] * 6, max_new_tokens=2)  # whole, three would not fit
        sizes = [estimate(one.bundle.manifest, one.plan).states for one in (limited, vlm)]
    assert sizes[1] - sizes[0] > 4 * TOKENS * 8
    with pytest.raises(MobileVLMError, match="max_tiles is 0, expected 1 or more"):
        vlm.prepare_image(WIDE, max_tiles=0)


def test_an_image_in_fewer_tiles_is_another_image_for_the_cache(vlm: VLM) -> None:
    vlm.clear_caches()
    counts = [
        vlm.generate("Who?", [vlm.prepare_image(SQUARE, most)], max_new_tokens=2).visual_tokens
        for most in (None, 1, None, 1)
    ]
    assert counts == [5 * TOKENS, TOKENS] * 2
    few, all_tiles = (vlm.prompt_logits("Who?", [vlm.prepare_image(SQUARE, n)]) for n in (1, 4))
    assert len(all_tiles) - len(few) == 4 * TOKENS + 9  # marks of four tiles, and a row's end


def test_a_model_that_does_not_split_images_refuses_a_number_of_tiles(
    bundle_of: BundleOf, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["run", bundle_of("llava_v1", "fp32"), "--prompt", "Who?", "--no-tiles"]
    message = refusal(capsys, *asked)
    assert "max_tiles is 1, but this model does not split images into tiles" in message


@pytest.mark.parametrize(
    ("part", "values", "named"),
    [
        ("preparation", {"longest_edge": 10**6}, "image.longest_edge is 1000000"),
        ("preparation", {"size": 14}, "image.size is 14"),
        ("layout", {"tile_ids": (((300,), (301,)),)}, "layout.tile_ids is 1"),
        ("layout", {"thumbnail_ids": (10**6,)}, "the ids of inputs.image.layout"),
    ],
)
def test_a_bundle_whose_tiles_contradict_each_other_is_refused(
    part: str, values: dict[str, Any], named: str, vlm: VLM
) -> None:
    changed = replace(getattr(vlm.spec.image, part), **values)
    manifest = replace(vlm.bundle.manifest, spec=with_image(vlm.spec, **{part: changed}))
    with pytest.raises(MobileVLMError, match=re.escape(named)):
        check_manifest(manifest, Path("manifest.json"))


@pytest.mark.parametrize(
    "preparation", [DynamicImage(14, 2, 784, 10**5, (0.5,) * 3, (0.5,) * 3), Mel(80)]
)
def test_a_bundle_whose_encoder_does_not_take_what_is_prepared_is_refused(
    preparation: DynamicImage | Mel, vlm: VLM
) -> None:
    manifest = replace(vlm.bundle.manifest, spec=with_image(vlm.spec, preparation=preparation))
    with pytest.raises(MobileVLMError, match=f"image.kind is '{preparation.kind}'"):
        check_manifest(manifest, Path("manifest.json"))


def test_tiles_of_another_tower_are_not_written_as_gguf(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["export", checkpoint, "-o", tmp_path / "out", "--vision-tower", FIXTURE.tower]
    message = refusal(capsys, *given, "--format", "gguf", "--recipe", "int4")
    assert "tiles and a small image is SigLIP" in message and "--format onnx" in message
