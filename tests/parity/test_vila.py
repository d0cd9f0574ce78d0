"""VILA's prompts: several images at any place, turns, frames of a video, in both official
behaviours; the numbers of its fixture are in test_reference.py and test_runtime.py."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BundleOf,
    Fixture,
    fixture_named,
    prompt_pieces,
    refusal,
    relative_error,
    run_program,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.conversation import render, user_message
from mobilevlm.errors import CheckpointError, MobileVLMError
from mobilevlm.families import open_checkpoint
from mobilevlm.image import open_image
from mobilevlm.messages import Message
from mobilevlm.model import OpenOptions
from mobilevlm.preparation import prepare
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.runtime import VLM

VARIANTS = {"vila": "current", "vila_v15": "vila1.5"}
PROMPTS = {
    "none": ("What is a photo?", 0),
    "first": ("What is it?", 1),
    "start": ("<image> is what?", 1),
    "middle": ("Is <image> a house?", 1),
    "end": ("What is this? <image>", 1),
    "two together": ("<image><image> Which one is older?", 2),
    "two apart": ("<image> or <image>", 2),
    "eight": ("A <image><image> b <image> c <image><image><image> d <image> e <image>", 8),
    "eight first": ("What happens?", 8),
}


@pytest.fixture(scope="module", params=VARIANTS)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


@pytest.fixture(scope="module")
def reference(fixture: Fixture) -> ReferenceModel:
    return load_reference(fixture.model)


@pytest.fixture(scope="module")
def vlm(fixture: Fixture, bundle_of: BundleOf) -> Iterator[VLM]:
    with mobilevlm.load(bundle_of(fixture.name, "fp32")) as opened:
        yield opened


def pictures(fixture: Fixture, count: int) -> list[np.ndarray]:
    """All different: the fixture's two, cut at other places."""
    whole = [np.asarray(open_image(path)) for path in fixture.images]
    return [whole[index % 2][index * 9 :, : 320 - index * 17] for index in range(count)]


@torch.no_grad()
def expected_logits(
    fixture: Fixture, reference: ReferenceModel, messages: list[Message], images: list[np.ndarray]
) -> np.ndarray:
    spec = fixture.model.spec
    pieces = prompt_pieces(fixture.model, render(spec.conversation, messages))
    pixels = [prepare(image, spec.image).arrays[0]["pixels"] for image in images]
    visual = [reference.visual_tokens(item) for item in pixels]
    return reference.logits(reference.embed(pieces, visual)).numpy()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_are_the_references_wherever_images_stand(
    prompt: str, fixture: Fixture, reference: ReferenceModel, vlm: VLM
) -> None:
    text, count = PROMPTS[prompt]
    images = pictures(fixture, count)
    expected = expected_logits(fixture, reference, [user_message(text, count)], images)
    found = vlm.prompt_logits(text, images)
    assert relative_error(found, expected) <= 1e-4
    if count > 1:  # the order matters
        assert relative_error(vlm.prompt_logits(text, images[::-1]), expected) > 1e-2


def test_images_may_come_in_any_turn(fixture: Fixture, reference: ReferenceModel, vlm: VLM) -> None:
    images = pictures(fixture, 3)
    messages: list[Message] = [
        {"role": "user", "content": "What is <image>?"},
        {"role": "assistant", "content": "A house."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
        {"role": "assistant", "content": "Nothing."},
        {"role": "user", "content": "Like <image> then?"},
    ]
    expected = expected_logits(fixture, reference, messages, images)
    assert relative_error(vlm.prompt_logits(messages, images), expected) <= 1e-4
    whole = vlm.generate(messages, images, max_new_tokens=8, ignore_eos=True)
    session = vlm.new_session()  # turn by turn, keeping what is there
    for end, count in ((1, 1), (3, 2), (5, 3)):
        answer = vlm.generate(
            messages[:end], images[:count], max_new_tokens=8, ignore_eos=True, session=session
        )
    assert answer.token_ids == whole.token_ids
    assert answer.reused.tokens > 0


@pytest.mark.parametrize(("text", "count"), [("<image> or <image>?", 1), ("<image>?", 2)])
def test_a_wrong_number_of_marks_gives_one_clear_line(
    text: str,
    count: int,
    fixture: Fixture,
    bundle_of: BundleOf,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [part for path in fixture.images[:count] for part in ("--image", path)]
    bundle = bundle_of(fixture.name, "fp32")
    message = refusal(capsys, "run", bundle, *given, "--prompt", text)
    marks = text.count("<image>")
    assert f"the prompt has {marks} <image> mark" in message
    assert "give one image for each mark" in message


def test_visual_tokens_of_the_variants_are_the_same_in_another_order(bundle_of: BundleOf) -> None:
    tokens = []
    for name in VARIANTS:
        with mobilevlm.load(bundle_of(name, "fp32")) as vlm:
            tokens.append(vlm.encode_image(fixture_named("vila").image).reshape(3, 3, -1))
    assert not np.allclose(tokens[0], tokens[1], atol=1e-2)
    np.testing.assert_allclose(tokens[0], tokens[1].transpose(1, 0, 2), atol=1e-5)


# Which behaviour.


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixture_named("vila").checkpoint, tmp_path / "checkpoint"))


