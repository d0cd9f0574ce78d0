"""Pairs of GGUF files that llama.cpp alone knows: answers are those of the official code within
what llama.cpp computes otherwise, and those of llama.cpp's own loop over a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA
from fuzz.gguf import ARRAY, I32, U32, decoder_file, mmproj_file
from llama import THREADS, by_llama_cpp, mtmd
from numpy.typing import NDArray
from pairs import Pair, gemma_pair, hybrid_pair, internvl_pair, qwen_vl_pair, smolvlm_pair
from PIL import Image

import mobilevlm
from mobilevlm.errors import BundleError
from mobilevlm.export.gguf.source import open_gguf
from mobilevlm.input_spec import LibraryImage
from mobilevlm.runtime import VLM

Float32 = NDArray[np.float32]
BUILDERS: dict[str, Callable[[Path], Pair]] = {
    # llama.cpp puts the class token's position last, its converter leaves it first
    "internvl35": lambda folder: internvl_pair(folder, class_last=True),
    "smolvlm2": smolvlm_pair,
}
FAMILIES = {**BUILDERS, "gemma3": gemma_pair, "qwen2vl": qwen_vl_pair, "lfm2": hybrid_pair}
NO_WAY_BACK = ("lfm2",)
"""Families whose sequences keep more than keys and values."""
LIMIT = 1e-2
"""Largest error of logits; llama.cpp's GELU is a table of float16."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in FAMILIES.items()}


@pytest.fixture(scope="module")
def models(pairs: dict[str, Pair]) -> Iterator[dict[str, VLM]]:
    loaded = {name: mobilevlm.load(m, mmproj=p, threads=THREADS) for name, (m, p) in pairs.items()}
    yield loaded
    for vlm in loaded.values():
        vlm.close()


@pytest.fixture(scope="module")
def photo() -> NDArray[np.uint8]:
    return np.asarray(Image.open(DATA / "smolvlm2" / "image.png").convert("RGB"))


