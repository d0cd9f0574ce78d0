"""The model that hears, sees and draws: what training computes is what a bundle computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refusal
from numpy.typing import NDArray
from PIL import Image

import mobilevlm
from mobilevlm.errors import AudioError, CheckpointError
from mobilevlm.families import open_checkpoint
from mobilevlm.media.sound_image import RATE, sound_image
from mobilevlm.messages import Message
from mobilevlm.model import Model
from mobilevlm.nano import beeps
from mobilevlm.nano.simple import EDGE, GRID, draw_varied, simple_caption, simple_scene
from mobilevlm.nano.training.any_files import MARK, AnyConfig, save_weights, write_random
from mobilevlm.nano.training.anything import (
    Rows,
    drawing_ids,
    padded,
    question_row,
    states,
    train,
)
from mobilevlm.reference import load_reference
from mobilevlm.runtime import VLM

TINY = AnyConfig(
    hidden_size=32, intermediate_size=48, layers=2, vision_size=32, vision_layers=1, image_blocks=1
)
EXACT = 2e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("any") / "tiny"
    write_random(folder, TINY)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("bundle") / "tiny"
    mobilevlm.export(model.folder, bundle, recipe="fp32")
    return bundle


@pytest.fixture(scope="module")
def vlm(folder: Path) -> Iterator[VLM]:
    with mobilevlm.load(folder) as opened:
        yield opened


def trained_logits(model: Model, question: str, image: NDArray[np.uint8]) -> torch.Tensor:
    """Logits of the answer's first token, as training computes them."""
    ids, _ = question_row(model, [(question, "yes")])
    asked = ids[: len(ids) - len(model.tokenizer.encode("yes").ids) - 1]
    rows = padded([(asked, asked)], pixels=torch.from_numpy(image)[None])
    reference = load_reference(model)
    with torch.no_grad():
        found: torch.Tensor = reference.decoder.logits(states(reference, rows))[0, -1]
    return found


def test_a_question_has_the_ids_and_logits_that_training_has(model: Model, vlm: VLM) -> None:
    question, pixels = "What is at the top?", draw_varied(simple_scene(1), 1)
    ids, _ = question_row(model, [(question, "yes")])
    asked = vlm.prompt_ids(question, images=1)
    start = 2 + GRID * GRID
    assert asked[2:start] == [MARK] * GRID * GRID
    assert [*asked[:2], *asked[start:]] == [*ids[:2], *ids[start : len(asked)]]
    logits = vlm.prompt_logits(question, [Image.fromarray(pixels)])[-1]
    assert np.abs(logits - trained_logits(model, question, pixels).numpy()).max() <= EXACT


def test_a_sound_is_read_as_its_spectrogram(model: Model, vlm: VLM) -> None:
    samples = beeps.sound(beeps.sample_clip(3))
    image = sound_image(samples, EDGE)
    alone = vlm.encode_audio((samples, RATE))
    assert np.abs(alone - vlm.encode_image(Image.fromarray(image))).max() == 0
    said = vlm.generate(beeps.QUESTION, audio=[(samples, RATE)], max_new_tokens=4).token_ids
    part: dict[str, Any] = {"type": "audio", "audio": (samples, RATE)}
    message: Message = {"role": "user", "content": [part, {"type": "text", "text": beeps.QUESTION}]}
    assert vlm.generate([message], max_new_tokens=4).token_ids == said
    shown = vlm.generate(beeps.QUESTION, [Image.fromarray(image)], max_new_tokens=4)
    assert shown.token_ids == said
    first = trained_logits(model, beeps.QUESTION, image)
    assert said[:1] == [int(first.argmax())]


@torch.no_grad()
def test_an_image_is_drawn_as_the_reference_draws_it(model: Model, vlm: VLM) -> None:
    caption = simple_caption(simple_scene(2))
    ids = drawing_ids(model, caption)
    assert vlm.drawing_ids(caption) == ids
    reference = load_reference(model)
    codes, _ = reference.draw_greedily(torch.tensor([ids]), 1.0)
    [drawn] = vlm.drawn(caption, temperature=0)
    assert drawn.codes == codes
    values = reference.image_decoder(torch.tensor([codes]))[0].numpy()
    assert np.abs(drawn.values - values).max() <= EXACT
    made = torch.tensor([codes])
    rows = Rows(torch.tensor([ids + [1] * (GRID * GRID - 1)]), made, codes=made)
    told = reference.image_head(states(reference, rows)[:, -GRID * GRID :]).argmax(-1)
    assert told[0].tolist() == codes


def test_a_longer_sound_is_refused_in_one_line(
    vlm: VLM, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AudioError, match=r"2\.00 s, this model hears 0\.96 s"):
        vlm.prepare_audio((np.zeros(2 * RATE, np.float32), RATE))
    wrong = tmp_path / "sound.wav"
    wrong.write_bytes(b"no sound")
    assert "sound.wav" in refusal(capsys, "run", folder, "--audio", wrong, "-p", "What?")


@pytest.mark.parametrize("first", [600, None, "1"])
def test_places_outside_the_vocabulary_are_refused(
    model: Model, tmp_path: Path, first: object
) -> None:
    copy = Path(shutil.copytree(model.folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "first_place_id": first}))
    with pytest.raises(CheckpointError, match="first_place_id"):
        open_checkpoint(copy)


@pytest.mark.parametrize("stage", ["joint", "pixels"])
def test_training_that_was_left_goes_on_as_if_it_had_not_been(tmp_path: Path, stage: str) -> None:
    assert stage in ("joint", "pixels")
    whole = train(stage, tmp_path / "whole", 60, TINY, steps=2)  # type: ignore[arg-type]
    train(stage, tmp_path / "parts", 60, TINY, steps=1)  # type: ignore[arg-type]
    parts = train(stage, tmp_path / "parts", 60, TINY, steps=2)  # type: ignore[arg-type]
    random = load_reference(open_checkpoint(tmp_path / "whole" / "model")).state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
        is_trained = name.startswith("image_decoder.") == (stage == "pixels")
        assert is_trained or torch.equal(value, random[name]), name
    saved = open_checkpoint(tmp_path / "parts" / "model")
    save_weights(parts, saved)
    again = load_reference(open_checkpoint(saved.folder)).state_dict()
    for name, value in parts.state_dict().items():
        assert torch.equal(again[name], value.half().float()), name
