"""FastVLM checkpoints that are incomplete or contradict themselves: one line each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import message_of
from conftest import fixture_named, refusal
from fastvlm import write_apple
from safetensors.numpy import load_file, save_file

from mobilevlm.families import open_checkpoint
from mobilevlm.reference.model import ReferenceModel

FIXTURE = fixture_named("fast_vlm")
TOWER = "model.vision_tower.timm_model"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE.checkpoint, tmp_path / "copy"))


def change(path: Path, part: str = "", **changes: Any) -> None:
    """Set keys of a JSON file, or of one of its parts."""
    data = json.loads(path.read_text())
    target = data
    for name in part.split(".") if part else ():
        target = target[name]
    target.update(changes)
    path.write_text(json.dumps(data))


def read_everything(folder: Path) -> None:
    model = open_checkpoint(folder)
    with torch.device("meta"):
        reference = ReferenceModel(model.spec)
    for name, parameter in reference.named_parameters():
        model.weights.read(name, tuple(parameter.shape))


def change_tensors(folder: Path, change_them: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change_them(tensors)
    save_file(tensors, folder / "model.safetensors")


VISION: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"architecture": "fastvit_t8"}, ("'fastvit_t8' is not known", "fastvit_mci3")),
    ({"architecture": None}, ("'architecture' is missing",)),
    ({"model_type": "clip_vision_model"}, ("'clip_vision_model', expected 'timm_wrapper'",)),
    ({"hidden_size": 3072}, ("256 channels", "3072")),
    ({"model_args": [8]}, ("'model_args'", "expected dict")),
]
ARGUMENTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"embed_dims": [8, 16, 32, 64]}, ("'embed_dims'", "expected 5 numbers")),
    ({"embed_dims": [8, 16, 32, 64, 0]}, ("'embed_dims'", "expected 5 numbers")),
    ({"embed_dims": [8, 16, 40, 64, 128]}, ("40 after 16", "a multiple of it")),
    ({"embed_dims": [8, 16, 16, 48, 96]}, ("48 after 16", "of 32")),
    ({"layers": [1, 2, 2, 1, 10**9]}, ("'layers'", "up to 1024")),
    ({"layers": [1, 2, 3, 1, 1]}, ("stages.2.blocks.2", "is missing")),
    ({"mlp_ratios": [2, 2, 2, 2, 2.5]}, ("'mlp_ratios'", "expected 5 numbers")),
    ({"fork_feat": True}, ("'model_args' has 'fork_feat'", "embed_dims")),
    ({"inference_mode": False}, ("'inference_mode' is False", "fused")),
]
OUTER: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"image_token_index": 700}, ("'image_token_index' is 700", "tokenizer lacks")),
    ({"vision_feature_select_strategy": "default"}, ("'default', expected 'full'",)),
    ({"vision_feature_layer": -2}, ("-2, expected -1",)),
    ({"projector_hidden_act": "relu"}, ("'relu', expected 'gelu'",)),
    ({"multimodal_projector_bias": False}, ("False, expected True",)),
]


@pytest.mark.parametrize(
    ("part", "changes", "expected"),
    [
        *(("vision_config", *row) for row in VISION),
        *(("vision_config.model_args", *row) for row in ARGUMENTS),
        *(("", *row) for row in OUTER),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_named(
    part: str, changes: dict[str, Any], expected: tuple[str, ...], copy: Path
) -> None:
    change(copy / "config.json", part, **changes)
    message_of(lambda: open_checkpoint(copy), str(copy), *expected)


def test_an_image_size_that_the_stride_does_not_divide_is_named(copy: Path) -> None:
    size = {"height": 200, "width": 200}
    change(copy / "preprocessor_config.json", crop_size=size, size={"shortest_edge": 200})
    message_of(lambda: open_checkpoint(copy), "multiple of the tower's stride: found 200 and 64")


def test_the_command_line_says_what_is_missing(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    (copy / "preprocessor_config.json").rename(tmp_path / "kept.json")
    message = refusal(capsys, "export", copy, "-o", bundle)
    assert "preprocessor_config.json: the file is missing (how images are prepared)" in message
    (tmp_path / "kept.json").rename(copy / "preprocessor_config.json")
    for name in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json"):
        text = (copy / name).read_text()
        (copy / name).write_text(text.replace('"<image>"', '"<picture>"'))
    message = refusal(capsys, "export", copy, "-o", bundle)
    assert "chat template writes '<picture>' 0 times" in message
    change(copy / "config.json", "vision_config", architecture="fastvit_t8")
    assert "'fastvit_t8' is not known" in refusal(capsys, "export", copy, "-o", bundle)
    assert not bundle.exists()


def test_a_missing_part_of_a_layer_is_named(copy: Path) -> None:
    name = f"{TOWER}.stages.1.blocks.0.mlp.conv.bn.running_var"
    change_tensors(copy, lambda tensors: tensors.pop(name))
    message_of(lambda: open_checkpoint(copy), repr(name), "is missing")


def test_a_tensor_that_nobody_reads_is_named(copy: Path) -> None:
    name = f"{TOWER}.stages.1.blocks.7.mlp.fc1.weight"
    change_tensors(copy, lambda tensors: tensors.update({name: np.ones((2, 2), np.float16)}))
    message_of(lambda: open_checkpoint(copy), repr(name), "nothing reads 1")


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("stem.0.reparam_conv.weight", (8, 3, 5, 5)),
        ("stem.1.reparam_conv.weight", (8, 1, 2, 2)),
        ("stages.0.blocks.0.mlp.conv.conv.weight", (8, 1, 9, 9)),
        ("stages.0.blocks.0.mlp.conv.bn.running_mean", (16,)),
        ("stages.0.blocks.0.layer_scale.gamma", (8, 2, 1)),
        ("stages.0.blocks.0.mlp.fc1.weight", (16,)),
        ("stages.3.blocks.0.token_mixer.qkv.weight", (64, 64)),
    ],
)
def test_a_tensor_of_another_shape_is_named(part: str, shape: tuple[int, ...], copy: Path) -> None:
    name = f"{TOWER}.{part}"
    change_tensors(copy, lambda tensors: tensors.update({name: np.ones(shape, np.float16)}))
    message_of(lambda: read_everything(copy), repr(name), f"shape {list(shape)}", "config.json")


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_statistics_that_are_no_variance_are_refused(value: float, copy: Path) -> None:
    name = f"{TOWER}.stages.1.blocks.0.mlp.conv.bn.running_var"
    change_tensors(copy, lambda tensors: tensors[name].__setitem__(0, value))
    message_of(lambda: read_everything(copy), "stages.1.blocks.0.mlp.conv", "not finite")


def test_integers_in_place_of_weights_are_refused(copy: Path) -> None:
    name = f"{TOWER}.stages.1.blocks.0.mlp.fc1.weight"
    change_tensors(copy, lambda tensors: tensors.update({name: tensors[name].astype(np.int8)}))
    message_of(lambda: read_everything(copy), "stored as i8", "expected floats")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mm_vision_tower": "openai/clip-vit-large-patch14"}, ("mobileclip_l_1024",)),
        ({"mm_vision_tower": "mobileclip_l_200"}, ("stride: found 200 and 64",)),
        ({"mm_vision_tower": None}, ("'mm_vision_tower' is missing",)),
        ({"mm_use_im_start_end": True}, ("'mm_use_im_start_end' is True",)),
        ({"mm_hidden_size": 3072}, ("256 channels", "3072")),
        ({"image_aspect_ratio": "anyres"}, ("'anyres'", "'pad'")),
        ({"mm_projector_type": "ldpnet"}, ("'ldpnet' is not known",)),
        ({"vision_config": {"model_args": 3}}, ("'model_args'", "expected dict")),
    ],
    ids=str,
)
def test_apples_layout_that_does_not_fit_is_named(
    changes: dict[str, Any], expected: tuple[str, ...], tmp_path: Path
) -> None:
    folder = write_apple(FIXTURE, tmp_path / "apple", True, **changes)
    message_of(lambda: open_checkpoint(folder), str(folder), *expected)


def test_apples_layout_without_a_chat_template_is_named(tmp_path: Path) -> None:
    folder = write_apple(FIXTURE, tmp_path / "apple", True)
    change(folder / "tokenizer_config.json", chat_template=None)
    message_of(lambda: open_checkpoint(folder), "no chat template")
