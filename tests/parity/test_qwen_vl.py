"""Qwen2.5-VL and Qwen3-VL beside test_hub_families.py: positions, DeepStack, windows, videos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from clips import clip_of, video_text
from conftest import (
    FLOAT32,
    QWEN_FIXTURES,
    BundleOf,
    Fixture,
    fixture_named,
    relative_error,
)
from numpy.typing import NDArray

import mobilevlm
from mobilevlm.conversation import official_ids, render, tokenize, user_message
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.graph.reading import OnnxTensors
from mobilevlm.linear_groups import linear_groups
from mobilevlm.preparation import prepare
from mobilevlm.prompt import Piece, Prepared, expand, grid_positions
from mobilevlm.reference import load_reference
from mobilevlm.runtime import VLM
from mobilevlm.runtime.answer.options import AnswerOptions


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=QWEN_FIXTURES)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


def pieces_of(fixture: Fixture, images: list[Prepared]) -> list[Piece]:
    model = fixture.model
    tokens = tokenize(model.tokenizer, fixture.templated_prompt, model.spec.conversation)
    return expand(tokens, [image.pieces for image in images])


def test_positions_of_all_axes_are_the_official_ones(fixture: Fixture) -> None:
    image = prepare(fixture.image, fixture.model.spec.image)
    found = grid_positions(pieces_of(fixture, [image]), 3)
    expected: NDArray[np.int64] = fixture.arrays["position_ids"][:, 0]
    assert np.array_equal(found, expected)
    assert found.max() + 1 - found.shape[1] == fixture.arrays["rope_deltas"].item()


def test_rows_after_layers_are_the_official_ones() -> None:
    fixture = fixture_named("qwen3_vl")
    image = prepare(fixture.image, fixture.model.spec.image)
    found = np.stack([rows.numpy() for rows in load_reference(fixture.model).see(image).deep])
    assert relative_error(found, fixture.arrays["deepstack_features"]) <= FLOAT32


@pytest.fixture(scope="module")
def vlm(fixture: Fixture, bundle_of: BundleOf) -> Iterator[VLM]:
    with mobilevlm.load(bundle_of(fixture.name, "fp32")) as vlm:
        yield vlm


SIZES = ((150, 60), (80, 200), (33, 40))
"""Widths and heights: some fill no window, some no unit of a window."""


def drawn(size: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (size[1], size[0], 3), np.uint8)


def test_images_of_several_sizes_give_the_logits_of_the_reference(
    fixture: Fixture, vlm: VLM
) -> None:
    reference = load_reference(fixture.model)
    images = [drawn(size, seed) for seed, size in enumerate(SIZES)]
    question = [user_message("What differs?", len(images))]
    text = render(fixture.model.spec.conversation, question)
    tokens = tokenize(fixture.model.tokenizer, text, fixture.model.spec.conversation)
    prepared = [prepare(image, fixture.model.spec.image) for image in images]
    pieces = expand(tokens, [image.pieces for image in prepared])
    rows = [reference.see(image) for image in prepared]
    expected = reference.logits(reference.prompt(pieces, rows)).numpy()
    found = vlm.prompt_logits(question, images)
    assert relative_error(found, expected) <= FLOAT32
    assert len({len(image.arrays[0]["pixels"]) for image in prepared}) == len(images)


def test_reused_prompts_give_the_bits_of_fresh_ones(fixture: Fixture, vlm: VLM) -> None:
    first, second = drawn(SIZES[0], 1), drawn(SIZES[1], 2)
    one = [user_message("What is it?", 1)]
    other = [user_message("Where is it?", 1)]
    two = [user_message("What differs?", 2)]
    asked = [(one, [first]), (other, [first]), (two, [first, second]), (one, [second])]
    asked += asked[:2]  # sessions go back before images and behind them
    options: AnswerOptions = {"max_new_tokens": 6, "ignore_eos": True, "logprobs": True}
    for messages, images in asked:
        alone: AnswerOptions = {**options, "session": vlm.new_session(reuse_prefix=False)}
        fresh = vlm.generate(messages, images, **alone)
        again = vlm.generate(messages, images, **options)
        assert again.token_ids == fresh.token_ids
        assert again.logprobs == fresh.logprobs
    assert again.reused.images == 1


@pytest.fixture(scope="module")
def video() -> Fixture:
    return replace(fixture_named("qwen2_5_vl"), suffix="_video")


def test_a_clip_has_the_official_ids_positions_features_and_logits(video: Fixture) -> None:
    model, clip = video.model, clip_of(video)
    reference = load_reference(model)
    tokens = tokenize(model.tokenizer, video_text(video), model.spec.conversation)
    pieces = expand(tokens, [clip.pieces])
    ids = video.arrays["input_ids"][0]
    assert official_ids(tokens, model.spec.image.layout, [clip.pieces]) == ids.tolist()
    assert np.array_equal(grid_positions(pieces, 3), video.arrays["position_ids"][:, 0])
    seen = reference.see(clip)
    assert relative_error(seen.tokens.numpy(), video.arrays["projector_output"]) <= FLOAT32
    prompt = reference.prompt(pieces, [seen])
    assert relative_error(reference.logits(prompt).numpy(), video.logits) <= FLOAT32
    assert reference.greedy(prompt, 24) == video.generated_ids


def test_a_clip_has_the_official_logits_and_answer_in_float32(
    video: Fixture, bundle_of: BundleOf
) -> None:
    with mobilevlm.load(bundle_of("qwen2_5_vl", "fp32")) as vlm:
        clip = clip_of(video)
        found = vlm.prompt_logits(video_text(video), [clip], raw=True)
        assert relative_error(found, video.logits) <= 1e-3
        answer = vlm.generate(
            video_text(video), [clip], raw=True, max_new_tokens=24, ignore_eos=True
        )
        assert answer.token_ids == video.generated_ids


def test_an_image_has_no_more_visual_tokens_than_are_asked_for(
    fixture: Fixture, bundle_of: BundleOf
) -> None:
    with mobilevlm.load(bundle_of(fixture.name, "fp32"), max_image_tokens=12) as vlm:
        answer = vlm.generate("What is it?", [fixture.image], max_new_tokens=1)
        assert 6 <= answer.visual_tokens <= 12
    with mobilevlm.load(bundle_of(fixture.name, "fp32"), max_image_tokens=10**6) as vlm:
        rows = vlm.encode_image(fixture.image)
    assert relative_error(rows, fixture.arrays["projector_output"]) <= 1e-4


def test_other_models_refuse_a_number_of_visual_tokens(bundle_of: BundleOf) -> None:
    with pytest.raises(MobileVLMError, match="max_image_tokens is 12, but this model does not"):
        mobilevlm.load(bundle_of("llava_hf", "fp32"), max_image_tokens=12)


def test_weights_of_the_vision_stage_are_found_in_its_file(
    fixture: Fixture, bundle_of: BundleOf
) -> None:
    model = fixture.model
    path = bundle_of(fixture.name, "fp32") / "onnx" / "vision_encoder.onnx"
    stored = OnnxTensors(path, model.spec, model.weights)
    assert {group.name for group in linear_groups(model.spec)} > {
        name.removesuffix(".weight") for name in stored.names if ".q_proj.weight" in name
    }
    for name in stored.names:
        assert np.array_equal(stored.read(name), model.weights.read(name, stored.shape(name)))
