"""Gemma 3 and 4 beyond the arrays of their fixtures: several images, prompts that are reused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import FLOAT32, BundleOf, Fixture, fixture_named, relative_error
from PIL import Image

import mobilevlm
from mobilevlm.reference import load_reference
from mobilevlm.runtime import VLM

PROMPT = "<image>What is in it? And here?<image>Say which has a house."


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


@pytest.fixture(scope="module")
def images(fixture: Fixture) -> list[Image.Image]:
    first = Image.open(fixture.image).convert("RGB")
    return [first, first.transpose(Image.Transpose.ROTATE_90)]


@pytest.fixture(scope="module")
def vlm(fixture: Fixture, bundle_of: BundleOf) -> Iterator[VLM]:
    with mobilevlm.load(bundle_of(fixture.name, "fp32")) as model:
        yield model


def test_several_images_give_the_logits_of_the_reference(
    fixture: Fixture, vlm: VLM, images: list[Image.Image]
) -> None:
    reference, asked = load_reference(fixture.model), vlm._prepare(PROMPT, images, raw=False)
    with torch.no_grad():
        rows = [reference.image_rows(image) for image in asked.images]
        expected = reference.logits(reference.prompt(asked.pieces, rows)).numpy()
    assert relative_error(vlm.prompt_logits(PROMPT, images), expected) <= 2 * FLOAT32
    assert relative_error(vlm.prompt_logits(PROMPT, images[::-1]), expected) > 100 * FLOAT32


def test_prompts_that_are_there_already_give_the_bits_of_computed_ones(
    vlm: VLM, images: list[Image.Image]
) -> None:
    asked = [(PROMPT, images), (PROMPT + " Now.", images), ("<image>And this?", images[:1])]
    fresh = [vlm.prompt_logits(prompt, shown)[-1] for prompt, shown in asked]
    session = vlm.new_session()
    for index in (0, 1, 2, 0, 1):
        prompt, shown = asked[index]
        answer = vlm.generate(prompt, shown, max_new_tokens=3, session=session, ignore_eos=True)
        assert answer.token_ids[0] == fresh[index].argmax()
        assert np.array_equal(vlm.prompt_logits(prompt, shown)[-1], fresh[index])
