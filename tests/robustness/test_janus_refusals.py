"""Janus checkpoints that are incomplete, contradict themselves, or ask for what is not computed:
one line each; names without a leading model. are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import message_of
from conftest import fixture_named
from safetensors.numpy import load_file, save_file

from mobilevlm.families import open_checkpoint

CONFIG: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("vision_config", {"use_qk_norm": True}, ("'use_qk_norm' is True, expected False",)),
    ("vision_config", {"attention_bias": False}, ("'attention_bias' is False",)),
    ("vision_config", {"hidden_act": "relu"}, ("'hidden_act' is 'relu'",)),
    ("vision_config", {"num_image_tokens": 9}, ("'num_image_tokens' is 9", "16 patches")),
    ("vision_config", {"depth": 3}, ("aligner.hidden_layers.1", "missing")),
    ("vq_config", {"num_patches": 5}, ("'num_patches' in 'vq_config' is 5", "its square")),
    ("vq_config", {"projection_dim": 64}, ("'projection_dim'", "hidden_size 48")),
    ("vq_config", {"image_token_embed_dim": 64}, ("'image_token_embed_dim'", "hidden_size 48")),
    ("vq_config", {"base_channels": 33}, ("'base_channels'", "multiple of 32")),
    ("vq_config", {"channel_multiplier": [1, 0]}, ("'channel_multiplier'", "whole numbers")),
    ("vq_config", {"num_res_blocks": 2}, ("up.0.block.2", "missing")),
    ("vq_config", {"double_latent": True}, ("'double_latent' is True",)),
    ("vq_config", {"num_embeddings": "many"}, ("'num_embeddings' is 'many', expected int",)),
    ("", {"vq_config": None}, ("'vq_config' is missing",)),
    ("", {"image_token_id": 10**6}, ("'image_token_id' is 1000000", "tokenizer lacks")),
]
FILES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("preprocessor_config.json", {"background_color": [0, 0, 0]}, ("'background_color'", "127")),
    ("preprocessor_config.json", {"do_pad": False}, ("'do_pad' is False",)),
    ("preprocessor_config.json", {"image_mean": None}, ("'image_mean' and 'image_std'",)),
    ("preprocessor_config.json", {"size": 32}, ("'size' is 32",)),
    ("generation_config.json", {"pad_token_id": 9999}, ("'pad_token_id' is 9999", "vocabulary")),
    ("generation_config.json", {"guidance_scale": -1}, ("'guidance_scale' is -1",)),
    ("processor_config.json", {"use_default_system_prompt": 1}, ("'use_default_system_prompt'",)),
    ("tokenizer_config.json", {"boi_token": "<none>"}, ("the tokenizer lacks '<none>'",)),
]


def copy_of(folder: Path) -> Path:
    return Path(shutil.copytree(fixture_named("janus").checkpoint, folder / "copy"))


def change(path: Path, part: str = "", **changes: Any) -> None:
    data = json.loads(path.read_text("utf-8"))
    (data[part] if part else data).update(changes)
    path.write_text(json.dumps(data), "utf-8")


@pytest.mark.parametrize(("part", "changes", "parts"), CONFIG)
def test_a_wrong_configuration_is_named(
    part: str, changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    copy = copy_of(tmp_path)
    change(copy / "config.json", part, **changes)
    told = message_of(lambda: open_checkpoint(copy))
    assert all(part in told for part in parts), told


@pytest.mark.parametrize(("file", "changes", "parts"), FILES)
def test_a_wrong_setting_is_named(
    file: str, changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    copy = copy_of(tmp_path)
    change(copy / file, **changes)
    told = message_of(lambda: open_checkpoint(copy))
    assert all(part in told for part in parts), told


def test_a_missing_tensor_of_the_part_that_draws_is_named(tmp_path: Path) -> None:
    copy = copy_of(tmp_path)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.vqmodel.decoder.mid.attn_1.q.weight"]
    save_file(tensors, copy / "model.safetensors")
    assert "vqmodel.decoder.mid.attn_1.q.weight" in message_of(lambda: open_checkpoint(copy))


def test_names_without_a_leading_model_and_without_the_encoder_of_codes_are_read(
    tmp_path: Path,
) -> None:
    copy, whole = copy_of(tmp_path), open_checkpoint(fixture_named("janus").checkpoint)
    tensors = {
        name.removeprefix("model."): values.astype(np.float32)
        for name, values in load_file(copy / "model.safetensors").items()
        if "vqmodel.encoder" not in name and "quant_conv" not in name.replace("post_quant", "")
    }
    save_file(tensors, copy / "model.safetensors")
    model = open_checkpoint(copy)
    assert model.spec.drawing == whole.spec.drawing
    for name, shape in (("image_head.mlp.0.weight", (48, 48)), ("codes.embed.weight", (128, 8))):
        assert (model.weights.read(name, shape) == whole.weights.read(name, shape)).all()
