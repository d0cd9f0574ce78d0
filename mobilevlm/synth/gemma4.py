"""Gemma 4 E2B without its sound encoder: published shapes, random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.families.gemma4_text import GEMMA4
from mobilevlm.families.qwen_gemma import FULL, SLIDING
from mobilevlm.image_encoder import BOUNDS
from mobilevlm.synth.gemma3 import turns_template
from mobilevlm.synth.shapes import Layout, Part, Shapes, decoder_shapes, write_json
from mobilevlm.synth.tokenizer import chat_tokenizer
from mobilevlm.tokenizers.tokenizer import save_tokenizer

_SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>"),
    *("<|image>", "<image|>", "<|image|>"),
)
_PIECES = 262144 - len(_SPECIAL)
_TOKENS, _LAYERS = 280, 35
_TEXT: dict[str, Any] = {
    "final_logit_softcapping": 30.0,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "layer_types": [FULL if index % 5 == 4 else SLIDING for index in range(_LAYERS)],
    "model_type": "gemma4_text",
    "num_attention_heads": 8,
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
}
_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "model_type": "gemma4_vision",
    "num_attention_heads": 12,
    "num_hidden_layers": 16,
    "patch_size": 16,
    "position_embedding_size": 10240,
    "use_clipped_linears": True,
}


def gemma4() -> Layout:
    """Return the files of Gemma 4 E2B."""
    hidden, width = _TEXT["hidden_size"], _VISION["hidden_size"]
    backbone = replace(GEMMA4, root="model.language_model")
    shapes = decoder_shapes(backbone.read(Path("config.json"), _TEXT), backbone)
    shapes |= {f"model.vision_tower.{name}": shape for name, shape in _tower_shapes().items()}
    shapes["model.embed_vision.embedding_projection.weight"] = (hidden, width)
    draws = {
        "layer_scalar": (1.0, 0.0),
        **{bound: (-64.0 if bound.endswith("min") else 64.0, 0.0) for bound in BOUNDS},
        "embed_tokens.weight": (0.0, hidden**-0.5),  # these are multiplied by its inverse
        "embed_tokens_per_layer.weight": (0.0, 256**-0.5),  # and these
        "position_embedding_table": (0.0, 0.02),
    }
    return Layout((Part("", shapes, _LAYERS, "", draws),), _write_settings)


def _tower_shapes() -> Shapes:
    width, wide, patch = (
        _VISION[key] for key in ("hidden_size", "intermediate_size", "patch_size")
    )
    head = width // _VISION["num_attention_heads"]
    shapes: Shapes = {
        "patch_embedder.input_proj.weight": (width, 3 * patch**2),
        "patch_embedder.position_embedding_table": (2, _VISION["position_embedding_size"], width),
    }
    linears = {f"self_attn.{part}_proj": (width, width) for part in "qkvo"}
    linears |= {f"mlp.{part}_proj": (wide, width) for part in ("gate", "up")}
    linears["mlp.down_proj"] = (width, wide)
    for index in range(_VISION["num_hidden_layers"]):
        layer = f"encoder.layers.{index}"
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{layer}.{norm}_layernorm.weight"] = (width,)
        shapes |= {f"{layer}.self_attn.{part}_norm.weight": (head,) for part in "qk"}
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.linear.weight"] = shape
            shapes |= {f"{layer}.{name}.{bound}": () for bound in BOUNDS}
    return shapes


def _write_settings(folder: Path, name: str) -> None:
    ids = {text: _PIECES + index for index, text in enumerate(_SPECIAL)}
    config = {
        "_name_or_path": f"synth/{name}",
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "boi_token_id": ids["<|image>"],
        "dtype": "float16",
        "eoi_token_id": ids["<image|>"],
        "eos_token_id": [ids["<eos>"], ids["<turn|>"]],
        "image_token_id": ids["<|image|>"],
        "model_type": "gemma4",
        "text_config": {**_TEXT, "pad_token_id": ids["<pad>"]},
        "vision_config": _VISION,
    }
    write_json(folder / "config.json", config)
    image = {"do_normalize": False, "max_soft_tokens": _TOKENS, "resample": 3}
    write_json(
        folder / "processor_config.json", {"image_processor": image, "image_seq_length": _TOKENS}
    )
    template = turns_template("<|turn>", "<turn|>", "\\n\\n<|image|>\\n\\n")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    settings = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)
    save_tokenizer(chat_tokenizer(_PIECES, _SPECIAL), folder / "tokenizer.json")
