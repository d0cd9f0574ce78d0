"""Qwen2.5-VL-3B, Qwen3-VL-2B and Qwen3.5-0.8B and 2B: published shapes, random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mobilevlm.families.backbones import Backbone
from mobilevlm.families.qwen3_5 import QWEN3_5
from mobilevlm.families.qwen_gemma import QWEN2_VL, QWEN3_VL
from mobilevlm.families.towers import CLIP_MEAN, CLIP_STD
from mobilevlm.synth.qwen2 import QWEN2_PIECES, write_qwen2_tokenizer
from mobilevlm.synth.shapes import Layout, Part, Shapes, decoder_shapes, linear, norm, write_json

_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
_TEXT: dict[str, Any] = {
    "bos_token_id": QWEN2_PIECES,
    "eos_token_id": QWEN2_PIECES + 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
}
_QWEN25: dict[str, Any] = {
    **_TEXT,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
    "rope_theta": 1e6,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
_QWEN3: dict[str, Any] = {
    **_TEXT,
    "attention_bias": False,
    "head_dim": 128,
    "intermediate_size": 6144,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text",
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"
    },
    "rope_theta": 5e6,
    "tie_word_embeddings": True,
}  # fmt: skip
_QWEN35: dict[str, Any] = {
    **_TEXT,
    "attention_bias": False,
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "head_dim": 256,
    "intermediate_size": 6144,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_5_text",
    "num_attention_heads": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
        "rope_theta": 1e7, "rope_type": "default",
    },
    "tie_word_embeddings": True,
    "vocab_size": 248320,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "num_heads": 16,
    "out_hidden_size": _TEXT["hidden_size"],
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_VISION25: dict[str, Any] = {
    **_VISION,
    "depth": 32,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu",
    "hidden_size": 1280,
    "in_chans": 3,
    "intermediate_size": 3420,
    "patch_size": 14,
    "spatial_patch_size": 14,
    "tokens_per_second": 2,
    "window_size": 112,
}
_VISION3: dict[str, Any] = {
    **_VISION,
    "deepstack_visual_indexes": [5, 11, 17],
    "depth": 24,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1024,
    "in_channels": 3,
    "intermediate_size": 4096,
    "model_type": "qwen3_vl",
    "num_position_embeddings": 2304,
    "patch_size": 16,
}
_VISION35: dict[str, Any] = {
    **_VISION3,
    "deepstack_visual_indexes": [],
    "model_type": "qwen3_5",
}
_QWEN35_SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_5_0.8b": (
        {"hidden_size": 1024, "intermediate_size": 3584},
        {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12,
         "out_hidden_size": 1024},
    ),
    "qwen3_5_2b": ({}, {}),
}  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "language_model.norm")
"""Norms that multiply by one more than their weights."""
_SYSTEM = "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n"
_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}{{- 'SYSTEM' -}}{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
  {%- if message['content'] is string -%}{{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {{- '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image'
        else part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def qwen25_vl() -> Layout:
    """Return the files of Qwen2.5-VL-3B."""
    shapes = decoder_shapes(QWEN2_VL.read(Path("config.json"), _QWEN25), QWEN2_VL)
    shapes |= _tower_shapes("visual", _VISION25, ("gate_proj", "up_proj"), "down_proj")
    settings = {"min_pixels": 56**2, "max_pixels": 16384 * 28**2}
    config = {
        **_QWEN25,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vision_config": _VISION25,
    }
    return Layout(
        (Part("", shapes, _QWEN25["num_hidden_layers"], ""),),
        partial(_write_settings, config, settings, _SYSTEM),
    )


def qwen3_vl() -> Layout:
    """Return the files of Qwen3-VL-2B."""
    return _third("Qwen3VL", QWEN3_VL, _QWEN3, _VISION3)


def qwen35(name: str) -> Layout:
    """Return the files of a Qwen3.5."""
    text, vision = _QWEN35_SIZES[name]
    draws = {f"{norm}.weight": (0.0, 0.0) for norm in _NORMS}
    draws |= {"A_log": (1.0, 1.0), "dt_bias": (1.0, 0.5)}
    draws["conv1d.weight"] = (0.0, _QWEN35["linear_conv_kernel_dim"] ** -0.5)
    return _third("Qwen3_5", QWEN3_5, {**_QWEN35, **text}, {**_VISION35, **vision}, draws)


def _third(
    architecture: str,
    backbone: Backbone,
    text: dict[str, Any],
    vision: dict[str, Any],
    draws: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> Layout:
    """Return the files of a model with the third tower."""
    backbone = replace(backbone, root="model.language_model")
    shapes = decoder_shapes(backbone.read(Path("config.json"), text), backbone)
    shapes |= _tower_shapes("model.visual", vision, ("linear_fc1",), "linear_fc2")
    settings = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}}
    config = {
        "architectures": [f"{architecture}ForConditionalGeneration"],
        "model_type": vision["model_type"],
        "text_config": text,
        "tie_word_embeddings": True,
        "vision_config": vision,
    }
    outputs = {
        name: (0.0, shape[1] ** -0.5)  # which is not added to the tower's stream
        for name, shape in shapes.items()
        if "merger" in name and name.endswith("linear_fc2.weight")
    }
    return Layout(
        (Part("", shapes, text["num_hidden_layers"], "", {**outputs, **draws}),),
        partial(_write_settings, config, settings, ""),
    )


def _tower_shapes(root: str, config: dict[str, Any], readers: Sequence[str], maker: str) -> Shapes:
    """Return the tensors of a tower and its mergers. ``readers``, ``maker``: linear layers of an
    MLP."""
    width, wide, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    is_third = "deepstack_visual_indexes" in config
    shapes: Shapes = {
        f"{root}.patch_embed.proj.weight": (width, 3, config["temporal_patch_size"], patch, patch)
    }
    if is_third:
        shapes[f"{root}.patch_embed.proj.bias"] = (width,)
        shapes[f"{root}.pos_embed.weight"] = (config["num_position_embeddings"], width)
    for index in range(config["depth"]):
        layer = f"{root}.blocks.{index}"
        for name in ("norm1", "norm2"):
            shapes |= _norm(f"{layer}.{name}", width, is_third)
        shapes |= linear(f"{layer}.attn.qkv", width, 3 * width)
        shapes |= linear(f"{layer}.attn.proj", width, width)
        for name in readers:
            shapes |= linear(f"{layer}.mlp.{name}", width, wide)
        shapes |= linear(f"{layer}.mlp.{maker}", wide, width)
    joined = width * config["spatial_merge_size"] ** 2
    names = ("norm", "linear_fc1", "linear_fc2") if is_third else ("ln_q", "mlp.0", "mlp.2")
    mergers = {f"{root}.merger": width} | {
        f"{root}.deepstack_merger_list.{index}": joined
        for index in range(len(config.get("deepstack_visual_indexes", ())))
    }
    for merger, normed in mergers.items():
        first, second, third = (f"{merger}.{name}" for name in names)
        shapes |= _norm(first, normed, is_third) | linear(second, joined, joined)
        shapes |= linear(third, joined, config["out_hidden_size"])
    return shapes


def _norm(name: str, size: int, biased: bool) -> Shapes:
    return norm(name, size) if biased else {f"{name}.weight": (size,)}


def _write_settings(
    config: dict[str, Any], settings: dict[str, Any], system: str, folder: Path, name: str
) -> None:
    ids = {
        f"{kind}_token_id": QWEN2_PIECES + _SPECIAL.index(f"<|{text}|>")
        for kind, text in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    data = {"_name_or_path": f"synth/{name}", "torch_dtype": "float16", **config, **ids}
    write_json(folder / "config.json", data)
    vision, is_third = config["vision_config"], "text_config" in config
    processor = {
        "image_mean": [0.5] * 3 if is_third else list(CLIP_MEAN),
        "image_std": [0.5] * 3 if is_third else list(CLIP_STD),
        "merge_size": vision["spatial_merge_size"],
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
    }
    write_json(folder / "preprocessor_config.json", {**processor, **settings})
    if is_third:
        size = {"longest_edge": 25165824, "shortest_edge": 4096}
        write_json(folder / "video_preprocessor_config.json", {**processor, "size": size})
    template = _TEMPLATE.replace("SYSTEM", system)
    write_json(folder / "chat_template.json", {"chat_template": template})
    write_qwen2_tokenizer(folder, _SPECIAL)
