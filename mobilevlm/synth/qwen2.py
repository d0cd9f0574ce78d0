"""Language model and tokenizer of Qwen2-0.5B, as checkpoints around it have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobilevlm.synth.shapes import write_json
from mobilevlm.synth.tokenizer import chat_tokenizer
from mobilevlm.tokenizers.tokenizer import save_tokenizer

QWEN2_PIECES = 151643
"""Pieces of Qwen2's tokenizer, without the special ones."""
QWEN2_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": QWEN2_PIECES,
    "eos_token_id": QWEN2_PIECES + 2,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "vocab_size": 152000,
}
"""Configuration; models differ in ``tie_word_embeddings``."""


def write_qwen2_tokenizer(folder: Path, special: Sequence[str]) -> None:
    """Write a tokenizer of this size and its settings. ``special``: its special tokens."""
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "Qwen2Tokenizer"})
    save_tokenizer(chat_tokenizer(QWEN2_PIECES, special), folder / "tokenizer.json")
