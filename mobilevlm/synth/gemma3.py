"""Gemma 3 4B: published shapes, random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.families.qwen_gemma import GEMMA3
from mobilevlm.synth.shapes import Layout, Part, decoder_shapes, siglip_shapes, write_json
from mobilevlm.synth.tokenizer import chat_tokenizer
from mobilevlm.tokenizers.tokenizer import save_tokenizer

_SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)
_PIECES = 262145 - len(_SPECIAL)
"""The last special token has the id of Gemma's visual tokens."""
_TOKENS = 256
"""Visual tokens of an image."""
_TEXT: dict[str, Any] = {
    "head_dim": 256,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_attention_heads": 8,
    "num_hidden_layers": 34,
    "num_key_value_heads": 4,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
    "vocab_size": 262208,
}
_SIGLIP: dict[str, Any] = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}
_NORMS = (
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"),
    *("post_feedforward_layernorm", "q_norm", "k_norm", "model.norm", "mm_soft_emb_norm"),
)
"""Norms whose weights are stored without the 1 that is added to them."""


def turns_template(begin: str, end: str, image: str) -> str:
    """Return a chat template of Gemma's turns, given their marks and what an image becomes."""
    return f"""\
{{{{- bos_token -}}}}
{{%- for message in messages -%}}
  {{{{- '{begin}' ~ ('model' if message['role'] == 'assistant' else message['role']) -}}}}
  {{{{- '\\n' -}}}}
  {{%- if message['content'] is string -%}}{{{{- message['content'] -}}}}
  {{%- else -%}}
    {{%- for part in message['content'] -%}}
      {{{{- '{image}' if part['type'] == 'image' else part['text'] -}}}}
    {{%- endfor -%}}
  {{%- endif -%}}
  {{{{- '{end}\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '{begin}model\\n' -}}}}{{%- endif -%}}
"""


def gemma3() -> Layout:
    """Return the files of Gemma 3 4B."""
    hidden, width = _TEXT["hidden_size"], _SIGLIP["hidden_size"]
    backbone = replace(GEMMA3, root="language_model.model")
    shapes = decoder_shapes(backbone.read(Path("config.json"), _TEXT), backbone)
    shapes |= {f"vision_tower.{name}": shape for name, shape in siglip_shapes(_SIGLIP).items()}
    shapes["multi_modal_projector.mm_input_projection_weight"] = (width, hidden)
    shapes["multi_modal_projector.mm_soft_emb_norm.weight"] = (width,)
    draws = {f"{name}.weight": (0.0, 0.0) for name in _NORMS}
    # Embeddings are multiplied by sqrt(hidden), and the projector's matrix is stored transposed.
    draws["embed_tokens.weight"] = (0.0, hidden**-0.5)
    draws["mm_input_projection_weight"] = (0.0, width**-0.5)
    part = Part("", shapes, _TEXT["num_hidden_layers"], "", draws)
    return Layout((part,), _write_settings)


def _write_settings(folder: Path, name: str) -> None:
    ids = {text: _PIECES + index for index, text in enumerate(_SPECIAL)}
    config = {
        "_name_or_path": f"synth/{name}",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": ids["<start_of_image>"],
        "eoi_token_index": ids["<end_of_image>"],
        "eos_token_id": [ids["<eos>"], ids["<end_of_turn>"]],
        "image_token_index": ids["<image_soft_token>"],
        "mm_tokens_per_image": _TOKENS,
        "model_type": "gemma3",
        "text_config": _TEXT,
        "torch_dtype": "float16",
        "vision_config": _SIGLIP,
    }
    write_json(folder / "config.json", config)
    edge = _SIGLIP["image_size"]
    processor = {
        "image_mean": [0.5] * 3,
        "image_seq_length": _TOKENS,
        "image_std": [0.5] * 3,
        "resample": 2,
        "size": {"height": edge, "width": edge},
    }
    write_json(folder / "preprocessor_config.json", processor)
    write_json(folder / "processor_config.json", {"image_seq_length": _TOKENS})
    template = turns_template("<start_of_turn>", "<end_of_turn>", "<start_of_image>")
    write_json(folder / "chat_template.json", {"chat_template": template})
    settings = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)
    save_tokenizer(chat_tokenizer(_PIECES, _SPECIAL), folder / "tokenizer.json")