def reference(name: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    folder = DATA / name
    return json.loads((folder / "expected.json").read_text()), dict(
        np.load(folder / "expected.npz")
    )


def question(told: dict[str, Any]) -> str:
    return str(told["messages"][0]["content"][1]["text"])


@pytest.mark.parametrize("name", BUILDERS)
def test_logits_and_tokens_are_those_of_the_official_code(
    name: str, models: dict[str, VLM]
) -> None:
    told, expected = reference(name)
    vlm, image = models[name], DATA / name / "image.png"
    rows = vlm.encode_image(image)
    wanted = expected["projector_output"].reshape(rows.shape)
    assert np.abs(rows - wanted).max() < LIMIT
    logits = vlm.prompt_logits(question(told), [image])
    assert logits.shape == expected["logits"][0].shape
    assert np.abs(logits - expected["logits"][0]).max() < LIMIT
    answer = vlm.generate(question(told), [image], max_new_tokens=24)
    assert answer.token_ids == expected["generated_ids"].tolist()
    assert answer.prompt_tokens == expected["input_ids"].shape[1]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "prompt", ["<image> what?", "Say: <image> or <image>, which is it?", "no image, é 123 🙂"]
)
def test_a_prompt_is_run_as_llama_cpp_runs_it(
    name: str, prompt: str, pairs: dict[str, Pair], models: dict[str, VLM], photo: NDArray[np.uint8]
) -> None:
    images = [photo, photo[:90, ::-1]][: prompt.count("<image>")]
    marked = prompt.replace("<image>", mtmd.mtmd_default_marker().decode())
    expected = by_llama_cpp(pairs[name], marked, images)
    found = models[name].prompt_logits(prompt, images, raw=True)[-1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_known_of_a_prompt_changes_nothing(
    name: str, models: dict[str, VLM], photo: NDArray[np.uint8]
) -> None:
    vlm = models[name]
    vlm.clear_caches()
    first = vlm.generate("What is it?", [photo], max_new_tokens=6, draft_tokens=0)
    other = vlm.generate("Which colour is it?", [photo], max_new_tokens=6)
    again = vlm.generate("What is it?", [photo], max_new_tokens=6)
    assert again.token_ids == first.token_ids
    assert other.reused.images == again.reused.images == 1
    assert (again.reused.tokens > 0 and other.reused.tokens > 0) == (name not in NO_WAY_BACK)
    vlm.clear_caches()
    fresh = vlm.generate("Which colour is it?", [photo], max_new_tokens=6)
    assert fresh.token_ids == other.token_ids and fresh.reused.tokens == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_goes_on_behind_its_image(
    name: str, models: dict[str, VLM], photo: NDArray[np.uint8]
) -> None:
    vlm = models[name]
    image = {"type": "image", "image": photo}
    content = [image, {"type": "text", "text": "What is it?"}]
    session = vlm.new_session()
    said: list[Any] = [{"role": "user", "content": content}]
    answer = vlm.generate(said, max_new_tokens=4, session=session)
    said += [{"role": "assistant", "content": answer.text or "It"}]
    said += [{"role": "user", "content": "And why?"}]
    going_on = vlm.generate(said, max_new_tokens=6, session=session)
    vlm.clear_caches()
    assert going_on.reused.images == 1
    assert (going_on.reused.tokens > 0) == (name not in NO_WAY_BACK)
    assert vlm.generate(said, max_new_tokens=6).token_ids == going_on.token_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_the_estimate_counts_the_rows_of_a_photo(
    name: str, models: dict[str, VLM], photo: NDArray[np.uint8]
) -> None:
    preparation = models[name].spec.image.preparation
    assert isinstance(preparation, LibraryImage)
    rows = len(models[name].encode_image(photo))
    assert preparation.fewest_rows <= rows
    assert preparation.most_rows >= 0.5 * rows


def test_images_of_llava_1_6_are_tiles_one_after_the_other(
    tmp_path: Path, photo: NDArray[np.uint8]
) -> None:
    """A CLIP tower, whose class token llama.cpp puts where its positions do not look for it: a tile
    has the visual tokens that it has as an image of LLaVA-1.5."""
    decoder, encoder = decoder_file(0).copy(), mmproj_file("mlp")
    decoder.keys = [pair for pair in decoder.keys if pair[0] != "llama.context_length"]
    decoder.add("llama.context_length", U32, 2048)
    tiled = encoder.copy()
    tiled.add("clip.vision.image_grid_pinpoints", ARRAY, [28, 56, 56, 28, 56, 56], I32)
    model, plain, mmproj = (tmp_path / f"{name}.gguf" for name in ("model", "plain", "mmproj"))
    for path, file in ((model, decoder), (plain, encoder), (mmproj, tiled)):
        path.write_bytes(file.packed())
    with mobilevlm.load(model, mmproj=mmproj) as vlm, mobilevlm.load(model, mmproj=plain) as one:
        plain_color = np.full((56, 56, 3), (200, 30, 90), np.uint8)
        tile = one.encode_image(plain_color)
        rows = vlm.encode_image(plain_color)
        assert rows.shape == (5 * len(tile), tile.shape[1])
        np.testing.assert_allclose(rows[len(tile) : 2 * len(tile)], tile, atol=1e-3)
        assert len(vlm.generate("What?", [photo], max_new_tokens=2).token_ids) == 2
    with pytest.raises(BundleError, match="images cut into tiles"):
        open_gguf(model, mmproj)


def test_positions_of_an_image_have_several_axes(models: dict[str, VLM]) -> None:
    image = models["qwen2vl"].prepare_image(np.zeros((112, 168, 3), np.uint8))
    [arrays] = image.arrays
    rows, columns = 112 // 28, 168 // 28
    places = np.indices((rows, columns)).reshape(2, -1)
    np.testing.assert_array_equal(arrays["positions"][:, 1:3], places.T)
    assert arrays["runs"].tolist() == [[max(rows, columns), 0]]


def test_rows_of_an_image_that_see_each_other_are_said_to(models: dict[str, VLM]) -> None:
    [arrays] = models["gemma3"].prepare_image(np.zeros((90, 90, 3), np.uint8)).arrays
    assert arrays["runs"][0, 1] == 1


def test_special_tokens_in_plain_text_are_words(models: dict[str, VLM]) -> None:
    vlm, text = models["smolvlm2"], "Is <end_of_utterance> the end?"
    [end] = vlm.tokenizer.encode("<end_of_utterance>").ids
    template = vlm.prompt_ids("Is it?").count(end)
    assert vlm.prompt_ids(text).count(end) == template + 1
    assert vlm.prompt_ids(text, special_tokens=False).count(end) == template
