"""Gemma 4 checkpoints that contradict themselves, or ask for what is not computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import message_of
from conftest import fixture_named

from mobilevlm.families import open_checkpoint

LINEAR = {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
CONFIG: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("", {"image_token_id": 10**6}, ("'image_token_id' is 1000000", "tokenizer lacks")),
    ("", {"boi_token_id": None}, ("'boi_token_id' is missing",)),
    ("text_config", {"enable_moe_block": True}, ("'enable_moe_block' is True",)),
    ("text_config", {"attention_k_eq_v": True}, ("'attention_k_eq_v' is True",)),
    ("text_config", {"use_bidirectional_attention": "vision"}, ("E2B and E4B",)),
    ("text_config", {"num_kv_shared_layers": 6}, ("'num_kv_shared_layers' is 6", "each kind")),
    ("text_config", {"num_kv_shared_layers": -1}, ("'num_kv_shared_layers' is -1",)),
    ("text_config", {"num_kv_shared_layers": 3}, ("layers.6",)),
    ("text_config", {"vocab_size_per_layer_input": 600}, ("'vocab_size_per_layer_input'",)),
    ("text_config", {"hidden_size_per_layer_input": -8}, ("'hidden_size_per_layer_input' is -8",)),
    ("text_config", {"hidden_size_per_layer_input": 0}, ("nothing reads",)),
    ("text_config", {"pad_token_id": 10**6}, ("'pad_token_id' is 1000000",)),
    ("text_config", {"use_double_wide_mlp": False}, ("layers.6.mlp", "shape")),
    ("text_config", {"global_head_dim": 16}, ("layers.4", "shape")),
    ("text_config", {"rope_parameters": LINEAR}, ("'rope_type' is 'linear'",)),
    ("vision_config", {"standardize": True}, ("'standardize' is True",)),
    ("vision_config", {"num_key_value_heads": 1}, ("'num_key_value_heads' is 1",)),
    ("vision_config", {"hidden_activation": "relu"}, ("'relu'",)),
    ("vision_config", {"use_clipped_linears": False}, ("missing",)),
    ("vision_config", {"num_hidden_layers": 2}, ("layers.2", "nothing reads")),
]
SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"do_normalize": True}, "'do_normalize' is True, expected False"),
    ({"resample": 2}, "'resample' is 2, expected 3"),
    ({"max_soft_tokens": 140}, "'image_seq_length' is 70, but 'max_soft_tokens' is 140"),
    ({"pooling_kernel_size": 2}, "'pooling_kernel_size' is 2, expected 3"),
]


def said_about(folder: Path, file: str, part: str, changes: dict[str, Any]) -> str:
    copy = Path(shutil.copytree(fixture_named("gemma4").checkpoint, folder / "copy"))
    data = json.loads((copy / file).read_text("utf-8"))
    (data[part] if part else data).update(changes)
    (copy / file).write_text(json.dumps(data), "utf-8")

    def read_all() -> None:
        model = open_checkpoint(copy)
        from mobilevlm.reference import load_reference

        load_reference(model)

    return message_of(read_all)


@pytest.mark.parametrize(("part", "changes", "parts"), CONFIG)
def test_a_wrong_configuration_is_named(
    part: str, changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    message = said_about(tmp_path, "config.json", part, changes)
    assert all(piece in message for piece in parts), message


@pytest.mark.parametrize(("changes", "told"), SETTINGS)
def test_a_wrong_setting_of_the_image_processor_is_named(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    assert told in said_about(tmp_path, "processor_config.json", "image_processor", changes)
