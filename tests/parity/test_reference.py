"""The torch reference against the arrays that the models' official code gave.

Two correct float32 implementations differ here by a relative error of 1e-6 to 3e-6; the smallest
wrong choice known (LDP's norms with eps 1e-6 instead of 1e-5) makes 4.7e-5 in the visual tokens.
``FLOAT32`` lies between.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import FLOAT32, MOE_FIXTURES, Fixture, fixture_named, prompt_pieces, relative_error

from mobilevlm.conversation import (
    official_ids,
    render,
    tokenize,
    user_message,
)
from mobilevlm.image import normalize
from mobilevlm.instruction import with_instruction
from mobilevlm.preparation import prepare
from mobilevlm.prompt import Prepared
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.reference.experts import Capacity, SparseMLP
from mobilevlm.reference.streaming import stream_steps


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def fixture(any_fixture: Fixture) -> Fixture:
    return any_fixture


@pytest.fixture(scope="module")
def reference(fixture: Fixture) -> ReferenceModel:
    return load_reference(fixture.model)


@pytest.fixture(scope="module")
def pixels(fixture: Fixture) -> list[np.ndarray]:
    """Return the pixels of each image."""
    return [
        prepare(image, fixture.model.spec.image).arrays[0]["pixels"] for image in fixture.images
    ]


def embed_prompt(
    fixture: Fixture, reference: ReferenceModel, pixels: list[np.ndarray]
) -> torch.Tensor:
    tokens = [reference.visual_tokens(item, **fixture.further) for item in pixels]
    return reference.embed(prompt_pieces(fixture.model, fixture.templated_prompt), tokens)


def test_pixel_values_equal_the_official_preprocessing(
    fixture: Fixture, pixels: list[np.ndarray]
) -> None:
    found = np.stack([normalize(item, fixture.model.spec.image.square) for item in pixels])
    # One 8-bit step is 1 / 255 / std = 0.014: the limit allows float rounding, not one wrong pixel.
    assert np.abs(found - fixture.arrays["pixel_values"]).max() <= 1e-5


def test_prompt_text_and_ids_equal_the_official_ones(fixture: Fixture) -> None:
    model = fixture.model
    message = user_message(fixture.prompt, len(fixture.images))
    text = render(model.spec.conversation, [message])
    assert text == fixture.templated_prompt
    image = with_instruction(
        Prepared("image", ({},), ()), model.instruction_tokenizer, text, model.spec
    )
    assert {name: ids.tolist() for name, ids in image.arrays[0].items()} == {
        name: ids.tolist() for name, ids in fixture.further.items()
    }
    tokens = tokenize(model.tokenizer, text, model.spec.conversation)
    assert official_ids(tokens, model.spec.image.layout) == fixture.arrays["input_ids"][0].tolist()


def test_features_are_those_of_the_official_tower(
    fixture: Fixture, reference: ReferenceModel, pixels: list[np.ndarray]
) -> None:
    features = np.stack([reference.features(item).numpy() for item in pixels])
    assert relative_error(features, fixture.arrays["vision_features"]) <= FLOAT32


def test_visual_tokens_are_those_of_the_official_projector(
    fixture: Fixture, reference: ReferenceModel, pixels: list[np.ndarray]
) -> None:
    found = [reference.visual_tokens(item, **fixture.further) for item in pixels]
    tokens = np.stack(found)
    assert relative_error(tokens, fixture.arrays["projector_output"]) <= FLOAT32


def test_logits_of_every_prompt_position_are_the_official_ones(
    fixture: Fixture, reference: ReferenceModel, pixels: list[np.ndarray]
) -> None:
    logits = reference.logits(embed_prompt(fixture, reference, pixels)).numpy()
    expected = fixture.logits
    assert relative_error(logits, expected) <= FLOAT32
    assert (logits.argmax(-1) == expected.argmax(-1)).all()


def test_greedy_answer_is_the_official_one(
    fixture: Fixture, reference: ReferenceModel, pixels: list[np.ndarray]
) -> None:
    embeds = embed_prompt(fixture, reference, pixels)
    expected = fixture.generated_ids
    assert len(expected) == 24
    assert reference.greedy(embeds, len(expected)) == expected
    assert fixture.model.tokenizer.decode(expected) == fixture.text


def test_streamed_reference_equals_the_resident_one_bit_for_bit(
    fixture: Fixture, reference: ReferenceModel, pixels: list[np.ndarray]
) -> None:
    streamed = load_reference(fixture.model, streamed=True)
    assert torch.equal(streamed.features(pixels[0]), reference.features(pixels[0]))
    embeds = embed_prompt(fixture, streamed, pixels)
    assert torch.equal(embeds, embed_prompt(fixture, reference, pixels))
    assert torch.equal(streamed.logits(embeds), reference.logits(embeds))
    # So do two samples that go through it step by step.
    images = [streamed.image_state({"pixels": item, **fixture.further}) for item in [*pixels] * 2]
    steps = (*streamed.vision_steps(), *streamed.projector_steps())
    for state, item in zip(stream_steps(steps, images), [*pixels] * 2, strict=True):
        assert torch.equal(state.hidden[0], reference.visual_tokens(item, **fixture.further))
    prompts = [
        streamed.decoder.answered(streamed.decoder.start(embeds[None, cut:]), [5, 6])
        for cut in (0, 7)
    ]
    for cut, state in zip((0, 7), stream_steps(streamed.decoder_steps(), prompts), strict=True):
        logits = streamed.decoder.logits(state.hidden)[0, -3:]
        assert torch.equal(logits, reference.answer_logits(embeds[cut:], [5, 6]))
    # Weights are dropped after use: that is what streaming is for.
    assert all(parameter.is_meta for parameter in streamed.decoder.layers.parameters())


# Experts: what the router decides, and the official gate's capacity, an option of the reference.


@pytest.fixture(scope="module", params=MOE_FIXTURES)
def sparse(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


def routing(fixture: Fixture, capacity: Capacity | None) -> tuple[np.ndarray, dict[int, SparseMLP]]:
    """Logits of the prompt, and the experts of each layer after that pass."""
    reference = load_reference(fixture.model, capacity=capacity)
    embeds = torch.from_numpy(fixture.arrays["inputs_embeds"][0])
    return reference.logits(embeds).numpy(), reference.decoder.sparse_layers


def combine_weights(experts: SparseMLP) -> np.ndarray:
    """``(tokens, experts)``: what each expert's output is multiplied by."""
    weights = torch.zeros(len(experts.chosen), len(experts.experts))
    return weights.scatter(1, experts.chosen, experts.weights).numpy()


