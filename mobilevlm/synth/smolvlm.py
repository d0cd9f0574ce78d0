"""SmolVLM-256M and 500M: published shapes, random weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mobilevlm.families.backbones import LLAMA
from mobilevlm.synth.shapes import (
    Layout,
    Part,
    Shapes,
    decoder_shapes,
    siglip_shapes,
    write_json,
)
from mobilevlm.synth.tokenizer import chat_tokenizer
from mobilevlm.tokenizers.tokenizer import save_tokenizer

_PIECES, _VOCABULARY = 49152, 49280
"""Tokens of SmolLM2, and rows of the embeddings with those of images."""
_PLACES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<global-img>", *_PLACES),
    *("<fake_token_around_image>", "<image>", "<end_of_utterance>"),
)
_TILE, _TILES, _FACTOR = 512, 4, 4
"""Edge of a tile, tiles along the longer edge, and patches along each edge of a visual token."""
_SIGLIP: dict[str, Any] = {
    "hidden_size": 768,
    "image_size": _TILE,
    "intermediate_size": 3072,
    "model_type": "smolvlm_vision",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 16,
}
_LLAMA: dict[str, Any] = {
    "bos_token_id": _PIECES + _SPECIAL.index("<|im_start|>"),
    "eos_token_id": _PIECES + _SPECIAL.index("<end_of_utterance>"),
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": False,
    "vocab_size": _VOCABULARY,
}
_SIZES: dict[str, dict[str, int]] = {
    "smolvlm_256m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
    },
    "smolvlm_500m": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_attention_heads": 15,
        "num_hidden_layers": 32,
        "num_key_value_heads": 5,
    },
}
"""Sizes of SmolLM2-135M and 360M."""
_TEMPLATE = """\
<|im_start|>
{%- for message in messages -%}
  {{- message['role'] | capitalize -}}
  {{- ':' if message['content'][0]['type'] == 'image' else ': ' -}}
  {%- for part in message['content'] -%}
    {{- '<image>' if part['type'] == 'image' else part['text'] -}}
  {%- endfor -%}
  {{- '<end_of_utterance>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""


def smolvlm(name: str) -> Layout:
    """Return the files of one of :data:`_SIZES`."""
    text = {**_LLAMA, **_SIZES[name]}
    backbone = replace(LLAMA, root="model.text_model")
    shapes: Shapes = decoder_shapes(backbone.read(Path("config.json"), text), backbone)
    shapes |= {f"model.{key}": shape for key, shape in siglip_shapes(_SIGLIP).items()}
    joined = _SIGLIP["hidden_size"] * _FACTOR**2
    shapes["model.connector.modality_projection.proj.weight"] = (text["hidden_size"], joined)
    return Layout(
        (Part("", shapes, text["num_hidden_layers"], ""),), partial(_write_settings, text)
    )


def _write_settings(text: dict[str, Any], folder: Path, name: str) -> None:
    config = {
        "_name_or_path": f"synth/{name}",
        "architectures": ["SmolVLMForConditionalGeneration"],
        "image_token_id": _PIECES + _SPECIAL.index("<image>"),
        "model_type": "smolvlm",
        "scale_factor": _FACTOR,
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": _SIGLIP,
        "vocab_size": _VOCABULARY,
    }
    write_json(folder / "config.json", config)
    processor = {
        "do_image_splitting": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "max_image_size": {"longest_edge": _TILE},
        "resample": 1,
        "size": {"longest_edge": _TILES * _TILE},
    }
    write_json(folder / "preprocessor_config.json", processor)
    tokens = (_TILE // _SIGLIP["patch_size"] // _FACTOR) ** 2
    write_json(folder / "processor_config.json", {"image_seq_len": tokens})
    write_json(folder / "chat_template.json", {"chat_template": _TEMPLATE})
    settings = {"eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "GPT2Tokenizer"})
    save_tokenizer(chat_tokenizer(_PIECES, _SPECIAL), folder / "tokenizer.json")
