"""Gemma 4 beyond the arrays of its fixture: sequences that go back into the middle of a window,
recipes, shapes of images, memory, and the sound that is left out. Prompts with several images:
test_gemma.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BundleOf, Fixture, fixture_named
from numpy.typing import NDArray
from PIL import Image

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.errors import FileWarning, ImageError, MobileVLMError
from mobilevlm.families import open_checkpoint
from mobilevlm.input_spec import DynamicImage
from mobilevlm.media.dynamic_image import resized
from mobilevlm.plan import Plan
from mobilevlm.preparation import fewest_pieces, most_pieces, prepare
from mobilevlm.prompt import count_rows
from mobilevlm.runtime import VLM
from mobilevlm.runtime.memory.estimate import ROW, ROWS, estimate
from mobilevlm.state_buffers import state_buffers

PROMPT = "<image>What is in it? And here?<image>Say which has a house."
REAL = DynamicImage(16, 3, 645120, 645120, (0.5,) * 3, (0.5,) * 3, fill_edge=163840)
"""Images of the published models: 280 visual tokens."""


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return fixture_named("gemma4")


@pytest.fixture(scope="module")
def images(fixture: Fixture) -> list[Image.Image]:
    first = Image.open(fixture.image).convert("RGB")
    return [first, first.transpose(Image.Transpose.ROTATE_90)]


@pytest.fixture(scope="module")
def vlm(fixture: Fixture, bundle_of: BundleOf) -> Iterator[VLM]:
    with mobilevlm.load(bundle_of("gemma4", "fp32")) as model:
        yield model


def test_layers_that_share_keys_and_values_have_no_buffers(fixture: Fixture) -> None:
    decoder = fixture.model.spec.decoder
    buffers = state_buffers(decoder)
    assert {buffer.layer for buffer in buffers} == set(range(6))
    assert {buffer.shape[-1] for buffer in buffers if buffer.kind == "sliding"} == {16}
    assert {buffer.shape[-1] for buffer in buffers if buffer.kind == "kv"} == {32}
    assert [decoder.kv_layer(layer) for layer in range(6, 10)] == [5, 5, 5, 4]


def test_going_back_into_a_window_gives_the_logits_of_a_fresh_sequence(vlm: VLM) -> None:
    _, decoder = vlm._engines()
    tokens = np.random.default_rng(5).integers(300, 600, 60).tolist()
    state, fresh = decoder.new_state(), decoder.new_state()
    expected = [decoder.step(fresh, token).copy() for token in tokens]
    for token in tokens:
        decoder.step(state, token)
    for slot in (47, 41, 30, 10):  # the window has 24 positions
        state.rewind(slot)
        for place in range(slot, min(slot + 8, 60)):
            assert np.array_equal(decoder.step(state, tokens[place]), expected[place])


def test_rows_without_ids_are_refused(vlm: VLM) -> None:
    with pytest.raises(MobileVLMError, match="rows without ids"):
        vlm.embeds_logits(np.zeros((3, 48), np.float32))


def test_keys_and_values_in_8_bits_are_refused(fixture: Fixture, tmp_path: Path) -> None:
    with pytest.raises(MobileVLMError, match="read keys and values of others"):
        mobilevlm.export(fixture.checkpoint, tmp_path / "b", recipe="fp32", kv_cache="int8")


@pytest.mark.parametrize("recipe", ["int8", "fast"])
def test_rounded_recipes_answer(
    bundle_of: BundleOf, recipe: str, images: list[Image.Image]
) -> None:
    with mobilevlm.load(bundle_of("gemma4", recipe)) as vlm:
        logits = vlm.prompt_logits(PROMPT, images)
        answer = vlm.generate(PROMPT, images, max_new_tokens=8, ignore_eos=True)
    assert np.isfinite(logits).all()
    assert answer.token_ids[0] == logits[-1].argmax() and len(answer.token_ids) == 8


def test_the_table_of_layers_stays_in_its_file(bundle_of: BundleOf, fixture: Fixture) -> None:
    bundle = open_bundle(bundle_of("gemma4", "fp32"))
    table = bundle.manifest.layer_embeddings
    assert table is not None and (table.rows, table.columns) == (704, 80)
    stored = np.fromfile(bundle.path(table.path), "<f4", 704 * 80, offset=table.offset)
    expected = fixture.model.weights.read("decoder.embed_layers.weight", (704, 80))
    assert np.array_equal(stored.reshape(704, 80), expected)
    memory = estimate(bundle.manifest, Plan(engine="onnx"))
    entry = replace(bundle.manifest.files[table.path], size=5 * 10**9)
    files = {**bundle.manifest.files, table.path: entry}
    large = estimate(replace(bundle.manifest, files=files), Plan(engine="onnx"))
    assert large.own == memory.own  # a page around each row of both tables is mapped, no more
    assert large.mapped <= memory.mapped + 2 * ROWS * ROW
    parts = np.array([0, 5, 703, -1])
    with mobilevlm.load(bundle.folder) as vlm:
        rows = vlm._engines()[1].layer_rows(parts)  # type: ignore[attr-defined]
    wanted = expected[[0, 5, 703, 0]].reshape(4, 10, 8) * np.float32(8**0.5)
    assert np.array_equal(rows, wanted)  # visual tokens have the rows of the padding token


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((800, 600), (912, 672)),
        ((600, 800), (672, 912)),
        ((100, 100), (768, 768)),
        ((4000, 400), (2496, 240)),
        ((1000, 3), (13440, 48)),
    ],
)
def test_images_fill_the_visual_tokens_in_their_own_shape(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert resized(size, REAL) == expected


def test_the_fewest_and_most_visual_tokens_bound_all_shapes(fixture: Fixture) -> None:
    spec = fixture.model.spec.image
    fewest, most = (count_rows(pieces(spec)) for pieces in (fewest_pieces, most_pieces))
    random = np.random.default_rng(2)
    found = []
    for _ in range(40):
        height, width = random.integers(40, 220, 2)
        image = Image.fromarray(np.zeros((height, width, 3), np.uint8))
        found.append(count_rows(prepare(image, spec).pieces))
    assert fewest <= min(found) and max(found) <= most == 70
    with pytest.raises(ImageError, match="longer edge becomes up to 512 pixels"):
        prepare(Image.new("RGB", (900, 30)), spec)


def test_tensors_that_hear_are_named_in_a_warning(fixture: Fixture, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "checkpoint"
    shutil.copytree(fixture.checkpoint, folder)
    tensors: dict[str, NDArray[Any]] = load_file(folder / "model.safetensors")
    for name in ("audio_tower.layers.0.norm.weight", "embed_audio.embedding_projection.weight"):
        tensors[f"model.{name}"] = np.ones((4, 4), np.float32)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["audio_config"] = {"model_type": "gemma4_audio", "hidden_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(FileWarning, match=r"2 tensors .*audio_tower.*embed_audio.*without sound"):
        found = open_checkpoint(folder)
    assert found.spec == fixture.model.spec