def test_each_token_chooses_the_official_experts(sparse: Fixture) -> None:
    _, layers = routing(sparse, None)
    assert list(layers) == sparse.arrays["moe_layers"].tolist()
    chosen = np.stack([experts.chosen.numpy() for experts in layers.values()])
    assert np.array_equal(chosen, sparse.chosen_experts)
    probabilities = np.stack([experts.probabilities.numpy() for experts in layers.values()])
    expected = sparse.arrays.get("router_probs_nodrop", sparse.arrays["router_probs"])
    assert np.abs(probabilities - expected).max() <= 1e-5  # float32 noise was 2e-6


# A run that drops, as configured (Phi-2: 34 choices; the others have room for all) and with an even
# share of places only (`_ecf1`: all three drop).
@pytest.mark.parametrize("suffix", ["", "_ecf1"])
def test_with_capacity_the_logits_and_weights_are_those_of_the_official_gate(
    sparse: Fixture, suffix: str
) -> None:
    moe = json.loads((sparse.checkpoint / "config.json").read_text())["moe"]
    capacity = Capacity(moe["eval_capacity_factor"], moe["min_capacity"])
    logits, layers = routing(sparse, Capacity(1.0, 0) if suffix else capacity)
    assert relative_error(logits, sparse.arrays[f"logits{suffix}"][0]) <= FLOAT32
    expected = sparse.arrays[f"combine_weights{suffix}"]
    found = np.stack([combine_weights(experts) for experts in layers.values()])
    assert np.abs(found - expected).max() <= 1e-5
    if suffix:
        assert ((found > 0).sum(axis=-1) < 2).any()
