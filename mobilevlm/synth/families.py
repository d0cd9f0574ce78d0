"""Random-weight checkpoints of families whose layout is not LLaVA's, in their published shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mobilevlm.families.backbones import LLAMA, OPT, inside
from mobilevlm.synth.fastvlm import fastvlm
from mobilevlm.synth.gemma3 import gemma3
from mobilevlm.synth.gemma4 import gemma4
from mobilevlm.synth.internvl import internvl
from mobilevlm.synth.janus import janus
from mobilevlm.synth.lfm2_vl import lfm2_vl
from mobilevlm.synth.llava_onevision import llava_onevision
from mobilevlm.synth.qwen_vl import qwen3_vl, qwen25_vl, qwen35
from mobilevlm.synth.shapes import (
    Layout,
    Part,
    Shapes,
    decoder_shapes,
    linear,
    norm,
    siglip_shapes,
    tower_mlp,
    write_json,
)
from mobilevlm.synth.smolvlm import smolvlm
from mobilevlm.synth.tokenizer import byte_level_tokenizer, tokenizer_model
from mobilevlm.synth.voxtral import voxtral_mini
from mobilevlm.tokenizers.tokenizer import save_tokenizer

_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_CONFIG = Path("config.json")
_VERSION = "4.36.2"
"""Version of transformers that marks a VILA checkpoint as one of the release branch vila1.5."""

_VILA_LLM: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "num_key_value_heads": 20,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
_SIGLIP: dict[str, Any] = {
    "architectures": ["SiglipVisionModel"],
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "layer_norm_eps": 1e-6,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "torch_dtype": "float16",
}
_OPT: dict[str, Any] = {
    "activation_function": "relu",
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "enable_bias": True,
    "eos_token_id": 50118,
    "ffn_dim": 10240,
    "hidden_size": 2560,
    "layer_norm_elementwise_affine": True,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 1,
    "tie_word_embeddings": True,
    "vocab_size": 50304,
    "word_embed_proj_dim": 2560,
}
_EVA: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_size": 1408,
    "image_size": 224,
    "intermediate_size": 6144,
    "layer_norm_eps": 1e-6,
    "model_type": "blip_2_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 39,
    "patch_size": 14,
    "qkv_bias": True,
}
_QFORMER: dict[str, Any] = {
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 1408,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "blip_2_qformer",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "use_qformer_text_input": False,
    "vocab_size": 30522,
}
_QUERIES = 32
_OPT_TOKENS = 50265
"""Size of the tokenizer without the image token; the rest of the embeddings is padding."""


def _vila() -> Layout:
    hidden, width = _VILA_LLM["hidden_size"], _SIGLIP["hidden_size"]
    language = decoder_shapes(LLAMA.read(_CONFIG, _VILA_LLM), LLAMA)
    projector = norm("layers.1", 4 * width)
    projector |= linear("layers.2", 4 * width, hidden) | linear("layers.4", hidden, hidden)
    return Layout(
        (
            Part("llm", language, _VILA_LLM["num_hidden_layers"], ""),
            Part("vision_tower", siglip_shapes(_SIGLIP), _SIGLIP["num_hidden_layers"], "tower"),
            Part("mm_projector", projector, 1, "projector"),
        ),
        _write_vila,
    )


def _blip2_opt() -> Layout:
    shapes: Shapes = {"query_tokens": (1, _QUERIES, _QFORMER["hidden_size"])}
    shapes |= _eva_shapes(_EVA) | _qformer_shapes(_QFORMER)
    shapes |= linear("language_projection", _QFORMER["hidden_size"], _OPT["hidden_size"])
    shapes |= decoder_shapes(OPT.read(_CONFIG, _OPT), inside(OPT, "language_model"))
    return Layout((Part("", shapes, _OPT["num_hidden_layers"], ""),), _write_blip2_opt)


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "vila_1.5_3b": _vila,
    "blip2_opt_2.7b": _blip2_opt,
    "fastvlm_0.5b": fastvlm,
    "gemma3_4b": gemma3,
    "gemma4_e2b": gemma4,
    "internvl3.5_1b": internvl,
    "janus_pro_1b": janus,
    "lfm2_vl_450m": partial(lfm2_vl, "lfm2_vl_450m"),
    "lfm2_vl_1.6b": partial(lfm2_vl, "lfm2_vl_1.6b"),
    "llava_onevision_0.5b": llava_onevision,
    "qwen2.5_vl_3b": qwen25_vl,
    "qwen3_vl_2b": qwen3_vl,
    "qwen3_5_0.8b": partial(qwen35, "qwen3_5_0.8b"),
    "qwen3_5_2b": partial(qwen35, "qwen3_5_2b"),
    "smolvlm_256m": partial(smolvlm, "smolvlm_256m"),
    "smolvlm_500m": partial(smolvlm, "smolvlm_500m"),
    "voxtral_mini_3b": voxtral_mini,
}
"""By the configuration's name."""


