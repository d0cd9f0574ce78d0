"""LLaVA-OneVision-0.5B in the hub's layout: published shapes, random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.families.qwen_gemma import QWEN2
from mobilevlm.synth.qwen2 import QWEN2_05B, QWEN2_PIECES, write_qwen2_tokenizer
from mobilevlm.synth.shapes import (
    Layout,
    Part,
    decoder_shapes,
    linear,
    siglip_shapes,
    write_json,
)

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
_QWEN2 = {**QWEN2_05B, "tie_word_embeddings": True}
_SIGLIP: dict[str, Any] = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}
_TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message['role'] ~ ' ' -}}
  {%- if message['content'] is string -%}{{- '\\n' ~ message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}
      {{- '\\n' ~ part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def llava_onevision() -> Layout:
    """Return the files of LLaVA-OneVision-0.5B."""
    hidden = _QWEN2["hidden_size"]
    backbone = replace(QWEN2, root="language_model.model", lm_head="language_model.lm_head")
    shapes = decoder_shapes(backbone.read(Path("config.json"), _QWEN2), backbone)
    shapes |= {f"vision_tower.{name}": shape for name, shape in siglip_shapes(_SIGLIP).items()}
    shapes |= linear("multi_modal_projector.linear_1", _SIGLIP["hidden_size"], hidden)
    shapes |= linear("multi_modal_projector.linear_2", hidden, hidden)
    shapes["image_newline"] = (hidden,)
    return Layout((Part("", shapes, _QWEN2["num_hidden_layers"], ""),), _write_settings)


def _write_settings(folder: Path, name: str) -> None:
    edge = _SIGLIP["image_size"]
    sizes = [[rows * edge, columns * edge] for rows in range(1, 7) for columns in range(1, 7)]
    config = {
        "_name_or_path": f"synth/{name}",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_grid_pinpoints": sizes,
        "image_token_index": QWEN2_PIECES + _SPECIAL.index("<image>"),
        "model_type": "llava_onevision",
        "projector_hidden_act": "gelu",
        "text_config": _QWEN2,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": _SIGLIP,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    write_json(folder / "config.json", config)
    processor = {
        "image_grid_pinpoints": sizes,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "size": {"height": edge, "width": edge},
    }
    write_json(folder / "preprocessor_config.json", processor)
    write_json(folder / "chat_template.json", {"chat_template": _TEMPLATE})
    write_qwen2_tokenizer(folder, _SPECIAL)
