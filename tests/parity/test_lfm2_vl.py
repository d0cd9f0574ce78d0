"""LFM2-VL beyond the one image of its reference data: states of convolutions, images that are not
split, several images of different sizes, and sequences that go back into a convolution."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FLOAT32, BundleOf, Fixture, fixture_named, relative_error
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from test_hub_families import pieces_of

import mobilevlm
from mobilevlm.families import open_checkpoint
from mobilevlm.preparation import prepare
from mobilevlm.prompt import Prepared, Run, expand
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.reference.steps import run_steps
from mobilevlm.runtime import VLM
from mobilevlm.runtime.sequence.session import Fill

SIZES = ((60, 40), (67, 150), (400, 267))
"""Enlarged, made smaller, and split."""


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return fixture_named("lfm2_vl")


@pytest.fixture(scope="module")
def reference(fixture: Fixture) -> Iterator[ReferenceModel]:
    with torch.no_grad():
        yield load_reference(fixture.model)


@pytest.fixture(scope="module")
def exact(bundle_of: BundleOf) -> Iterator[VLM]:
    with mobilevlm.load(bundle_of("lfm2_vl", "fp32")) as vlm:
        yield vlm


@pytest.fixture(scope="module")
def pictures(fixture: Fixture) -> list[Image.Image]:
    whole = Image.open(fixture.image).convert("RGB")
    return [whole.resize(size, Image.Resampling.BOX) for size in SIZES]


def logits_of(
    reference: ReferenceModel, vlm: VLM, prompt: str, images: list[Prepared]
) -> NDArray[np.float32]:
    """Logits of a prompt by the reference."""
    tokens = vlm._prompts.tokens(prompt, len(images), raw=False)
    pieces = expand(tokens, [image.pieces for image in images])
    rows = [reference.image_rows(image) for image in images]
    found: NDArray[np.float32] = reference.logits(reference.embed(pieces, rows)).numpy()
    return found


def test_positions_are_resized_as_officially(fixture: Fixture, reference: ReferenceModel) -> None:
    grids = fixture.arrays["spatial_shapes"]
    found = [reference.vision._resized_positions(torch.from_numpy(grid)).numpy() for grid in grids]
    expected = fixture.arrays["vision_position_embeddings"]
    assert np.abs(np.concatenate(found) - expected).max() <= 1e-6


def test_convolutions_end_a_prompt_in_the_official_states(
    fixture: Fixture, reference: ReferenceModel, exact: VLM
) -> None:
    official = fixture.arrays["conv_state"].transpose(0, 2, 1)[:, 1:]  # the last two of three
    images = [prepare(fixture.image, fixture.model.spec.image)]
    inputs = []
    for layer in fixture.model.spec.decoder.conv_layers:
        conv = reference.decoder.layers[layer].short_conv.conv
        conv.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0, :, -2:].T))
    rows = [reference.image_rows(image) for image in images]
    embeds = reference.embed(pieces_of(fixture, images), rows)
    run_steps(reference.decoder_steps(), reference.decoder.start(embeds[None]))
    assert relative_error(np.stack([rows.numpy() for rows in inputs]), official) <= FLOAT32
    session = exact.new_session()
    session.fill(exact._prepare(fixture.templated_prompt, [fixture.image], raw=True), Fill())
    states = session._state._carried.past[:, 0]  # type: ignore[attr-defined]
    assert relative_error(states, official) <= 1e-4


def test_an_image_that_is_not_split_is_the_small_whole_alone(
    fixture: Fixture, reference: ReferenceModel, bundle_of: BundleOf
) -> None:
    split = prepare(fixture.image, fixture.model.spec.image)
    with mobilevlm.load(bundle_of("lfm2_vl", "fp32"), max_tiles=1) as vlm:
        image = vlm.prepare_image(fixture.image)
        begin, end = (fixture.expected[f"image_{place}_token_id"] for place in ("start", "end"))
        assert image.pieces == (begin, Run(6), end)
        assert np.array_equal(image.arrays[0]["pixels"], split.arrays[-1]["pixels"])
        found = vlm.prompt_logits(fixture.prompt, [fixture.image])
        expected = logits_of(reference, vlm, fixture.prompt, [image])
        assert relative_error(found, expected) <= 1e-4


def test_images_of_different_sizes_stand_in_one_prompt(
    reference: ReferenceModel, exact: VLM, pictures: list[Image.Image]
) -> None:
    images = [exact.prepare_image(picture) for picture in pictures]
    shapes = [[arrays["pixels"].shape[:2] for arrays in image.arrays] for image in images]
    assert shapes == [[(64, 96)], [(128, 32)], [*[(64, 64)] * 6, (64, 96)]]
    prompt = "<image> and <image>, then <image>: compare"
    found = exact.prompt_logits(prompt, pictures)
    expected = logits_of(reference, exact, prompt, images)
    assert relative_error(found, expected) <= 1e-4
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_going_back_into_a_convolution_gives_the_logits_of_a_fresh_sequence(
    exact: VLM, pictures: list[Image.Image]
) -> None:
    """Prompts that share less and less with the one before, the image in between or not."""
    prompts = [
        ("<image> What is in the picture, and why?", pictures[1:2]),
        ("<image> What is in the picture, and how?", pictures[1:2]),
        ("<image> What is this?", pictures[1:2]),
        ("<image> What is in the picture, and why?", pictures[2:]),
        ("Who are you?", []),
        ("<image> What is in the picture, and why?", pictures[1:2]),
    ]
    session, fresh = exact.new_session(), exact.new_session(reuse_prefix=False)
    for text, images in prompts:
        prompt = exact._prepare(text, images, raw=False)
        found = session.fill(prompt, Fill()).copy()
        assert np.array_equal(found, fresh.fill(prompt, Fill())), text
        for _ in range(5):  # an answer that the next prompt goes back behind
            token = int(found.argmax())
            found = session.step(token).copy()
            assert np.array_equal(found, fresh.step(token)), text


def test_a_conversation_goes_on_from_its_states(exact: VLM, pictures: list[Image.Image]) -> None:
    """To the bit only if each part is computed as it was: answers step by step."""
    chat = exact.chat([pictures[0]])
    first = "".join(chat.ask("What is this?", max_new_tokens=8, ignore_eos=True))
    second = "".join(chat.ask("And its colour?", max_new_tokens=8, ignore_eos=True))
    assert len(chat.messages) == 4
    messages = chat.messages[:3]
    assert messages[1]["content"] == first
    with mobilevlm.load(exact.bundle.folder) as other:
        session = other.new_session(reuse_prefix=False)
        logits = session.fill(other._prepare(messages, [pictures[0]], raw=False), Fill())
        answer = other.generate(messages, [pictures[0]], max_new_tokens=8, ignore_eos=True)
        assert answer.text == second
        assert int(logits.argmax()) == answer.token_ids[0]


@pytest.mark.parametrize("stored", ["F16", "F32"])
def test_other_float_types_and_names_are_read(
    stored: str, fixture: Fixture, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(fixture.checkpoint, folder)
    kind = {"F16": torch.float16, "F32": torch.float32}[stored]
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor.to(kind) for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors")
    model = open_checkpoint(folder)
    for name in ("vision.patch_embedding.weight", "projector.mlp.0.weight"):
        shape = {"vision.patch_embedding.weight": (48, 3, 16, 16)}.get(name, (72, 192))
        expected = fixture.model.weights.read(name, shape)
        assert np.allclose(model.weights.read(name, shape), expected, atol=1e-3)
