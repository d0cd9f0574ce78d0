"""Gemma 3 beyond the arrays of its fixture: rows that see each other, keys and values in 8 bits,
other forms of the checkpoint. Prompts with several images: test_gemma.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FLOAT32, BundleOf, Fixture, fixture_named, relative_error
from numpy.typing import NDArray
from PIL import Image

import mobilevlm
from mobilevlm.export.graph.decoder import LARGEST_TABLES
from mobilevlm.families import open_checkpoint
from mobilevlm.prompt import Rows, run_spans
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.runtime import VLM
from mobilevlm.runtime.engines import chunk_spans
from mobilevlm.runtime.engines.onnx.onnx_state import OnnxState
from mobilevlm.runtime.sequence.session import Fill

PROMPT = "<image>What is in it? And here?<image>Say which has a house."


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return fixture_named("gemma3")


@pytest.fixture(scope="module")
def images(fixture: Fixture) -> list[Image.Image]:
    first = Image.open(fixture.image).convert("RGB")
    return [first, first.transpose(Image.Transpose.ROTATE_90)]


@pytest.fixture(scope="module")
def vlm(fixture: Fixture, bundle_of: BundleOf) -> Iterator[VLM]:
    with mobilevlm.load(bundle_of("gemma3", "fp32")) as model:
        yield model


@pytest.fixture(scope="module")
def reference(fixture: Fixture) -> ReferenceModel:
    return load_reference(fixture.model)


def test_all_of_a_prompt_in_one_run_gives_the_same(
    vlm: VLM, reference: ReferenceModel, images: list[Image.Image]
) -> None:
    asked = vlm._prepare(PROMPT, images, raw=False)
    with torch.no_grad():
        shown = [reference.image_rows(image) for image in asked.images]
        state = reference.prompt(asked.pieces, shown)
        rows = Rows(state.hidden[0].numpy(), blocks=tuple(run_spans(asked.pieces)))
        found = vlm.embeds_logits(rows)
        assert relative_error(found, reference.logits(state).numpy()) <= 2 * FLOAT32
        # Rows that only see the past are another model's.
        causal = vlm.embeds_logits(replace(rows, blocks=()))
    assert relative_error(causal, found) > 1000 * FLOAT32


@pytest.fixture(scope="module")
def long_contexts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Bundles of the checkpoint with 262,144 positions, whose rotary tables are stored in one."""
    folder = tmp_path_factory.mktemp("long")
    shutil.copytree(fixture_named("gemma3").checkpoint, folder / "checkpoint")
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1 << 18
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config))
    bundles = [folder / "made", folder / "stored"]
    with pytest.MonkeyPatch.context() as patch:
        for bundle in bundles:
            mobilevlm.export(folder / "checkpoint", bundle, recipe="fp32", measure=False)
            patch.setattr("mobilevlm.export.graph.decoder.LARGEST_TABLES", 1 << 40)
    return bundles


def test_cosines_of_a_long_context_are_made_in_the_graph(
    long_contexts: list[Path], images: list[Image.Image]
) -> None:
    made, stored = (
        sum(file.stat().st_size for file in folder.rglob("*.onnx_data")) for folder in long_contexts
    )
    assert made < stored - 2 * LARGEST_TABLES
    found = []
    for bundle in long_contexts:
        with mobilevlm.load(bundle) as vlm:
            logits = [vlm.prompt_logits(PROMPT, images)[-4:]]
            decoder = vlm._engines()[1]
            for slots in (1000, 70_000, 250_000):
                state = decoder.new_state()
                assert isinstance(state, OnnxState) and state._windows is not None
                state.resume(slots)  # behind rows of zeros, none of them in the windows
                state._windows._move(slots, slots)
                logits += [decoder.step(state, token).copy()[None] for token in (5, 6, 7)]
            found.append(np.concatenate(logits))
    assert relative_error(*found) <= FLOAT32
    assert np.array_equal(found[0].argmax(-1), found[1].argmax(-1))


def test_a_prompt_that_ends_inside_an_image_is_computed_from_its_begin(
    vlm: VLM, reference: ReferenceModel, images: list[Image.Image]
) -> None:
    """The last position of a prompt is always computed: of one that ends with an image, with all
    rows of the image."""
    whole = vlm._prepare("x<start_of_image>", images[:1], raw=True)
    asked = replace(whole, pieces=whole.pieces[:-2])
    session, note = vlm._session("everything"), Fill()
    first = session.fill(asked, Fill()).copy()
    again = session.fill(asked, note)
    assert note.reused_tokens == len(asked.pieces) - 1  # ids before the image
    assert np.array_equal(again, first)
    with torch.no_grad():
        rows = [reference.image_rows(image) for image in asked.images]
        expected = reference.logits(reference.prompt(asked.pieces, rows)).numpy()[-1]
    assert relative_error(first, expected) <= 2 * FLOAT32


def test_chunks_do_not_split_rows_that_see_each_other() -> None:
    assert list(chunk_spans(10, (), 4)) == [(0, 4), (4, 8), (8, 10)]
    assert list(chunk_spans(10, ((2, 6),), 4)) == [(0, 2), (2, 6), (6, 10)]
    assert list(chunk_spans(12, ((3, 9), (9, 10)), 4)) == [(0, 3), (3, 9), (9, 12)]
    assert list(chunk_spans(0, (), 4)) == []


def test_keys_and_values_in_8_bits_stay_near(
    vlm: VLM, bundle_of: BundleOf, images: list[Image.Image]
) -> None:
    with mobilevlm.load(bundle_of("gemma3", "fp32", kv_cache="int8")) as small:
        found = small.prompt_logits(PROMPT, images)
    error = relative_error(found, vlm.prompt_logits(PROMPT, images))
    assert FLOAT32 < error < 0.05


@pytest.mark.parametrize("form", ["transformers 5", "an untied head"])
def test_other_forms_of_the_checkpoint_are_the_same_model(
    fixture: Fixture, tmp_path: Path, form: str
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(fixture.checkpoint, folder)
    change_names(folder, form)
    found, known = open_checkpoint(folder), fixture.model
    assert found.spec.decoder == replace(
        known.spec.decoder, tie_word_embeddings=form == "transformers 5"
    )
    shape = (known.spec.decoder.vocab_size, known.spec.decoder.hidden_size)
    for name, sizes in (("decoder.lm_head.weight", shape), ("projector.mlp.0.weight", (48, 32))):
        assert np.array_equal(found.weights.read(name, sizes), known.weights.read(name, sizes))


def change_names(folder: Path, form: str) -> None:
    """Write the weights under the names of a later release, or with a head of their own."""
    from safetensors.numpy import load_file, save_file

    tensors: dict[str, NDArray[Any]] = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if form == "an untied head":
        config["tie_word_embeddings"] = False
        head = tensors["language_model.model.embed_tokens.weight"]
        tensors["language_model.lm_head.weight"] = head.copy()
    else:
        tensors = {
            f"model.{name.replace('language_model.model.', 'language_model.')}": array
            for name, array in tensors.items()
        }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
