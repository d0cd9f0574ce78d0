"""The checkpoint of LLaVA-NeXT's fixture in the layout of LLaVA's own repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from conftest import fixture_named
from safetensors.numpy import load_file, save_file

_NAMES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.vision_model.": "model.vision_tower.vision_tower.vision_model.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "image_newline": "model.image_newline",
}


def write_own_layout(folder: Path, **changes: Any) -> Path:
    """Write the checkpoint and its tower, with other keys of config.json; return its folder."""
    hub = fixture_named("llava_next").checkpoint
    config = json.loads((hub / "config.json").read_text())
    checkpoint, tower = folder / "checkpoint", folder / "clip-tiny"
    for place in (checkpoint, tower):
        place.mkdir(parents=True)
    for path in hub.glob("tokenizer*"):
        if path.name != "tokenizer.json":
            shutil.copy(path, checkpoint)
    shutil.copy(hub / "added_tokens.json", checkpoint)
    shutil.copy(hub / "preprocessor_config.json", tower)
    (tower / "config.json").write_text(json.dumps(config["vision_config"]))
    settings = {
        **config["text_config"],
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "eos_token_id": 2,
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [edges[::-1] for edges in config["image_grid_pinpoints"]],
        "mm_hidden_size": config["vision_config"]["hidden_size"],
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "somewhere/clip-tiny",
        "tie_word_embeddings": False,
        "unfreeze_mm_vision_tower": True,
        **changes,
    }
    given = {key: value for key, value in settings.items() if value is not None}
    (checkpoint / "config.json").write_text(json.dumps(given))
    tensors = load_file(hub / "model.safetensors")
    save_file({_own_name(name): tensor for name, tensor in tensors.items()},
              checkpoint / "model.safetensors")  # fmt: skip
    return checkpoint


def _own_name(name: str) -> str:
    start = next(start for start in _NAMES if name.startswith(start))
    return _NAMES[start] + name.removeprefix(start)
