"""InternVL3.5-1B in the hub's layout: published shapes, random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.families.intern_vit import FACTOR, HUB
from mobilevlm.families.internvl import IMAGENET_MEAN, IMAGENET_STD
from mobilevlm.families.qwen_gemma import QWEN3
from mobilevlm.synth.shapes import Layout, Part, Shapes, decoder_shapes, linear, norm, write_json
from mobilevlm.synth.tokenizer import chat_tokenizer
from mobilevlm.tokenizers.tokenizer import save_tokenizer

_PIECES = 151643
"""Pieces of Qwen3's tokenizer, without the special ones."""
_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|special_{index}|>" for index in range(23)),
    *("<img>", "</img>", "<IMG_CONTEXT>"),
)
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": _PIECES,
    "eos_token_id": _PIECES + 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_VISION: dict[str, Any] = {
    "attention_bias": True,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "image_size": [448, 448],
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-6,
    "model_type": "internvl_vision",
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": [14, 14],
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
    "use_qk_norm": False,
}
_TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
  {%- if message['content'] is string -%}{{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {{- '<IMG_CONTEXT>\\n' if part['type'] == 'image' else part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def internvl() -> Layout:
    """Return the files of InternVL3.5-1B."""
    depth, hidden, width = (
        _QWEN3["num_hidden_layers"],
        _QWEN3["hidden_size"],
        _VISION["hidden_size"],
    )
    backbone = replace(QWEN3, root="language_model.model", lm_head="language_model.lm_head")
    shapes = decoder_shapes(backbone.read(Path("config.json"), _QWEN3), backbone)
    link, joined = HUB.connectors[0], FACTOR**2 * width
    shapes |= norm(f"{link}{HUB.links['norm']}", joined)
    shapes |= linear(f"{link}{HUB.links['mlp.0']}", joined, hidden)
    shapes |= linear(f"{link}{HUB.links['mlp.1']}", hidden, hidden)
    return Layout((Part("", shapes | _tower_shapes(), depth, ""),), _write_settings)


def _tower_shapes() -> Shapes:
    root, width, patch = HUB.towers[0], _VISION["hidden_size"], _VISION["patch_size"][0]
    grid, wide = _VISION["image_size"][0] // patch, _VISION["intermediate_size"]
    shapes: Shapes = {
        f"{root}{HUB.class_token}": (1, 1, width),
        f"{root}{HUB.positions}": (1, grid * grid + 1, width),
        f"{root}{HUB.patches}.weight": (width, 3, patch, patch),
        f"{root}{HUB.patches}.bias": (width,),
    }
    for index in range(_VISION["num_hidden_layers"]):
        layer = f"{root}{HUB.layers}.{index}."
        for ours, theirs in HUB.parts.items():
            if ours.startswith("norm"):
                shapes |= norm(layer + theirs, width)
            else:
                sizes = {"mlp.fc1": (width, wide), "mlp.fc2": (wide, width)}
                shapes |= linear(layer + theirs, *sizes.get(ours, (width, width)))
        shapes |= {layer + scale: (width,) for scale in HUB.scales.values()}
    return shapes


def _write_settings(folder: Path, name: str) -> None:
    grid = _VISION["image_size"][0] // _VISION["patch_size"][0]
    config = {
        "_name_or_path": f"synth/{name}",
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 1 / FACTOR,
        "dtype": "float16",
        "image_seq_length": (grid // FACTOR) ** 2,
        "image_token_id": _PIECES + _SPECIAL.index("<IMG_CONTEXT>"),
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": _QWEN3,
        "tie_word_embeddings": False,
        "vision_config": _VISION,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
    write_json(folder / "config.json", config)
    height, across = _VISION["image_size"]
    processor = {
        "crop_to_patches": False,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "max_patches": 12,
        "min_patches": 1,
        "resample": 3,
        "size": {"height": height, "width": across},
    }
    write_json(folder / "preprocessor_config.json", processor)
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "Qwen2Tokenizer"})
    save_tokenizer(chat_tokenizer(_PIECES, _SPECIAL), folder / "tokenizer.json")
