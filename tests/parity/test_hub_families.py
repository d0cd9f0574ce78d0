"""Families in the hub's layout against the arrays of the official classes: pixels, visual tokens,
ids, logits and greedy answers, of the torch reference and of float32 bundles.

Limits as in test_reference.py and test_runtime.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FLOAT32, HUB_FIXTURES, BundleOf, Fixture, fixture_named, relative_error
from numpy.typing import NDArray

import mobilevlm
from mobilevlm.conversation import official_ids, render, tokenize, user_message
from mobilevlm.image import normalize
from mobilevlm.image_encoder import NativeEncoder
from mobilevlm.messages import Message
from mobilevlm.preparation import prepare
from mobilevlm.prompt import Piece, Prepared, expand
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.reference.steps import State
from mobilevlm.runtime import VLM
from mobilevlm.runtime.bench.bench import prompt_of_length


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=HUB_FIXTURES)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


@pytest.fixture(scope="module")
def images(fixture: Fixture) -> list[Prepared]:
    count = len(fixture.images)
    return [prepare(image, fixture.model.spec.image, images=count) for image in fixture.images]


@pytest.fixture(scope="module")
def reference(fixture: Fixture) -> ReferenceModel:
    return load_reference(fixture.model)


@pytest.fixture(scope="module")
def exact(fixture: Fixture, bundle_of: BundleOf) -> Iterator[VLM]:
    bundle = bundle_of(fixture.name.removesuffix("_nosplit"), "fp32")
    with mobilevlm.load(bundle, max_tiles=fixture.max_tiles) as vlm:
        yield vlm


def flat(array: NDArray[Any], axes: int) -> NDArray[Any]:
    """An array whose first axes are one, so that ``axes`` remain."""
    return array.reshape(-1, *array.shape[len(array.shape) - axes + 1 :])


def official_pixels(fixture: Fixture) -> list[NDArray[np.float32]]:
    """Pixels of each run of the encoder ``(3, height, width)``; NaFlex has flat patches."""
    values = fixture.arrays["pixel_values"]
    if "spatial_shapes" not in fixture.arrays:
        return list(flat(values, 4))
    edge, parts = fixture.model.spec.image.transformer.patch_size, []
    for patches, (rows, columns) in zip(values, fixture.arrays["spatial_shapes"], strict=True):
        grid = patches[: rows * columns].reshape(rows, columns, edge, edge, 3)
        parts.append(grid.transpose(4, 0, 2, 1, 3).reshape(3, rows * edge, columns * edge))
    return parts


def said(fixture: Fixture) -> list[Message]:
    """The messages of the prompt."""
    system: list[Message] = [{"role": "system", "content": fixture.system}]
    asked = user_message(fixture.prompt, len(fixture.images))
    return [*system, asked] if fixture.system else [asked]


def pieces_of(fixture: Fixture, images: list[Prepared]) -> list[Piece]:
    model = fixture.model
    tokens = tokenize(model.tokenizer, fixture.templated_prompt, model.spec.conversation)
    return expand(tokens, [image.pieces for image in images])


def prompt_state(fixture: Fixture, reference: ReferenceModel, images: list[Prepared]) -> State:
    rows = [reference.see(image) for image in images]
    return reference.prompt(pieces_of(fixture, images), rows)


def in_patches(pixels: NDArray[Any], spec: NativeEncoder) -> NDArray[Any]:
    """Pixels ``(3 · frames, height, width)`` as the official code has them: squares of patches row
    by row, each patch ``(3, frames, rows, columns)``."""
    channels, height, width = pixels.shape
    side, edge = (spec.merge_size, spec.patch_size), spec.merge_size * spec.patch_size
    parts = pixels.reshape(channels // 3, 3, height // edge, *side, width // edge, *side)
    parts = np.broadcast_to(parts, (spec.frames, *parts.shape[1:]))
    return parts.transpose(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, spec.patch_values)


def features_of(fixture: Fixture) -> NDArray[Any]:
    """The official features, those of Qwen2.5-VL's windows put in the order of patches, and those
    of Gemma 4's before pooling in the order of squares."""
    encoder = fixture.model.spec.image.encoder
    if isinstance(encoder, NativeEncoder) and encoder.axis_positions:
        parts, side = [], encoder.merge_size
        flat_rows, start = fixture.arrays["encoder_output"], 0
        for rows, columns in fixture.expected["patch_grid_rows_cols"]:
            grid = flat_rows[start : start + rows * columns]
            grid = grid.reshape(rows // side, side, columns // side, side, -1)
            parts.append(grid.swapaxes(1, 2).reshape(rows * columns, -1))
            start += rows * columns
        return np.concatenate(parts)
    features = flat(fixture.arrays["vision_features"], 2)
    if "window_index" not in fixture.arrays:
        return features
    squares = features.reshape(len(fixture.arrays["window_index"]), -1)
    return squares[np.argsort(fixture.arrays["window_index"])].reshape(features.shape)


def test_pixel_values_equal_the_official_preprocessing(
    fixture: Fixture, images: list[Prepared]
) -> None:
    preparation, encoder = fixture.model.spec.image.pixels, fixture.model.spec.image.encoder
    found = [normalize(item["pixels"], preparation) for image in images for item in image.arrays]
    if isinstance(encoder, NativeEncoder) and encoder.axis_positions:  # which the tower normalises
        edge, places = encoder.patch_size, fixture.arrays["image_position_ids"]
        for values, expected, known in zip(
            found, fixture.arrays["pixel_values"], places, strict=True
        ):
            _, height, width = values.shape
            parts = values.reshape(3, height // edge, edge, width // edge, edge)
            patches = parts.transpose(1, 3, 2, 4, 0).reshape(-1, 3 * edge**2)
            assert (known[: len(patches)] >= 0).all() and (known[len(patches) :] < 0).all()
            assert np.abs((patches + 1) / 2 - expected[: len(patches)]).max() <= 1e-6
        return
    if isinstance(encoder, NativeEncoder):
        patches = np.concatenate([in_patches(values, encoder) for values in found])
        assert np.abs(patches - fixture.arrays["pixel_values"]).max() <= 1e-6
        return
    for values, expected in zip(found, official_pixels(fixture), strict=True):
        assert np.abs(values - expected).max() <= 1e-6


def test_prompt_text_and_ids_equal_the_official_ones(
    fixture: Fixture, images: list[Prepared]
) -> None:
    model = fixture.model
    text = render(model.spec.conversation, said(fixture))
    assert text == fixture.templated_prompt
    tokens = tokenize(model.tokenizer, text, model.spec.conversation)
    found = official_ids(tokens, model.spec.image.layout, [image.pieces for image in images])
    assert found == fixture.arrays["input_ids"][0].tolist()


def test_reference_features_and_visual_tokens_are_the_official_ones(
    fixture: Fixture, reference: ReferenceModel, images: list[Prepared]
) -> None:
    runs = [arrays for image in images for arrays in image.arrays]
    features = np.concatenate([reference.features(arrays["pixels"]).numpy() for arrays in runs])
    assert relative_error(features, features_of(fixture)) <= FLOAT32
    tokens = np.concatenate([reference.image_rows(image).numpy() for image in images])
    assert relative_error(tokens, flat(fixture.arrays["projector_output"], 2)) <= FLOAT32


def test_reference_logits_and_greedy_answer_are_the_official_ones(
    fixture: Fixture, reference: ReferenceModel, images: list[Prepared]
) -> None:
    prompt = prompt_state(fixture, reference, images)
    logits = reference.logits(prompt).numpy()
    assert relative_error(logits, fixture.logits) <= FLOAT32
    assert (logits.argmax(-1) == fixture.logits.argmax(-1)).all()
    assert reference.greedy(prompt, 24) == fixture.generated_ids


def test_fp32_features_and_visual_tokens_are_the_official_ones(
    fixture: Fixture, exact: VLM
) -> None:
    count = len(fixture.images)
    features = np.concatenate(
        [exact.image_features(image, images=count) for image in fixture.images]
    )
    assert relative_error(features, features_of(fixture)) <= 1e-4
    tokens = np.concatenate([exact.encode_image(image, images=count) for image in fixture.images])
    assert relative_error(tokens, flat(fixture.arrays["projector_output"], 2)) <= 1e-4


def test_fp32_ids_logits_and_answer_are_the_official_ones(fixture: Fixture, exact: VLM) -> None:
    ids = exact.prompt_ids(said(fixture), fixture.images)
    assert ids == fixture.arrays["input_ids"][0].tolist()
    assert exact.prompt_ids(fixture.templated_prompt, fixture.images, raw=True) == ids
    found = exact.prompt_logits(said(fixture), fixture.images)
    assert relative_error(found, fixture.logits) <= 1e-3
    assert (found.argmax(-1) == fixture.logits.argmax(-1)).all()
    answer = exact.generate(said(fixture), fixture.images, max_new_tokens=24, ignore_eos=True)
    assert answer.token_ids == fixture.generated_ids
    assert answer.text == fixture.text
    assert answer.prompt_tokens == len(ids)
    assert answer.visual_tokens == len(flat(fixture.arrays["projector_output"], 2))


def test_a_prompt_of_the_benchmark_has_an_image_and_the_text_tokens_that_are_asked_for(
    fixture: Fixture, exact: VLM
) -> None:
    prompt = prompt_of_length(exact, 30, 1)
    assert exact.count_text_tokens(prompt, 1, raw=True) == 30
    answer = exact.generate(prompt, fixture.images[:1], max_new_tokens=1, raw=True)
    assert answer.visual_tokens == len(exact.encode_image(fixture.images[0]))