def _eva_shapes(config: dict[str, Any]) -> Shapes:
    hidden, patch = config["hidden_size"], config["patch_size"]
    embeddings = "vision_model.embeddings"
    positions = (config["image_size"] // patch) ** 2 + 1
    shapes: Shapes = {
        f"{embeddings}.class_embedding": (1, 1, hidden),
        f"{embeddings}.position_embedding": (1, positions, hidden),
        f"{embeddings}.patch_embedding.weight": (hidden, 3, patch, patch),
        f"{embeddings}.patch_embedding.bias": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{index}"
        shapes |= linear(f"{layer}.self_attn.qkv", hidden, 3 * hidden)
        shapes |= linear(f"{layer}.self_attn.projection", hidden, hidden)
        shapes |= tower_mlp(layer, hidden, config["intermediate_size"])
    return shapes | norm("vision_model.post_layernorm", hidden)


def _qformer_shapes(config: dict[str, Any]) -> Shapes:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    shapes = norm("qformer.layernorm", hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"qformer.encoder.layer.{index}"
        sources = {"attention": hidden}
        if index % config["cross_attention_frequency"] == 0:
            sources["crossattention"] = config["encoder_hidden_size"]
        for name, source in sources.items():
            shapes |= linear(f"{layer}.{name}.attention.query", hidden, hidden)
            shapes |= linear(f"{layer}.{name}.attention.key", source, hidden)
            shapes |= linear(f"{layer}.{name}.attention.value", source, hidden)
            shapes |= linear(f"{layer}.{name}.output.dense", hidden, hidden)
            shapes |= norm(f"{layer}.{name}.output.LayerNorm", hidden)
        shapes |= linear(f"{layer}.intermediate_query.dense", hidden, wide)
        shapes |= linear(f"{layer}.output_query.dense", wide, hidden)
        shapes |= norm(f"{layer}.output_query.LayerNorm", hidden)
    return shapes


def _write_vila(folder: Path, name: str) -> None:
    kinds = {"mm_projector_type": "mlp_downsample", "model_type": "v2l_projector"}
    config = {
        "_name_or_path": f"synth/{name}",
        "architectures": ["LlavaLlamaModel"],
        "hidden_size": _VILA_LLM["hidden_size"],
        "image_aspect_ratio": "resize",
        "llm_cfg": _VILA_LLM,
        "mm_hidden_size": _SIGLIP["hidden_size"],
        "mm_projector_cfg": kinds,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch",
        "mm_vision_select_layer": -2,
        "model_dtype": "torch.float16",
        "model_type": "llava_llama",
        "num_video_frames": 8,
        "s2": False,
        "transformers_version": _VERSION,
        "vision_tower_cfg": _SIGLIP,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "mm_projector" / "config.json", kinds)
    write_json(folder / "vision_tower" / "config.json", _SIGLIP)
    _write_preprocessor(folder / "vision_tower", _SIGLIP, [0.5] * 3, [0.5] * 3)
    llm = folder / "llm"
    write_json(llm / "config.json", _VILA_LLM)
    write_json(
        llm / "tokenizer_config.json",
        {"add_bos_token": True, "legacy": False, "tokenizer_class": "LlamaTokenizer"},
    )
    (llm / "tokenizer.model").write_bytes(tokenizer_model(_VILA_LLM["vocab_size"]))


def _write_blip2_opt(folder: Path, name: str) -> None:
    config = {
        "_name_or_path": f"synth/{name}",
        "architectures": ["Blip2ForConditionalGeneration"],
        "image_token_index": _OPT_TOKENS,
        "model_type": "blip-2",
        "num_query_tokens": _QUERIES,
        "qformer_config": _QFORMER,
        "text_config": _OPT,
        "use_decoder_only_language_model": True,
        "vision_config": _EVA,
    }
    write_json(folder / "config.json", config)
    _write_preprocessor(folder, _EVA, _CLIP_MEAN, _CLIP_STD)
    save_tokenizer(byte_level_tokenizer(_OPT_TOKENS), folder / "tokenizer.json")


def _write_preprocessor(
    folder: Path, tower: dict[str, Any], mean: list[float], std: list[float]
) -> None:
    edge = tower["image_size"]
    settings = {"image_mean": mean, "image_std": std, "resample": 3}
    size = {"size": {"height": edge, "width": edge}}
    write_json(folder / "preprocessor_config.json", {**settings, **size})
