"""InternVL's checkpoints of the hub's layout in OpenGVLab's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ORIGINAL = [
    (r"vision_tower\.embeddings\.cls_token", "vision_model.embeddings.class_embedding"),
    (
        r"vision_tower\.embeddings\.position_embeddings",
        "vision_model.embeddings.position_embedding",
    ),
    (
        r"vision_tower\.embeddings\.patch_embeddings\.projection",
        "vision_model.embeddings.patch_embedding",
    ),
    (r"vision_tower\.encoder\.layer\.(\d+)\.", r"vision_model.encoder.layers.\1."),
    (r"attention\.projection_layer", "attn.proj"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"lambda_(\d)", r"ls\1"),
    (r"multi_modal_projector\.layer_norm", "mlp1.0"),
    (r"multi_modal_projector\.linear_1", "mlp1.1"),
    (r"multi_modal_projector\.linear_2", "mlp1.3"),
]
"""The hub's names and OpenGVLab's."""
Tensors = dict[str, torch.Tensor]


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def as_original(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint of the hub's layout in OpenGVLab's."""
    shutil.copytree(source, folder)
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    (folder / "tokenizer.json").unlink()
    config = read_json(source / "config.json")
    tower = config["vision_config"]
    tower |= {"qkv_bias": True, "qk_normalization": False, "model_type": "intern_vit_6b"}
    for key in ("attention_bias", "use_qk_norm", "use_mean_pooling"):
        del tower[key]
    tower |= {"image_size": tower["image_size"][0], "patch_size": tower["patch_size"][0]}
    outer = {
        "model_type": "internvl_chat",
        "llm_config": {**config["text_config"], "tie_word_embeddings": False},
        "vision_config": tower,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": tower["image_size"],
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "tie_word_embeddings": True,  # of the outer class, which reads it nowhere
    }
    (folder / "config.json").write_text(json.dumps(outer))
    tensors: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for pattern, other in ORIGINAL:
            name = re.sub(pattern, other, name)
        tensors[name] = tensor
    for place in {name.split("attention.")[0] for name in tensors if "attention.q_proj" in name}:
        for part in ("weight", "bias"):
            rows = [tensors.pop(f"{place}attention.{letter}_proj.{part}") for letter in "qkv"]
            tensors[f"{place}attn.qkv.{part}"] = torch.cat(rows)
    save_file(tensors, folder / "model.safetensors")
    return folder
