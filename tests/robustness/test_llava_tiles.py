"""LLaVA-NeXT and LLaVA-OneVision checkpoints that are incomplete or contradict themselves, and
images that do not fit: one line each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import message_of
from conftest import BundleOf, fixture_named, refusal
from llava import write_own_layout
from safetensors.numpy import load_file, save_file

import mobilevlm
from mobilevlm.errors import ImageError, PromptError
from mobilevlm.families import open_checkpoint

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
PINPOINTS = "image_grid_pinpoints"


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(fixture_named(name).checkpoint, folder / name))


def change(path: Path, changes: dict[str, Any]) -> None:
    """Set keys of a JSON file; ``None`` removes one."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


BAD: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("llava_next", PROCESSOR, {PINPOINTS: [[56, 100]]}, ("[56, 100]", "multiples of a tile's 56")),
    ("llava_next", PROCESSOR, {PINPOINTS: [[56, 56 * 65]]}, ("65 tiles", "at most 64")),
    ("llava_next", PROCESSOR, {PINPOINTS: [[56, -56]]}, ("[56, -56]", "two numbers of pixels")),
    ("llava_next", PROCESSOR, {PINPOINTS: [[56, True]]}, ("two numbers of pixels",)),
    ("llava_next", PROCESSOR, {PINPOINTS: []}, ("expected a list of 1 to 1000 sizes",)),
    ("llava_next", PROCESSOR, {PINPOINTS: [[56, 56]] * 1001}, ("a list of 1 to 1000 sizes",)),
    ("llava_next", PROCESSOR, {PINPOINTS: [[56, 56]]}, (PINPOINTS, "not that of config.json")),
    ("llava_next", PROCESSOR, {"size": {"shortest_edge": 84}}, ("'size' is 84", "tile's 56")),
    ("llava_next", PROCESSOR, {"do_rescale": False}, ("'do_rescale' is false",)),
    ("llava_next", PROCESSOR, {"rescale_factor": 1.0}, ("'rescale_factor' is 1.0", "1 / 255")),
    ("llava_next", PROCESSOR, {"resample": 1}, ("'resample' is 1", "bicubic")),
    ("llava_next", CONFIG, {"image_token_index": 700}, ("700", "the tokenizer lacks")),
    ("llava_next", CONFIG, {"projector_hidden_act": "relu"}, ("'relu', expected 'gelu'",)),
    ("llava_next", CONFIG, {"vision_feature_select_strategy": "full"}, ("'full'", "'default'")),
    ("llava_next", CONFIG, {"vision_feature_layer": [-2, -3]}, ("[-2, -3]", "3 layers")),
    ("llava_onevision", CONFIG, {"vision_aspect_ratio": "pad"}, ("'pad'", "'anyres_max_9'")),
    ("llava_onevision", CONFIG, {"vision_aspect_ratio": "anyres_max_0"}, ("'anyres_max_0'",)),
    ("llava_onevision", CONFIG, {"vision_feature_select_strategy": "default"}, ("'full'",)),
    ("llava_onevision", PROCESSOR, {"size": {"height": 42, "width": 43}}, ("a square",)),
]


@pytest.mark.parametrize(("name", "file", "changes", "expected"), BAD)
def test_a_wrong_setting_is_named(
    name: str, file: str, changes: dict[str, Any], expected: tuple[str, ...], tmp_path: Path
) -> None:
    folder = copied(name, tmp_path)
    change(folder / file, changes)
    message_of(lambda: open_checkpoint(folder), *expected)


def test_sizes_that_no_file_has_are_missed(tmp_path: Path) -> None:
    folder = copied("llava_next", tmp_path)
    for name in (CONFIG, PROCESSOR):
        change(folder / name, {PINPOINTS: None})
    message_of(lambda: open_checkpoint(folder), PINPOINTS, "is missing")


def test_a_missing_processor_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("llava_onevision", tmp_path)
    (folder / PROCESSOR).unlink()
    told = refusal(capsys, "export", folder, "-o", tmp_path / "bundle")
    assert PROCESSOR in told


def test_a_missing_newline_is_named(tmp_path: Path) -> None:
    folder = copied("llava_next", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["image_newline"]
    save_file(tensors, folder / "model.safetensors")
    message_of(lambda: open_checkpoint(folder), "image_newline")


OWN: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"mm_patch_merge_type": "flat"}, ("'flat'", "'spatial_unpad'")),
    ({"mm_patch_merge_type": None}, ("'flat'", "'spatial_unpad'")),
    ({"image_aspect_ratio": "anyres_max_9"}, ("'anyres_max_9'", "'anyres', 'pad' or 'square'")),
    ({PINPOINTS: "[(56, 100)]"}, ("[56, 100]", "multiples of a tile's 56")),
    ({PINPOINTS: "(1x1),...,(6x6)"}, ("(1x1)", "expected a list")),
    ({PINPOINTS: "[" * 70_000}, ("expected a list",)),
    ({PINPOINTS: None}, ("expected a list",)),
]


@pytest.mark.parametrize(("changes", "expected"), OWN)
def test_a_wrong_setting_of_llavas_own_layout_is_named(
    changes: dict[str, Any], expected: tuple[str, ...], tmp_path: Path
) -> None:
    folder = write_own_layout(tmp_path, **changes)
    message_of(lambda: open_checkpoint(folder), *expected)


def test_more_images_than_fit_are_refused_with_the_number_that_fits(bundle_of: BundleOf) -> None:
    fixture = fixture_named("llava_next")
    with mobilevlm.load(bundle_of("llava_next", "fp32")) as vlm:
        room = vlm.spec.decoder.context_length
        with pytest.raises(PromptError) as caught:
            vlm.generate("What is it?", [fixture.image] * (room // 16))
        assert "would fit" in str(caught.value) and "\n" not in str(caught.value)


def test_an_image_in_tiles_is_refused_beside_others(bundle_of: BundleOf) -> None:
    fixture = fixture_named("llava_onevision_multi")
    with mobilevlm.load(bundle_of("llava_onevision", "fp32")) as vlm:
        alone = vlm.prepare_image(fixture.images[0])
        with pytest.raises(ImageError, match="prepare it with images=2"):
            vlm.generate("What is it?", [alone, fixture.images[1]])
        pair = [vlm.prepare_image(image, images=2) for image in fixture.images]
        found = vlm.prompt_logits(fixture.prompt, pair)
        assert found.shape == fixture.logits.shape
