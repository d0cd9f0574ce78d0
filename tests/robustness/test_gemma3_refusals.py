"""Gemma 3 checkpoints that are incomplete, contradict themselves, or ask for what is not computed:
one line each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import message_of
from conftest import fixture_named
from safetensors.numpy import load_file, save_file

from mobilevlm.families import open_checkpoint

ROPE5 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}
"""Rotary parameters of transformers 5; sliding layers have no factor."""
MIXED = ["sliding_attention"] * 6 + ["chunked_attention"]
CONFIG: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("", {"mm_tokens_per_image": 15}, ("'mm_tokens_per_image' is 15", "the tower's 8 patches")),
    ("", {"mm_tokens_per_image": 9}, ("'mm_tokens_per_image' is 9", "square of a divisor")),
    ("", {"image_token_index": 10**6}, ("'image_token_index' is 1000000", "tokenizer lacks")),
    ("", {"boi_token_index": None}, ("'boi_token_id' is missing",)),
    ("", {"eoi_token_index": "end"}, ("'eoi_token_index' is 'end', expected int",)),
    ("vision_config", {"model_type": "clip"}, ("'model_type' is 'clip'", "siglip_vision_model")),
    ("vision_config", {"num_channels": 1}, ("'num_channels' is 1, expected 3",)),
    ("vision_config", {"hidden_act": "relu"}, ("'relu'",)),
    ("vision_config", {"num_attention_heads": 5}, ("32", "5")),
    ("vision_config", {"num_hidden_layers": 4}, ("layers.3", "missing")),
    ("vision_config", {"num_hidden_layers": 2}, ("layers.2", "nothing reads")),
    ("text_config", {"use_bidirectional_attention": True}, ("sees the past",)),
    ("text_config", {"layer_types": MIXED}, ("'layer_types'", "'sliding_attention' for each of 7")),
    ("text_config", {"layer_types": ["full_attention"]}, ("'layer_types'", "each of 7 layers")),
    ("text_config", {"sliding_window": 0}, ("'sliding_window' is 0, expected a positive",)),
    ("text_config", {"sliding_window_pattern": 0}, ("'sliding_window_pattern' is 0",)),
    ("text_config", {"query_pre_attn_scalar": -1}, ("'query_pre_attn_scalar' is -1",)),
    ("text_config", {"hidden_activation": "relu"}, ("'relu'", "gelu_pytorch_tanh")),
    ("text_config", {"rope_local_base_freq": -1.0}, ("'rope_local_base_freq' is -1.0",)),
    ("text_config", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, ("yarn",)),
    ("text_config", {"rope_scaling": None, "rope_parameters": ROPE5}, ("are scaled: expected",)),
    ("text_config", {"attention_bias": True}, ("'attention_bias' is True",)),
    ("text_config", {"model_type": "gemma9_text"}, ("model_type 'gemma9_text'",)),
]  # fmt: skip


def copy_of(folder: Path) -> Path:
    return Path(shutil.copytree(fixture_named("gemma3").checkpoint, folder / "copy"))


def change(path: Path, part: str = "", **changes: Any) -> None:
    data = json.loads(path.read_text("utf-8"))
    (data[part] if part else data).update(changes)
    path.write_text(json.dumps(data), "utf-8")


def said_about(copy: Path) -> str:
    return message_of(lambda: open_checkpoint(copy))


@pytest.mark.parametrize(("part", "changes", "parts"), CONFIG)
def test_a_wrong_configuration_is_named(
    part: str, changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    copy = copy_of(tmp_path)
    change(copy / "config.json", part, **changes)
    message = said_about(copy)
    assert all(piece in message for piece in parts), message


@pytest.mark.parametrize(
    ("file", "changes", "told"),
    [
        ("preprocessor_config.json", {"do_pan_and_scan": True}, "'do_pan_and_scan' is True"),
        ("preprocessor_config.json", {"do_normalize": False}, "'do_normalize' is false"),
        ("preprocessor_config.json", {"resample": 3}, "'resample' is 3, expected 2 (bilinear)"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "'image_std'"),
        ("preprocessor_config.json", {"size": {"height": 56, "width": 56}}, "56"),
        ("processor_config.json", {"image_seq_length": 64}, "'image_seq_length' is 64"),
    ],
)
def test_a_wrong_processor_is_named(
    file: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    copy = copy_of(tmp_path)
    change(copy / file, **changes)
    message = said_about(copy)
    assert told in message and file in message, message


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("multi_modal_projector.mm_soft_emb_norm.weight", "is missing"),
        ("language_model.model.layers.3.pre_feedforward_layernorm.weight", "is missing"),
        ("vision_tower.vision_model.post_layernorm.weight", "is missing"),
        ("language_model.model.layers.0.self_attn.v_norm.weight", "nothing reads"),
        ("vision_tower.vision_model.extra.weight", "nothing reads"),
    ],
)
def test_a_tensor_too_few_or_too_many_is_named(name: str, told: str, tmp_path: Path) -> None:
    copy = copy_of(tmp_path)
    tensors = load_file(copy / "model.safetensors")
    if tensors.pop(name, None) is None:
        tensors[name] = next(iter(tensors.values()))
    save_file(tensors, copy / "model.safetensors")
    message = said_about(copy)
    assert name in message and told in message, message
