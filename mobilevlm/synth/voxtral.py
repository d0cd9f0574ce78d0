"""Voxtral Mini 3B: published shapes, random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.families.backbones import LLAMA
from mobilevlm.synth.shapes import Layout, Part, Shapes, decoder_shapes, linear, norm, write_json
from mobilevlm.synth.tokenizer import chat_tokenizer
from mobilevlm.tokenizers.tokenizer import save_tokenizer

_SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AUDIO]", "[BEGIN_AUDIO]",
            "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")  # fmt: skip
_VOCABULARY = 131072
_PIECES = _VOCABULARY - len(_SPECIAL)
_AUDIO: dict[str, Any] = {
    "activation_function": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "max_source_positions": 1500,
    "model_type": "voxtral_encoder",
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "num_mel_bins": 128,
    "scale_embedding": False,
}
_TEXT: dict[str, Any] = {
    "bos_token_id": _PIECES + _SPECIAL.index("<s>"),
    "eos_token_id": _PIECES + _SPECIAL.index("</s>"),
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 30,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000000.0,
    "tie_word_embeddings": False,
    "vocab_size": _VOCABULARY,
}
_MARK = "audio_tower"


def voxtral_mini() -> Layout:
    """Return the files of Voxtral Mini 3B."""
    backbone = replace(LLAMA, root="language_model.model", lm_head="language_model.lm_head")
    shapes: Shapes = decoder_shapes(backbone.read(Path("config.json"), _TEXT), backbone)
    shapes |= whisper_shapes(_AUDIO)
    joined = _AUDIO["intermediate_size"]
    shapes["multi_modal_projector.linear_1.weight"] = (_TEXT["hidden_size"], joined)
    shapes["multi_modal_projector.linear_2.weight"] = (_TEXT["hidden_size"],) * 2
    return Layout((Part("", shapes, _TEXT["num_hidden_layers"], ""),), _write_settings)


def whisper_shapes(config: dict[str, Any]) -> Shapes:
    """Whisper's encoder."""
    size, wide = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        f"{_MARK}.conv1.weight": (size, config["num_mel_bins"], 3),
        f"{_MARK}.conv1.bias": (size,),
        f"{_MARK}.conv2.weight": (size, size, 3),
        f"{_MARK}.conv2.bias": (size,),
        f"{_MARK}.embed_positions.weight": (config["max_source_positions"], size),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"{_MARK}.layers.{index}"
        for part in ("q_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{part}", size, size)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (size, size)
        shapes |= linear(f"{layer}.fc1", size, wide) | linear(f"{layer}.fc2", wide, size)
        shapes |= norm(f"{layer}.self_attn_layer_norm", size)
        shapes |= norm(f"{layer}.final_layer_norm", size)
    return shapes | norm(f"{_MARK}.layer_norm", size)


def _write_settings(folder: Path, name: str) -> None:
    config = {
        "_name_or_path": f"synth/{name}",
        "architectures": ["VoxtralForConditionalGeneration"],
        "audio_config": _AUDIO,
        "audio_token_id": _PIECES + _SPECIAL.index("[AUDIO]"),
        "model_type": "voxtral",
        "projector_hidden_act": "gelu",
        "text_config": _TEXT,
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    extractor = {
        "chunk_length": 30,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128,
        "hop_length": 160,
        "n_fft": 400,
        "sampling_rate": 16000,
    }
    write_json(folder / "preprocessor_config.json", extractor)
    save_tokenizer(chat_tokenizer(_PIECES, _SPECIAL), folder / "tokenizer.json")
