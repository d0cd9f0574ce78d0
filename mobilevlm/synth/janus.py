"""Janus-Pro-1B in the hub's layout: published shapes, random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.families.backbones import LLAMA
from mobilevlm.families.janus_drawing import drawing_modules
from mobilevlm.output_spec import CodeDecoder, ImageOutput
from mobilevlm.synth.shapes import (
    Layout,
    Part,
    Shapes,
    decoder_shapes,
    linear,
    norm,
    siglip_shapes,
    write_json,
)
from mobilevlm.synth.tokenizer import chat_tokenizer
from mobilevlm.tokenizers.tokenizer import save_tokenizer

_SPECIAL = (
    *("<|begin|>", "<|end|>", "<|pad|>", "<|User|>", "<|Assistant|>"),
    *("<begin_of_image>", "<end_of_image>", "<image_placeholder>"),
)
_PIECES = 100_000
_IDS = {text: _PIECES + index for index, text in enumerate(_SPECIAL)}
_TEXT: dict[str, Any] = {
    "bos_token_id": _IDS["<|begin|>"],
    "eos_token_id": _IDS["<|end|>"],
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 16384,
    "model_type": "llama",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "pad_token_id": _IDS["<|pad|>"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 102400,
}
_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 1024,
    "image_size": 384,
    "mlp_ratio": 4.0,
    "model_type": "janus_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_image_tokens": 576,
    "patch_size": 16,
    "projection_dim": 2048,
}
_VQ: dict[str, Any] = {
    "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4],
    "embed_dim": 8,
    "image_token_embed_dim": 2048,
    "latent_channels": 256,
    "model_type": "janus_vqgan",
    "num_embeddings": 16384,
    "num_hidden_layers": 2,
    "num_patches": 24,
    "num_res_blocks": 2,
    "projection_dim": 2048,
}
_TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|User|>: ' if message['role'] == 'user' else '<|Assistant|>: ' -}}
  {%- for part in message['content'] -%}
    {{- '<image_placeholder>\\n' if part['type'] == 'image' else part['text'] -}}
  {%- endfor -%}
  {{- '\\n\\n' if message['role'] == 'user' else '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|>:' -}}{%- endif -%}
"""


def janus() -> Layout:
    """Return the files of Janus-Pro-1B."""
    hidden, width = _TEXT["hidden_size"], _VISION["hidden_size"]
    backbone = replace(LLAMA, root="model.language_model")
    spec = backbone.read(Path("config.json"), {**_TEXT, "tie_word_embeddings": False})
    shapes = decoder_shapes(spec, backbone)
    tower = siglip_shapes({**_VISION, "intermediate_size": 4 * width})
    post = norm("vision_model.post_layernorm", width)
    shapes |= {
        f"model.{name.replace('.out_proj.', '.projection_layer.')}": shape
        for name, shape in {**tower, **post}.items()
    }
    shapes |= linear("model.aligner.fc1", width, hidden)
    shapes |= linear("model.aligner.hidden_layers.0", hidden, hidden)
    shapes |= {f"model.{name}": shape for name, shape in _drawing_shapes(hidden).items()}
    layers = _VISION["num_hidden_layers"]
    draws = {"projection_layer.weight": (0.0, (2 * layers * width) ** -0.5)}
    return Layout((Part("", shapes, _TEXT["num_hidden_layers"], "", draws),), _write_settings)


def _drawing_shapes(hidden: int) -> Shapes:
    """The part that draws, without the encoder of images to codes, which nobody reads."""
    base = _VQ["base_channels"]
    widths = tuple(base * factor for factor in reversed(_VQ["channel_multiplier"]))
    decoder = CodeDecoder(_VQ["latent_channels"], widths, _VQ["num_res_blocks"] + 1)
    sizes = _VQ["num_embeddings"], _VQ["embed_dim"]
    output = ImageOutput(*sizes, _VQ["num_patches"], hidden, decoder, "", (), 0, ())
    return drawing_shapes(output, hidden)


def drawing_shapes(output: ImageOutput, hidden: int) -> Shapes:
    """Return the shapes of what draws beside a decoder of so many channels."""
    tables = ("generation_embeddings", "vqmodel.quantize.embedding")
    sizes = output.num_codes, output.code_size
    shapes: Shapes = {f"{name}.weight": sizes for name in tables}
    for _, name, shape in drawing_modules(output, hidden):
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _write_settings(folder: Path, name: str) -> None:
    config = {
        "_name_or_path": f"synth/{name}",
        "architectures": ["JanusForConditionalGeneration"],
        "image_token_id": _IDS["<image_placeholder>"],
        "model_type": "janus",
        "text_config": _TEXT,
        "torch_dtype": "float16",
        "vision_config": _VISION,
        "vq_config": _VQ,
    }
    write_json(folder / "config.json", config)
    ids = {key: _TEXT[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**ids, "guidance_scale": 5.0})
    write_json(folder / "preprocessor_config.json", image_settings(_VISION["image_size"]))
    settings = {"num_image_tokens": 576, "use_default_system_prompt": True}
    write_json(folder / "processor_config.json", settings)
    write_json(folder / "chat_template.json", {"chat_template": _TEMPLATE})
    named = {
        "boi_token": "<begin_of_image>",
        "bos_token": "<|begin|>",
        "eoi_token": "<end_of_image>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", named)
    save_tokenizer(chat_tokenizer(_PIECES, _SPECIAL), folder / "tokenizer.json")


def image_settings(edge: int) -> dict[str, Any]:
    """Return the official settings of images, for squares of other pixels."""
    return {
        "background_color": [127] * 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "min_size": 14,
        "resample": 3,
        "size": {"height": edge, "width": edge},
    }
