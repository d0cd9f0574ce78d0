"""InternVL checkpoints that are incomplete or contradict themselves: one line each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import message_of
from conftest import BundleOf, fixture_named, refusal
from internvl import as_original
from safetensors.torch import load_file, save_file

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.bundle_checks import check_manifest
from mobilevlm.errors import MobileVLMError
from mobilevlm.families import open_checkpoint
from mobilevlm.input_spec import AspectTiles
from mobilevlm.reference import load_reference
from mobilevlm.spec import with_image

FIXTURE = fixture_named("internvl3")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE.checkpoint, tmp_path / "copy"))


def change(path: Path, part: str = "", **changes: Any) -> None:
    """Set keys of a JSON file, or of one of its parts."""
    data = json.loads(path.read_text("utf-8"))
    (data[part] if part else data).update(changes)
    path.write_text(json.dumps(data), "utf-8")


VISION: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"use_qk_norm": True}, ("'use_qk_norm' is True, expected False",)),
    ({"norm_type": "rms_norm"}, ("'norm_type' is 'rms_norm', expected 'layer_norm'",)),
    ({"attention_bias": False}, ("'attention_bias' is False, expected True",)),
    ({"attention_bias": None}, ("'attention_bias' is False, expected True",)),
    ({"use_mean_pooling": False}, ("'use_mean_pooling' is False",)),
    ({"image_size": [56, 28]}, ("'image_size' is [56, 28], expected a square",)),
    ({"image_size": [70, 70]}, ("70 is 5 patches of 14", "a multiple of 2")),
    ({"image_size": "56"}, ("'image_size' is '56', expected int",)),
    ({"hidden_act": "silu"}, ("'hidden_act' is 'silu'",)),
    ({"num_hidden_layers": 4}, ("encoder.layer.3", "is missing")),
    ({"num_hidden_layers": 2}, ("nothing reads", "encoder.layer.2")),
    ({"hidden_size": 50}, ("'hidden_size' 50 is not a multiple",)),
]
OUTER: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"image_token_id": 10**6}, ("'image_token_id' is 1000000", "tokenizer lacks")),
    ({"downsample_ratio": 0.25}, ("'downsample_ratio' is 0.25, expected 0.5",)),
    ({"vision_feature_select_strategy": "full"}, ("'full', expected 'default'",)),
    ({"vision_feature_layer": 9}, ("'vision_feature_layer' is 9, but the tower has 3 layers",)),
    ({"projector_hidden_act": "relu"}, ("'relu', expected 'gelu'",)),
]
PROCESSOR: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"size": {"height": 448, "width": 448}}, ("'size' is 448", "56 pixels")),
    ({"min_patches": 13}, ("'min_patches' and 'max_patches' are 13 and 12",)),
    ({"max_patches": 65}, ("65, expected a range of tiles up to 64",)),
    ({"max_patches": 0}, ("'max_patches' is 0, expected a positive number",)),
    ({"resample": 2}, ("'resample' is 2, expected 3",)),
    ({"do_normalize": False}, ("'do_normalize' is false",)),
    ({"rescale_factor": 1.0}, ("'rescale_factor' is 1.0",)),
    ({"image_std": [0.2, 0.2, 0]}, ("'image_std'", "expected three numbers")),
]


@pytest.mark.parametrize(
    ("name", "part", "changes", "expected"),
    [
        *(("config.json", "vision_config", *row) for row in VISION),
        *(("config.json", "", *row) for row in OUTER),
        *(("preprocessor_config.json", "", *row) for row in PROCESSOR),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_named(
    name: str, part: str, changes: dict[str, Any], expected: tuple[str, ...], copy: Path
) -> None:
    change(copy / name, part, **changes)
    message_of(lambda: open_checkpoint(copy), str(copy), *expected)


@pytest.mark.parametrize(
    ("part", "changes", "expected"),
    [
        ("vision_config", {"qk_normalization": True}, ("'qk_normalization' is True",)),
        ("vision_config", {"qk_normalization": None}, ("'qk_normalization' is True",)),
        ("vision_config", {"norm_type": "rms_norm"}, ("'norm_type' is 'rms_norm'",)),
        ("llm_config", {"model_type": "internlm2"}, ("'llm_config' has model_type 'internlm2'",)),
        ("", {"template": "Hermes-2"}, ("template 'Hermes-2' is not supported", "internvl2_5")),
        ("", {"template": None}, ("'template' is missing",)),
        ("", {"ps_version": "v3"}, ("'ps_version' is 'v3', expected v1 or v2",)),
        ("", {"force_image_size": 448}, ("'force_image_size' is 448", "56 pixels")),
        ("", {"pad2square": True}, ("'pad2square' is True, expected False",)),
        ("", {"use_llm_lora": 16}, ("'use_llm_lora' is 16, expected 0",)),
        ("", {"max_dynamic_patch": 100}, ("100, expected a range of tiles up to 64",)),
        ("", {"select_layer": "last"}, ("'select_layer' is 'last', but the tower has 3",)),
    ],
    ids=str,
)
def test_settings_of_the_original_layout_that_do_not_fit_are_named(
    part: str, changes: dict[str, Any], expected: tuple[str, ...], tmp_path: Path
) -> None:
    folder = as_original(FIXTURE.checkpoint, tmp_path / "original")
    change(folder / "config.json", part, **changes)
    message_of(lambda: open_checkpoint(folder), str(folder), *expected)


@pytest.mark.parametrize(
    ("change_them", "expected"),
    [
        (lambda found: found.pop("vision_tower.encoder.layer.1.lambda_2"), ("lambda_2", "missing")),
        (
            lambda found: found.update({"vision_tower.encoder.layer.1.lambda_2": _zeros(found, 3)}),
            ("lambda_2", "shape [3]"),
        ),
        (lambda found: found["vision_tower.encoder.layer.0.lambda_1"].fill_(np.nan), ("finite",)),
        (lambda found: found.update(other=_zeros(found, 1)), ("nothing reads 1", "'other'")),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change_them: Callable[[dict[str, Any]], object], expected: tuple[str, ...], copy: Path
) -> None:
    tensors = load_file(copy / "model.safetensors")
    change_them(tensors)
    save_file(tensors, copy / "model.safetensors")
    message_of(lambda: load_reference(open_checkpoint(copy)), str(copy), *expected)


def _zeros(tensors: dict[str, Any], size: int) -> Any:
    return next(iter(tensors.values())).new_zeros(size)


def test_a_mark_that_the_tokenizer_lacks_is_named(copy: Path) -> None:
    change(copy / "tokenizer_config.json", start_image_token="<picture>")
    message_of(lambda: open_checkpoint(copy), "'<picture>'", "stands around images")


def test_the_command_line_says_what_is_missing(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        (copy / name).unlink()
    message = refusal(capsys, "export", copy, "-o", tmp_path / "bundle")
    assert "preprocessor_config.json: the file is missing (how images are prepared)" in message


def test_more_images_than_fit_are_counted(bundle_of: BundleOf) -> None:
    wide = np.zeros((20, 240, 3), np.uint8)
    with mobilevlm.load(bundle_of("internvl3", "fp32")) as vlm:
        each = vlm.encode_image(wide).shape[0] + 2
        assert each == 13 * 4 + 2
        count = vlm.spec.decoder.context_length // each + 1
        with pytest.raises(MobileVLMError, match=rf"of the {count} images"):
            vlm.generate("Who?", [wide] * count)
        assert vlm.encode_image(vlm.prepare_image(wide, max_tiles=1)).shape[0] == 4


def test_a_bundle_with_an_impossible_number_of_tiles_is_refused(bundle_of: BundleOf) -> None:
    manifest = open_bundle(bundle_of("internvl3", "fp32")).manifest
    image = manifest.spec.image.preparation
    assert isinstance(image, AspectTiles)
    impossible: list[dict[str, Any]] = [{"max_tiles": 10**6}, {"min_tiles": 13}, {"min_tiles": 0}]
    for changes in impossible:
        spec = with_image(manifest.spec, preparation=replace(image, **changes))
        with pytest.raises(MobileVLMError, match=r"image\.m"):
            check_manifest(replace(manifest, spec=spec), Path("manifest.json"))
