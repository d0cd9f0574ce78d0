"""BLIP-2 and InstructBLIP beyond their fixtures' numbers (test_reference.py, test_runtime.py):
prompts, what depends on the question, engines, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BundleOf, Fixture, fixture_named, prompt_pieces, relative_error

import mobilevlm
from mobilevlm.conversation import render, tokenize, user_message
from mobilevlm.errors import CheckpointError, MobileVLMError, PromptError
from mobilevlm.families import open_checkpoint
from mobilevlm.image import open_image
from mobilevlm.instruction import with_instruction
from mobilevlm.model import OpenOptions
from mobilevlm.preparation import prepare
from mobilevlm.prompt import Mark
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.runtime import VLM

NAMES = ("blip2", "instructblip")


@pytest.fixture(scope="module", params=NAMES)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


@pytest.fixture(scope="module")
def reference(fixture: Fixture) -> ReferenceModel:
    return load_reference(fixture.model)


@pytest.fixture(scope="module")
def vlm(fixture: Fixture, bundle_of: BundleOf) -> Iterator[VLM]:
    with mobilevlm.load(bundle_of(fixture.name, "fp32")) as opened:
        yield opened


@torch.no_grad()
def expected_logits(
    fixture: Fixture, reference: ReferenceModel, text: str, images: list[np.ndarray]
) -> np.ndarray:
    model, spec = fixture.model, fixture.model.spec
    prompt = render(spec.conversation, [user_message(text, len(images))])
    visual = [
        reference.visual_tokens(
            **with_instruction(
                prepare(image, spec.image), model.instruction_tokenizer, prompt, spec
            ).arrays[0]
        )
        for image in images
    ]
    return reference.logits(reference.embed(prompt_pieces(model, prompt), visual)).numpy()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("a photo of", 0),
        ("a photo of", 1),
        ("Which is older?", 2),
        ("<image> or <image>?", 2),
        ("a <image> b", 1),
        ("all of them", 8),
    ],
)
def test_logits_are_the_references_wherever_images_stand(
    text: str, count: int, fixture: Fixture, reference: ReferenceModel, vlm: VLM
) -> None:
    whole = np.asarray(open_image(fixture.image))
    images = [whole[index * 9 :, : 400 - index * 17] for index in range(count)]
    found = vlm.prompt_logits(text, images)
    expected = expected_logits(fixture, reference, text, images)
    assert relative_error(found, expected) <= 1e-4


def test_images_that_begin_a_prompt_stand_before_the_id_that_begins_a_text(
    fixture: Fixture,
) -> None:
    model = fixture.model
    tokens = tokenize(model.tokenizer, "<image><image>a <image>b", model.spec.conversation)
    ids = [-200 if isinstance(token, Mark) else token for token in tokens]
    first = model.tokenizer.encode("").ids
    assert ids[:2] == [-200, -200] and ids[2 : 2 + len(first)] == first
    assert ids.count(first[0]) == 1 and ids.count(-200) == 3


def test_the_vqa_conversation_asks_with_the_words_of_the_papers(fixture: Fixture) -> None:
    spec = open_checkpoint(fixture.checkpoint, OpenOptions(conversation="vqa")).spec
    turns: list[Any] = [
        user_message("Who?", 1),
        {"role": "assistant", "content": "A cat."},
        user_message("It's 'why'?", 0),
    ]
    assert render(spec.conversation, turns) == (
        "<image>Question: Who? Answer: A cat. Question: It's 'why'? Answer:"
    )


def test_visual_tokens_follow_the_question_only_where_the_qformer_reads_it(
    fixture: Fixture, vlm: VLM
) -> None:
    first, again, other = (
        vlm.encode_image(fixture.image, text) for text in ("Who?", "Who?", "What is unusual?")
    )
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) == (fixture.name == "blip2")


def test_a_second_question_takes_over_no_more_than_is_the_same(fixture: Fixture, vlm: VLM) -> None:
    questions = ("Who is in this image?", "What is unusual about this image?")
    alone = []
    for question in questions:
        vlm.clear_caches()
        alone.append(vlm.generate(question, [fixture.image], max_new_tokens=8, ignore_eos=True))
    vlm.clear_caches()
    for question, expected in zip(questions, alone, strict=True):
        found = vlm.generate(question, [fixture.image], max_new_tokens=8, ignore_eos=True)
        assert found.token_ids == expected.token_ids
    assert found.reused.images == (fixture.name == "blip2")
    same = vlm.generate(questions[1], [fixture.image], max_new_tokens=8, ignore_eos=True)
    assert same.reused.images == 1 and same.token_ids == found.token_ids


def test_an_instruction_longer_than_the_qformer_reads_is_refused(bundle_of: BundleOf) -> None:
    with (
        mobilevlm.load(bundle_of("instructblip", "fp32")) as vlm,
        pytest.raises(PromptError, match=r"takes 67 tokens of the Q-Former.*up to 64"),
    ):
        vlm.generate("? " * 65, [fixture_named("instructblip").image])


# GGUF: Llama in llama.cpp behind ONNX Runtime's Q-Former; llama.cpp has no OPT.


@pytest.mark.skipif(
    os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1", reason="asked to go without llama.cpp"
)
def test_instructblip_in_hybrid_gives_the_official_logits_and_tokens(tmp_path: Path) -> None:
    fixture = fixture_named("instructblip")
    mobilevlm.export(
        fixture.checkpoint,
        tmp_path / "b",
        recipe="fp32",
        formats=("onnx", "gguf"),
        measure=False,
    )
    with mobilevlm.load(tmp_path / "b", "hybrid") as vlm:
        found = vlm.prompt_logits(fixture.prompt, [fixture.image])
        assert relative_error(found, fixture.logits) <= 1e-5
        answer = vlm.generate(fixture.prompt, [fixture.image], max_new_tokens=24, ignore_eos=True)
    assert answer.token_ids == fixture.generated_ids


def test_opt_as_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MobileVLMError, match=r"no architecture for this decoder.*--format onnx"):
        mobilevlm.export(
            fixture_named("blip2").checkpoint,
            tmp_path / "b",
            formats=("onnx", "gguf"),
            measure=False,
        )
    assert not (tmp_path / "b").exists()


# config.json: the hub's leave out what is the default; what is not known is named.


@pytest.fixture
def copy(fixture: Fixture, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixture.checkpoint, tmp_path / "checkpoint"))


def change(copy: Path, section: str, **values: object) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text())
    (config[section] if section else config).update(values)
    path.write_text(json.dumps(config))


REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "language model": (
        lambda copy: change(copy, "text_config", model_type="bloom"),
        "language model is 'bloom'",
    ),
    "no biases": (lambda copy: change(copy, "vision_config", qkv_bias=False), "'qkv_bias'"),
    "activation": (
        lambda copy: change(copy, "qformer_config", hidden_act="relu"),
        "'hidden_act' of the Q-Former is 'relu', expected 'gelu'",
    ),
    "heads": (
        lambda copy: change(copy, "qformer_config", num_attention_heads=5),
        "not a multiple of 'num_attention_heads' 5",
    ),
    "tower": (
        lambda copy: change(copy, "qformer_config", encoder_hidden_size=40),
        "'encoder_hidden_size' of the Q-Former is 40, expected 32",
    ),
    "a layer more": (
        lambda copy: change(copy, "vision_config", num_hidden_layers=4),
        "vision_model.encoder.layers.3.* is missing",
    ),
    "pixels": (
        lambda copy: change(copy, "vision_config", image_size=70),
        "'size' is 56, but the tower takes 70 pixels",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_known_here_is_named(case: str, copy: Path) -> None:
    damage, message = REFUSALS[case]
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_opt_of_350m_is_refused(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(fixture_named("blip2").checkpoint, tmp_path / "checkpoint"))
    change(copy, "text_config", do_layer_norm_before=False)
    with pytest.raises(CheckpointError, match="'do_layer_norm_before' is False, expected True"):
        open_checkpoint(copy)


def test_settings_of_the_image_processor_may_be_inside_the_processors(copy: Path) -> None:
    expected = open_checkpoint(copy).spec.image.preparation
    (copy / "preprocessor_config.json").unlink()
    assert open_checkpoint(copy).spec.image.preparation == expected


def test_a_rotary_base_is_read_in_the_words_of_any_release(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(fixture_named("instructblip").checkpoint, tmp_path / "checkpoint"))
    change(copy, "text_config", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert open_checkpoint(copy).spec.decoder.rope_theta == 5e5
    joined = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    change(copy, "text_config", rope_parameters=joined)
    decoder = open_checkpoint(copy).spec.decoder
    assert (decoder.rope_theta, decoder.rope_scaling) == (1e4, 4.0)
    change(copy, "text_config", rope_parameters=None, rope_theta=2e4)
    assert open_checkpoint(copy).spec.decoder.rope_theta == 2e4
