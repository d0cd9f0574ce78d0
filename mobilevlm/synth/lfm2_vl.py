"""LFM2-VL-450M and 1.6B: published shapes, random weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mobilevlm.families.lfm2 import LFM2
from mobilevlm.synth.shapes import (
    Layout,
    Part,
    decoder_shapes,
    linear,
    norm,
    siglip_shapes,
    write_json,
)
from mobilevlm.synth.tokenizer import chat_tokenizer
from mobilevlm.tokenizers.tokenizer import begin_with, save_tokenizer

_PIECES, _MOST_TILES, _FACTOR, _PROJECTOR = 64000, 10, 2, 2560
_SPECIAL = (
    *("<|pad|>", "<|startoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<|img_thumbnail|>"),
    *("<|image_start|>", "<|image_end|>"),
    *(
        f"<|img_row_{row}_col_{column}|>"
        for row in range(1, _MOST_TILES + 1)
        for column in range(1, _MOST_TILES + 1)
    ),
)
_ATTENTION = (2, 5, 8, 10, 12, 14)
_LFM2: dict[str, Any] = {
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "bos_token_id": _PIECES + _SPECIAL.index("<|startoftext|>"),
    "conv_L_cache": 3,
    "conv_bias": False,
    "eos_token_id": _PIECES + _SPECIAL.index("<|im_end|>"),
    "layer_types": ["full_attention" if index in _ATTENTION else "conv" for index in range(16)],
    "max_position_embeddings": 128000,
    "model_type": "lfm2",
    "norm_eps": 1e-5,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "tie_embedding": True,
    "vocab_size": 65536,
}
_SIGLIP: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "model_type": "siglip2_vision_model",
    "num_patches": 256,
    "patch_size": 16,
    "vision_use_head": False,
}
_SIZES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "lfm2_vl_450m": (
        {"hidden_size": 1024, "block_ff_dim": 6656, "num_attention_heads": 16},
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
         "num_hidden_layers": 12},
    ),
    "lfm2_vl_1.6b": (
        {"hidden_size": 2048, "block_ff_dim": 12288, "num_attention_heads": 32},
        {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
         "num_hidden_layers": 27},
    ),
}  # fmt: skip
"""Sizes of LFM2-350M and 1.2B, and of SigLIP 2's towers."""
_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
  {%- if message['content'] is string -%}{{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {{- '<image>' if part['type'] == 'image' else part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def lfm2_vl(name: str) -> Layout:
    """Return the files of one of :data:`_SIZES`."""
    text, vision = ({**_LFM2, **_SIZES[name][0]}, {**_SIGLIP, **_SIZES[name][1]})
    backbone = replace(LFM2, root="model.language_model")
    shapes = decoder_shapes(backbone.read(Path("config.json"), text), backbone)
    width, patch = vision["hidden_size"], vision["patch_size"]
    tower = siglip_shapes({**vision, "image_size": 16 * patch})
    tower["vision_model.embeddings.patch_embedding.weight"] = (width, 3 * patch**2)
    shapes |= {f"model.vision_tower.{key}": shape for key, shape in tower.items()}
    link, joined = "model.multi_modal_projector", width * _FACTOR**2
    shapes |= norm(f"{link}.layer_norm", joined)
    shapes |= linear(f"{link}.linear_1", joined, _PROJECTOR)
    shapes |= linear(f"{link}.linear_2", _PROJECTOR, text["hidden_size"])
    part = Part("", shapes, text["num_hidden_layers"], "")
    return Layout((part,), partial(_write_settings, text, vision))


def _write_settings(text: dict[str, Any], vision: dict[str, Any], folder: Path, name: str) -> None:
    config = {
        "_name_or_path": f"synth/{name}",
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "downsample_factor": _FACTOR,
        "image_token_id": _PIECES + _SPECIAL.index("<image>"),
        "model_type": "lfm2_vl",
        "projector_bias": True,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": _PROJECTOR,
        "text_config": text,
        "torch_dtype": "float16",
        "vision_config": vision,
    }
    write_json(folder / "config.json", config)
    processor = {
        "do_image_splitting": True,
        "downsample_factor": _FACTOR,
        "encoder_patch_size": vision["patch_size"],
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "max_image_tokens": 256,
        "max_pixels_tolerance": 2.0,
        "max_tiles": _MOST_TILES,
        "min_image_tokens": 64,
        "min_tiles": 2,
        "resample": 2,
        "tile_size": 512,
        "use_thumbnail": True,
    }
    write_json(folder / "preprocessor_config.json", processor)
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    settings = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)
    tokenizer = chat_tokenizer(_PIECES, _SPECIAL)
    begin_with(tokenizer, settings["bos_token"])
    save_tokenizer(tokenizer, folder / "tokenizer.json")
