"""Bundles through the runtime, as a person runs them, against the official arrays.

Limits as in test_reference.py: float32 noise is 2e-5 at worst, the smallest wrong choice known
moves the logits by 1.5e-4; the smallest distance between the best two logits of a greedy step is
0.05.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import BundleOf, Fixture, prompt_pieces, relative_error
from numpy.typing import NDArray

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.conversation import render, user_message
from mobilevlm.export.quality.measure import GREEDY_TOKENS, PROMPTS, calibration_image
from mobilevlm.instruction import with_instruction
from mobilevlm.preparation import prepare
from mobilevlm.prompt import Prepared
from mobilevlm.reference import load_reference
from mobilevlm.runtime import VLM

Array = NDArray[np.float32]
NEW_TOKENS = 24
"""As many as the official code was asked for."""


@pytest.fixture(scope="module")
def fixture(any_fixture: Fixture) -> Fixture:
    return any_fixture


@pytest.fixture(scope="module")
def exact(fixture: Fixture, bundle_of: BundleOf) -> Iterator[VLM]:
    """The float32 bundle of each fixture."""
    with mobilevlm.load(bundle_of(fixture.name, "fp32")) as vlm:
        yield vlm


def test_fp32_image_features_are_the_official_ones(fixture: Fixture, exact: VLM) -> None:
    found = np.stack([exact.image_features(image) for image in fixture.images])
    assert found.dtype == np.float32
    assert relative_error(found, fixture.arrays["vision_features"]) <= 1e-4


def test_fp32_visual_tokens_are_the_official_ones(fixture: Fixture, exact: VLM) -> None:
    found = np.stack([exact.encode_image(image, fixture.prompt) for image in fixture.images])
    assert found.dtype == np.float32
    assert relative_error(found, fixture.arrays["projector_output"]) <= 1e-4


def test_prompt_ids_are_the_official_ones(fixture: Fixture, exact: VLM) -> None:
    found = exact.prompt_ids(fixture.prompt, images=len(fixture.images))
    assert found == fixture.arrays["input_ids"][0].tolist()
    count = len(fixture.images)
    raw = exact.prompt_ids(fixture.templated_prompt, images=count, raw=True)
    assert raw == found


def test_fp32_prompt_logits_are_the_official_ones(fixture: Fixture, exact: VLM) -> None:
    found = exact.prompt_logits(fixture.prompt, fixture.images)
    expected = fixture.logits
    assert relative_error(found, expected) <= 1e-3
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_fp32_greedy_tokens_and_text_are_the_official_ones(fixture: Fixture, exact: VLM) -> None:
    stream = exact.stream(
        fixture.prompt,
        fixture.images,
        max_new_tokens=NEW_TOKENS,
        ignore_eos=True,
    )
    pieces = list(stream)
    answer = stream.generation
    assert answer.token_ids == fixture.generated_ids
    assert "".join(pieces) == answer.text
    assert answer.text == fixture.text
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens == fixture.expected["prompt_length_embeds"]
    assert answer.visual_tokens == fixture.expected["num_image_tokens"] * len(fixture.images)


def test_fp16_weights_answer_like_fp32(fixture: Fixture, exact: VLM, bundle_of: BundleOf) -> None:
    prompt = fixture.prompt
    with mobilevlm.load(bundle_of(fixture.name, "fp16-weights")) as half:
        # Most fixtures store float16, so nothing is lost; bfloat16 keeps 8 bits, float16 has 11.
        tokens, wanted = (m.encode_image(fixture.image, prompt) for m in (half, exact))
        assert relative_error(tokens, wanted) <= 1e-3
        found, expected = (m.prompt_logits(prompt, fixture.images) for m in (half, exact))
        assert relative_error(found, expected) <= 1e-3
        answer = half.generate(prompt, fixture.images, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    assert answer.token_ids == fixture.generated_ids


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_quantized_figures_are_in_the_manifest_and_agree_when_measured_again(
    fixture: Fixture, recipe: str, bundle_of: BundleOf
) -> None:
    folder = bundle_of(fixture.name, recipe, measure=True)
    quality = open_bundle(folder).manifest.quality
    assert quality.measured
    vision, decoder = quality.stages["vision"].figures, quality.stages["decoder"].figures
    again = measured_again(fixture, folder)
    # Figures have four digits. A rounding of activations that falls the other way with another
    # order of sums moves them by less than a percent.
    assert vision["cosine"] == pytest.approx(again["cosine"], abs=1e-4)
    assert vision["relative_error"] == pytest.approx(again["relative_error"], rel=1e-2)
    assert decoder["kl"] == pytest.approx(again["kl"], rel=1e-2)
    assert decoder["top1_agreement"] == pytest.approx(again["top1_agreement"], abs=0.01)
    match = quality.stages["end_to_end"].figures["greedy_match"]
    assert match == pytest.approx(again["greedy_match"], abs=1e-4)


def measured_again(fixture: Fixture, folder: object) -> dict[str, float]:
    """The same figures by formulas of their own, over both calibration prompts."""
    tokens, exact, cosines, kl, same, matches = [], [], [], [], [], []
    with mobilevlm.load(str(folder)) as vlm, torch.no_grad():
        reference = load_reference(fixture.model)
        ends = vlm.spec.conversation.eos_token_ids
        for seed, prompt in enumerate(PROMPTS):
            image = calibration_image(seed, vlm.spec.image.square.size)
            pixels = prepare(image, vlm.spec.image).arrays[0]["pixels"]
            image_arrays = Prepared("image", ({"pixels": pixels},), ())
            asked = with_instruction(
                image_arrays, fixture.model.instruction_tokenizer, prompt, vlm.spec
            )
            exact.append(reference.visual_tokens(**asked.arrays[0]))
            tokens.append(torch.from_numpy(vlm.encode_image(image, prompt)))
            cosines.append(torch.nn.functional.cosine_similarity(tokens[-1], exact[-1], dim=-1))
            answer = vlm.generate(prompt, [image], max_new_tokens=GREEDY_TOKENS, ignore_eos=True)
            said: list[int] = []
            for token in answer.token_ids:
                said.append(token)
                if token in ends:
                    break
            text = render(vlm.spec.conversation, [user_message(prompt, 1)])
            pieces = prompt_pieces(fixture.model, text)
            embeds = reference.embed([*pieces, *said], [exact[-1]])
            after = len(said) + 1
            wanted = reference.logits(embeds).double()[-after:]
            # As many logits as the gate asks for: other sums round other activations to 8 bits.
            found = torch.from_numpy(vlm.embeds_logits(embeds.numpy(), count=after)).double()
            divergence = torch.nn.functional.kl_div(
                found.log_softmax(-1), wanted.softmax(-1), reduction="none"
            )
            kl.append(divergence.sum(-1))
            same.append((found.argmax(-1) == wanted.argmax(-1)).double())
            matched = 0
            for token, row in zip(said, wanted, strict=False):
                if token != int(row.argmax()):
                    break
                matched += 1
            matches.append(matched / len(said))
    return {
        "cosine": float(torch.cat(cosines).min()),
        "relative_error": relative_error(torch.cat(tokens).numpy(), torch.cat(exact).numpy()),
        "kl": float(torch.cat(kl).mean()),
        "top1_agreement": float(torch.cat(same).mean()),
        "greedy_match": sum(matches) / len(matches),
    }
