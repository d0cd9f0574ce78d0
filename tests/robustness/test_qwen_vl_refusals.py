"""Qwen-VL checkpoints that are incomplete or contradict themselves: one line each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import message_of
from conftest import fixture_named

from mobilevlm.errors import ImageError
from mobilevlm.families import open_checkpoint
from mobilevlm.media.clip import Sampled, prepare_clip


def change(path: Path, part: str = "", **changes: Any) -> None:
    """Set keys of a JSON file, or of one of its parts."""
    data = json.loads(path.read_text("utf-8"))
    (data[part] if part else data).update(changes)
    path.write_text(json.dumps(data), "utf-8")


MROPE = {"type": "mrope", "mrope_section": [2, 3, 4]}
CONFIG: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("qwen2_5_vl", "", {"rope_scaling": MROPE}, ("'mrope_section' is [2, 3, 4]", "sum is 8")),
    ("qwen2_5_vl", "", {"rope_scaling": None}, ("'mrope_section' is None",)),
    ("qwen2_5_vl", "", {"image_token_id": 10**6}, ("1000000", "tokenizer lacks")),
    ("qwen2_5_vl", "vision_config", {"window_size": 20}, ("'window_size' is 20, expected 28",)),
    ("qwen2_5_vl", "vision_config", {"fullatt_block_indexes": [9]}, ("[9]", "the tower's 4")),
    ("qwen2_5_vl", "vision_config", {"num_heads": 5}, ("hidden_size 48 and 5 heads",)),
    ("qwen2_5_vl", "vision_config", {"hidden_act": "relu"}, ("'hidden_act' is 'relu'",)),
    ("qwen2_5_vl", "vision_config", {"in_chans": 1}, ("'in_chans' is 1, expected 3",)),
    ("qwen2_5_vl", "vision_config", {"depth": 3}, ("[1, 3], expected layers of the tower's 3",)),
    ("qwen3_vl", "vision_config", {"num_position_embeddings": 63}, ("63, expected a square",)),
    ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [3, 1]}, ("[3, 1]", "in order")),
    ("qwen3_vl", "vision_config", {"depth": 6}, ("blocks.5", "is missing")),
    ("qwen3_vl", "text_config", {"model_type": "qwen9"}, ("model_type 'qwen9'",)),
    ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [1, 2]}, ("nothing reads",)),
    ("qwen3_5", "text_config", {"layer_types": ["full_attention"] * 5}, ("and both kinds",)),
    ("qwen3_5", "text_config", {"layer_types": ["linear_attention"] * 4}, ("each of 5 layers",)),
    ("qwen3_5", "text_config", {"linear_num_value_heads": 3}, ("found 3, 2 and 4",)),
    ("qwen3_5", "text_config", {"linear_conv_kernel_dim": 1}, ("found 4, 2 and 1",)),
    ("qwen3_5", "text_config", {"linear_value_head_dim": 8}, ("linear_attn.conv1d.weight",)),
    ("qwen3_5", "text_config", {"attn_output_gate": False}, ("'attn_output_gate' is False",)),
    ("qwen3_5", "text_config", {"mlp_only_layers": [1]}, ("'mlp_only_layers'",)),
    (
        "qwen3_5",
        "text_config",
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        ("is [11, 11, 10]", "the rotated"),
    ),
]
PROCESSOR: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("qwen2_5_vl", {"max_pixels": 100}, ("3136 to 100 pixels", "one visual token")),
    ("qwen2_5_vl", {"patch_size": 16}, ("'patch_size' is 16, expected 14",)),
    ("qwen2_5_vl", {"merge_size": 4}, ("'merge_size' is 4, expected 2",)),
    ("qwen2_5_vl", {"resample": 2}, ("'resample' is 2, expected 3",)),
    ("qwen3_vl", {"do_rescale": False}, ("'do_rescale' is false",)),
]


def copy_of(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(fixture_named(name).checkpoint, folder / "copy"))


@pytest.mark.parametrize(("name", "part", "changes", "parts"), CONFIG)
def test_a_wrong_configuration_is_named(
    name: str, part: str, changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    copy = copy_of(name, tmp_path)
    change(copy / "config.json", part, **changes)
    message = message_of(lambda: open_checkpoint(copy))
    assert all(piece in message for piece in parts), message


@pytest.mark.parametrize(("name", "changes", "parts"), PROCESSOR)
def test_a_wrong_image_processor_is_named(
    name: str, changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    copy = copy_of(name, tmp_path)
    change(copy / "preprocessor_config.json", **changes)
    message = message_of(lambda: open_checkpoint(copy))
    assert all(piece in message for piece in parts), message


VIDEOS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"num_frames": 8}, ("'num_frames' is 8, expected 'fps'",)),
    ({"max_frames": 2}, ("'max_frames' is 2, expected 4 ('min_frames') to",)),
    ({"fps": 0}, ("'fps' is 0, expected a positive number",)),
    ({"patch_size": 14}, ("'patch_size' is 14, expected 16",)),
    ({"image_mean": [0, 0, 0]}, ("'image_mean' is [0, 0, 0], expected that of images",)),
    ({"size": {"longest_edge": 10}}, ("to 10 pixels",)),
    ({"do_resize": False}, ("'do_resize' is false",)),
]


@pytest.mark.parametrize(("changes", "parts"), VIDEOS)
@pytest.mark.parametrize("place", ["video_preprocessor_config.json", "processor_config.json"])
def test_a_wrong_video_processor_is_named(
    place: str, changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    copy = copy_of("qwen3_vl", tmp_path)
    own = copy / "video_preprocessor_config.json"
    change(own, **changes)
    if own.name != place:  # of transformers 5
        settings = json.loads(own.read_text("utf-8"))
        own.unlink()
        (copy / place).write_text(json.dumps({"video_processor": settings}), "utf-8")
    message = message_of(lambda: open_checkpoint(copy))
    assert place in message and all(piece in message for piece in parts), message


def test_a_missing_image_processor_is_named(tmp_path: Path) -> None:
    copy = copy_of("qwen3_vl", tmp_path)
    (copy / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in message_of(lambda: open_checkpoint(copy))


def test_a_clip_of_no_frames_or_several_sizes_is_refused() -> None:
    spec, sampled = fixture_named("qwen2_5_vl").model.spec.image, Sampled((0, 1), 2)
    grey = [np.full((56, width, 3), 128, np.uint8) for width in (56, 112)]
    for frames in ([], grey):
        with pytest.raises(ImageError, match="a clip needs a frame or more, all of one size"):
            prepare_clip(frames, sampled, spec)
    other = fixture_named("lfm2_vl").model.spec.image
    with pytest.raises(ImageError, match="takes no clips"):
        prepare_clip(grey, sampled, other)