def change(copy: Path, file: str = "config.json", **values: object) -> None:
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("version", "variant"),
    [("4.36.2", "vila1.5"), ("4.37.2", "vila1.5"), ("4.46.0", "current"), ("5.1.0", "current")],
)
def test_a_checkpoint_behaves_as_the_code_that_saved_it(
    version: str, variant: str, copy: Path
) -> None:
    change(copy, transformers_version=version)
    assert open_checkpoint(copy).spec.variant == variant


def test_a_checkpoint_that_does_not_tell_its_version_asks_for_one(copy: Path) -> None:
    change(copy, transformers_version=None)
    with pytest.raises(
        CheckpointError, match=r"transformers_version.*--variant vila1.5 or current"
    ):
        open_checkpoint(copy)
    assert open_checkpoint(copy, OpenOptions(variant="current")).spec.variant == "current"


def test_the_variant_of_an_export_is_recorded_and_verified_with(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    done = run_program(
        "export", copy, "-o", bundle, "--recipe", "fp32", "--variant", "vila1.5", "--no-measure"
    )
    assert done.returncode == 0, done.stderr
    spec = open_bundle(bundle).manifest.spec
    assert spec.variant == "vila1.5" and spec.image.connector.order == "columns"
    line = refusal(capsys, "export", copy, "-o", tmp_path / "b", "--variant", "vila2")
    assert "variant 'vila2' is not known for vila: expected vila1.5 or current" in line
    line = refusal(
        capsys, "export", fixture_named("llava_v1").checkpoint, "-o", tmp_path / "b",
        "--variant", "current",
    )  # fmt: skip
    assert "variant 'current' is not known for llava: leave it out" in line


# What is not supported, one line each.


def _rename_end(copy: Path) -> None:
    """A tokenizer.json of another kind instead of the sentencepiece model."""
    tokenizer = Tokenizer(BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.save(str(copy / "llm" / "tokenizer.json"))
    (copy / "llm" / "tokenizer.model").unlink()


REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "tiles": (lambda copy: change(copy, image_aspect_ratio="dynamic_s2"), "'image_aspect_ratio'"),
    "scales": (lambda copy: change(copy, s2=True), "'s2'"),
    "projector": (
        lambda copy: change(copy, "mm_projector/config.json", mm_projector_type="mlp2x_gelu"),
        "expected 'mlp_downsample'",
    ),
    "language model": (
        lambda copy: change(copy, "llm/config.json", model_type="qwen2"),
        "expected 'llama'",
    ),
    "tower": (
        lambda copy: change(copy, "vision_tower/config.json", model_type="intern_vit_6b"),
        "expected siglip_vision_model or clip_vision_model",
    ),
    "conversation": (lambda copy: _rename_end(copy), "has no '</s>', which ends an answer"),
    "no projector": (lambda copy: shutil.rmtree(copy / "mm_projector"), "the file is missing"),
    "sizes": (lambda copy: change(copy, hidden_size=96), "has 64"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_known_here_is_named(case: str, copy: Path) -> None:
    damage, message = REFUSALS[case]
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_a_context_longer_than_the_language_models_interpolates_positions(copy: Path) -> None:
    change(copy, model_max_length=10_000)
    decoder = open_checkpoint(copy).spec.decoder
    assert (decoder.rope_scaling, decoder.context_length) == (3.0, 3 * 4096)


# GGUF: llama.cpp decodes what ONNX Runtime sees.


def test_gguf_without_onnx_is_refused(fixture: Fixture, tmp_path: Path) -> None:
    with pytest.raises(MobileVLMError, match=r"no projector of the kind mlp_downsample.*onnx"):
        mobilevlm.export(fixture.checkpoint, tmp_path / "b", formats=("gguf",), measure=False)


@pytest.mark.skipif(
    os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1", reason="asked to go without llama.cpp"
)
@pytest.mark.parametrize("engine", ["hybrid", "ggml"])
def test_the_gguf_decoder_gives_the_official_logits_and_tokens(
    engine: str, fixture: Fixture, tmp_path: Path
) -> None:
    mobilevlm.export(
        fixture.checkpoint,
        tmp_path / "b",
        recipe="fp32",
        formats=("onnx", "gguf"),
        variant=fixture.variant,
        measure=False,
    )
    with mobilevlm.load(tmp_path / "b", engine) as vlm:
        found = vlm.prompt_logits(fixture.prompt, fixture.images)
        assert relative_error(found, fixture.logits) <= 1e-5
        answer = vlm.generate(fixture.prompt, fixture.images, max_new_tokens=24, ignore_eos=True)
    assert answer.token_ids == fixture.generated_ids
