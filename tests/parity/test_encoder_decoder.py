"""BLIP-2 with Flan-T5: the torch reference and the bundle against the official arrays, and what is
computed once for a prompt."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    FLOAT32,
    BundleOf,
    Fixture,
    fixture_named,
    prompt_pieces,
    refusal,
    relative_error,
)

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.conversation import official_ids, tokenize
from mobilevlm.decoder_spec import RelativePositions
from mobilevlm.errors import CheckpointError
from mobilevlm.export.graph.encoder_decoder import relative_buckets as graph_buckets
from mobilevlm.families import open_checkpoint
from mobilevlm.image import open_image
from mobilevlm.preparation import prepare
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.reference.encoder_decoder import relative_buckets
from mobilevlm.runtime import VLM
from mobilevlm.runtime.engines.onnx.engine import OnnxDecoder, open_session

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return fixture_named("blip2_t5")


@pytest.fixture(scope="module", params=[False, True], ids=["resident", "streamed"])
def reference(request: pytest.FixtureRequest, fixture: Fixture) -> ReferenceModel:
    return load_reference(fixture.model, streamed=request.param)


@pytest.fixture(scope="module")
def vlm(bundle_of: BundleOf) -> Iterator[VLM]:
    with mobilevlm.load(bundle_of("blip2_t5", "fp32")) as opened:
        yield opened


def test_ids_are_the_official_ones(fixture: Fixture, vlm: VLM) -> None:
    expected = fixture.arrays["input_ids"][0].tolist()
    model = fixture.model
    tokens = tokenize(model.tokenizer, fixture.templated_prompt, model.spec.conversation)
    found = official_ids(tokens, model.spec.image.layout)
    assert found == vlm.prompt_ids(fixture.prompt, 1) == expected


@torch.no_grad()
def test_the_reference_is_the_official_model(fixture: Fixture, reference: ReferenceModel) -> None:
    arrays, spec = fixture.arrays, fixture.model.spec
    pixels = prepare(fixture.image, spec.image).arrays[0]["pixels"]
    tokens = reference.visual_tokens(pixels)
    assert (
        relative_error(reference.features(pixels).numpy(), arrays["vision_features"][0]) <= FLOAT32
    )
    assert relative_error(tokens.numpy(), arrays["projector_output"][0]) <= FLOAT32
    embeds = reference.embed(prompt_pieces(fixture.model, fixture.templated_prompt), [tokens])
    assert relative_error(embeds.numpy(), arrays["inputs_embeds"][0]) <= FLOAT32
    states = reference.decoder.encoder(embeds[None]).numpy()
    assert relative_error(states, arrays["encoder_output"]) <= FLOAT32
    answer = arrays["decoder_input_ids"][0].tolist()[1:]
    logits = reference.answer_logits(embeds, answer).numpy()
    assert relative_error(logits, arrays["logits"][0]) <= FLOAT32
    assert reference.greedy(embeds, NEW_TOKENS) == arrays["generated_ids"].tolist()


def test_the_encoder_graph_gives_the_official_states(fixture: Fixture, vlm: VLM) -> None:
    path = vlm.bundle.path(vlm.bundle.artifact("encoder", "onnx").path)
    embeds = fixture.arrays["inputs_embeds"]
    [states] = open_session(path, 1).run(["encoder_states"], {"inputs_embeds": embeds})
    assert relative_error(states, fixture.arrays["encoder_output"]) <= FLOAT32


def test_the_decoder_graph_gives_the_official_logits(fixture: Fixture, vlm: VLM) -> None:
    arrays = fixture.arrays
    answer = arrays["decoder_input_ids"][0].tolist()[1:]
    found = vlm.answer_logits(arrays["inputs_embeds"][0], answer)
    assert relative_error(found, arrays["logits"][0]) <= FLOAT32
    first = vlm.prompt_logits(fixture.prompt, [fixture.image])
    assert relative_error(first, arrays["logits"][0, :1]) <= FLOAT32


@pytest.mark.parametrize("recipe", ["fp32", "fp16-weights"])
def test_greedy_tokens_and_text_are_the_official_ones(
    recipe: str, fixture: Fixture, bundle_of: BundleOf
) -> None:
    with mobilevlm.load(bundle_of("blip2_t5", recipe)) as vlm:
        stream = vlm.stream(
            fixture.prompt, [fixture.image], max_new_tokens=NEW_TOKENS, ignore_eos=True
        )
        pieces = list(stream)
    answer = stream.generation
    assert answer.token_ids == fixture.generated_ids
    assert "".join(pieces) == answer.text == fixture.text
    assert answer.prompt_tokens == fixture.expected["prompt_length_embeds"]
    assert answer.visual_tokens == fixture.expected["num_image_tokens"]


def test_a_prompt_is_encoded_once_and_another_one_anew(
    fixture: Fixture, vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm.clear_caches()
    runs, original = [], OnnxDecoder.encode

    def count(self: OnnxDecoder, *arguments: Any) -> None:
        runs.append(1)
        original(self, *arguments)

    monkeypatch.setattr(OnnxDecoder, "encode", count)

    def ask(text: str) -> tuple[list[int], int]:
        answer = vlm.generate(text, [fixture.image], max_new_tokens=NEW_TOKENS, ignore_eos=True)
        return answer.token_ids, answer.reused.tokens

    length = fixture.expected["prompt_length_embeds"]
    assert ask(fixture.prompt) == (fixture.generated_ids, 0)
    assert len(runs) == 1  # for 24 tokens
    assert ask(fixture.prompt) == (fixture.generated_ids, length)
    assert len(runs) == 1
    assert ask("Something else?")[0] != fixture.generated_ids
    assert len(runs) == 2
    assert ask(fixture.prompt)[0] == fixture.generated_ids


@pytest.mark.parametrize(("text", "count"), [("a photo", 0), ("Which?", 2), ("<image> or?", 1)])
@torch.no_grad()
def test_logits_are_the_references_wherever_images_stand(
    text: str, count: int, fixture: Fixture, vlm: VLM
) -> None:
    reference = load_reference(fixture.model)
    whole = np.asarray(open_image(fixture.image))
    images = [whole[index * 40 :] for index in range(count)]
    pixels = [prepare(image, vlm.spec.image).arrays[0]["pixels"] for image in images]
    placed = text if "<image>" in text else "<image>" * count + text
    pieces = prompt_pieces(fixture.model, placed)
    embeds = reference.embed(pieces, [reference.visual_tokens(item) for item in pixels])
    expected = reference.logits(embeds).numpy()
    assert relative_error(vlm.prompt_logits(text, images), expected) <= 1e-4


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_quantized_figures_are_in_the_manifest(recipe: str, bundle_of: BundleOf) -> None:
    manifest = open_bundle(bundle_of("blip2_t5", recipe, measure=True)).manifest
    assert {part.stage for part in manifest.artifacts} == {
        "vision", "embeddings", "encoder", "decoder",
    }  # fmt: skip
    figures = manifest.quality.stages["decoder"].figures
    if recipe == "int8":
        assert 0 < figures["kl"] < 0.01
    else:  # without calibration
        assert figures["kl"] == pytest.approx(0.327, abs=0.05)


# T5's buckets: 32 up to 128 in its releases.
@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (32, 20), (8, 64)])
def test_both_implementations_put_every_distance_into_the_same_bucket(
    buckets: int, furthest: int, both_ways: bool
) -> None:
    length = 600
    spec = RelativePositions(buckets, furthest)
    expected = relative_buckets(spec, length, both_ways).numpy()
    distances = np.arange(length)[None] - np.arange(length)[:, None]
    found = graph_buckets(distances, buckets, furthest, both_ways)
    assert np.array_equal(found, expected)
    assert (found.min(), found.max()) == (0, buckets - 1)


def test_what_runs_samples_layer_by_layer_says_that_it_does_not_run_encoders(
    fixture: Fixture, bundle_of: BundleOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundle_of("blip2_t5", "fp32")
    line = refusal(capsys, "verify", bundle, fixture.checkpoint)
    assert "verify is for decoder-only language models" in line
    place = ("-o", tmp_path / "r.toml", "--quiet")
    line = refusal(capsys, "search", fixture.checkpoint, *place, "--budget", "4bpw")
    assert "decoder-only language models" in line
    recipe = tmp_path / "gptq.toml"
    recipe.write_text(
        'tower = "fp32"\nprojector = "fp32"\nlm_head = "fp32"\nembeddings = "fp32"\n'
        'decoder = { precision = "q4", quantizer = "gptq" }\n'
        "[limits]\nvision_relative_error = 1\ndecoder_kl = 1\n"
    )
    line = refusal(capsys, "export", fixture.checkpoint, "-o", tmp_path / "b", "--recipe", recipe)
    assert "has an encoder" in line
    place = ("-o", tmp_path / "b", "--quiet")
    line = refusal(capsys, "export", fixture.checkpoint, *place, "--format", "all")
    assert "--format onnx" in line


def test_t5_of_the_first_release_is_refused(fixture: Fixture, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(fixture.checkpoint, tmp_path / "checkpoint"))
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"scale_decoder_outputs": false', '"x": 0'))
    with pytest.raises(CheckpointError, match=r"scaled down \(T5 1.0\)"):
        open_checkpoint(copy)
