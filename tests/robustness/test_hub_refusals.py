"""Bad checkpoints of the families in the hub's layout, and too many images, through the program:
one line each that names the file or the limit, and exit code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import fixture_named, refusal

import mobilevlm

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
EVERY = ("smolvlm2", "idefics3", "internvl3", "internvl35", "llava_hf", "llava_next",
         "llava_onevision", "fast_vlm", "lfm2_vl")  # fmt: skip


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(fixture_named(name).checkpoint, folder / name))


def change(path: Path, keys: str, value: Any) -> None:
    """Set a key of a JSON file, a dot before each inner one."""
    data = json.loads(path.read_text())
    *outer, last = keys.split(".")
    inner = data
    for key in outer:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "keys", "value", "said"),
    [
        ("smolvlm2", "size", {"longest_edge": 9 * 64}, "more than 8 tiles of 64 pixels"),
        ("internvl3", "max_patches", 65, "expected a range of tiles up to 64"),
        ("internvl35", "min_patches", 13, "are 13 and 12, expected a range"),
        ("llava_next", "image_grid_pinpoints", [[56, 56 * 65]], "65 tiles"),
        ("llava_onevision", "image_grid_pinpoints", [[42, 42 * 65]], "65 tiles"),
    ],
)
def test_a_tile_layout_over_the_limit(
    name: str, keys: str, value: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(name, tmp_path)
    change(folder / PROCESSOR, keys, value)
    told = refusal(capsys, "export", folder, "-o", tmp_path / "bundle")
    assert said in told and str(folder / PROCESSOR) in told


@pytest.mark.parametrize(
    ("name", "keys", "value", "said"),
    [
        ("smolvlm2", "scale_factor", 3, "a multiple of 'scale_factor': found 8 and 3"),
        ("idefics3", "scale_factor", 5, "a multiple of 'scale_factor': found"),
        ("internvl3", "vision_config.image_size", [42, 42], "expected a multiple of 2"),
        ("internvl3", "vision_config.image_size", [56, 42], "expected a square"),
        ("llava_hf", "vision_config.patch_size", 1000, "'patch_size' 1000 is larger"),
        ("llava_next", "vision_config.image_size", 57, "but the tower takes 57 pixels"),
    ],
)
def test_a_grid_that_does_not_divide(
    name: str, keys: str, value: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(name, tmp_path)
    change(folder / CONFIG, keys, value)
    told = refusal(capsys, "export", folder, "-o", tmp_path / "bundle")
    assert said in told and str(folder) in told


@pytest.mark.parametrize("name", EVERY)
def test_a_missing_processor_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(name, tmp_path)
    for file in (PROCESSOR, "processor_config.json"):
        (folder / file).unlink(missing_ok=True)
    told = refusal(capsys, "export", folder, "-o", tmp_path / "bundle")
    assert f"{folder / PROCESSOR}: the file is missing (how images are prepared)" in told


@pytest.mark.parametrize("name", EVERY)
def test_an_image_token_that_the_tokenizer_lacks(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(name, tmp_path)
    data = json.loads((folder / CONFIG).read_text())
    key = "image_token_id" if "image_token_id" in data else "image_token_index"
    change(folder / CONFIG, key, 9999)
    told = refusal(capsys, "export", folder, "-o", tmp_path / "bundle")
    assert f"{key!r} is 9999, which the tokenizer lacks" in told and str(folder) in told


@pytest.mark.parametrize("name", EVERY)
def test_more_images_than_fit_the_context(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, image = copied(name, tmp_path), fixture_named(name).image
    change(folder / CONFIG, "text_config.max_position_embeddings", 512)
    mobilevlm.export(folder, tmp_path / "bundle", recipe="fp32", measure=False)
    many = [part for _ in range(200) for part in ("--image", image)]
    told = refusal(capsys, "run", tmp_path / "bundle", "--prompt", "What is it?", *many)
    assert "the context holds 512" in told
    assert "of the 200 images or frames would fit" in told


LAYERS = ["conv"] * 3


@pytest.mark.parametrize(
    ("file", "keys", "value", "said"),
    [
        (CONFIG, "text_config.layer_types", LAYERS, "for each of 6 layers"),
        (CONFIG, "text_config.layer_types", LAYERS * 2, "has no 'full_attention'"),
        (CONFIG, "text_config.block_use_swiglu", False, "'block_use_swiglu' is False"),
        (CONFIG, "text_config.theta", 5e5, "'theta' is 500000.0, expected 1000000.0"),
        (CONFIG, "text_config.conv_dim", 128, "'conv_dim' is 128, expected 64"),
        (CONFIG, "text_config.conv_L_cache", 4, "expected [64, 1, 4] from config.json"),
        (CONFIG, "vision_config.num_patches", 63, "'num_patches' is 63, expected a square number"),
        (CONFIG, "vision_feature_layer", -2, "'vision_feature_layer' is -2, expected -1"),
        (CONFIG, "projector_hidden_act", "silu", "'projector_hidden_act' is 'silu'"),
        (CONFIG, "projector_hidden_size", 73, "expected [73, 192] from config.json"),
        (PROCESSOR, "encoder_patch_size", 14, "'encoder_patch_size' is 14, expected 16"),
        (PROCESSOR, "downsample_factor", 4, "'downsample_factor' is 4, expected 2"),
        (PROCESSOR, "tile_size", 80, "4, 8 and 80, expected a range and a multiple of 32"),
        (PROCESSOR, "min_image_tokens", 9, "are 9, 8 and 64, expected a range"),
        (PROCESSOR, "max_tiles", 65, "expected a range of tiles up to 64"),
        (PROCESSOR, "max_tiles", 11, "the tokenizer lacks '<|img_row_1_col_11|>'"),
        (PROCESSOR, "resample", 3, "'resample' is 3, expected 2"),
    ],
)
def test_settings_of_lfm2_vl_that_are_not_supported(
    file: str, keys: str, value: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("lfm2_vl", tmp_path)
    change(folder / file, keys, value)
    told = refusal(capsys, "export", folder, "-o", tmp_path / "bundle")
    assert said in told and str(folder) in told
