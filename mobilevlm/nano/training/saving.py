"""Trained weights to and from a folder in the layout of the official MobileVLM V2 checkpoints."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mobilevlm.errors import CheckpointError
from mobilevlm.families import open_checkpoint
from mobilevlm.families.towers import CLIP_MEAN, CLIP_STD
from mobilevlm.nano.training.model import CONTEXT, EOS, NanoConfig, NanoModel, config_of
from mobilevlm.nano.training.tokenizer import BOS, NanoTokenizer, load_tokenizer

TOWER = "model.vision_tower.vision_tower.vision_model."

OFFICIAL_NAMES = (
    (r"vision\.(\w+_embedding)(.*)", rf"{TOWER}embeddings.\1\2"),
    (r"vision\.pre_norm\.(.*)", rf"{TOWER}pre_layrnorm.\1"),
    (r"vision\.layers\.(\d+)\.norm(\d)\.(.*)", rf"{TOWER}encoder.layers.\1.layer_norm\2.\3"),
    (r"vision\.layers\.(\d+)\.attn\.(.*)", rf"{TOWER}encoder.layers.\1.self_attn.\2"),
    (r"vision\.layers\.(\d+)\.mlp\.(.*)", rf"{TOWER}encoder.layers.\1.mlp.\2"),
    (r"projector\.mlp\.0\.(.*)", r"model.mm_projector.mlp.mlp.0.\1"),
    (r"projector\.mlp\.1\.(.*)", r"model.mm_projector.mlp.mlp.2.\1"),
    (r"projector\.peg\.(.*)", r"model.mm_projector.peg.peg.0.\1"),
    (r"decoder\.layers\.(\d+)\.input_norm\.(.*)", r"model.layers.\1.input_layernorm.\2"),
    (
        r"decoder\.layers\.(\d+)\.post_attention_norm\.(.*)",
        r"model.layers.\1.post_attention_layernorm.\2",
    ),
    (r"decoder\.layers\.(\d+)\.attn\.(.*)", r"model.layers.\1.self_attn.\2"),
    (
        r"decoder\.layers\.(\d+)\.mlp\.experts\.(.*)",
        r"model.layers.\1.mlp.deepspeed_moe.experts.deepspeed_experts.\2",
    ),
    (
        r"decoder\.layers\.(\d+)\.mlp\.router\.(.*)",
        r"model.layers.\1.mlp.deepspeed_moe.gate.wg.\2",
    ),
    (r"decoder\.layers\.(\d+)\.mlp\.(.*)", r"model.layers.\1.mlp.\2"),
    (r"decoder\.lm_head\.(.*)", r"lm_head.\1"),
    (r"decoder\.(.*)", r"model.\1"),
)
"""Our names as patterns, and what official checkpoints call them; the first that fits holds."""


def official_name(name: str) -> str:
    """A parameter's name in official checkpoints."""
    for pattern, official in OFFICIAL_NAMES:
        if found := re.fullmatch(pattern, name):
            return found.expand(official)
    raise KeyError(name)


def save_checkpoint(model: NanoModel, tokenizer: NanoTokenizer, folder: Path, name: str) -> None:
    """Writes float16 weights, configuration and tokenizer to a new or empty folder.

    Features come from layer -2, as in the official checkpoints. So that nothing trained is wasted,
    the tower's last layer, which no one reads, is an identity: its output projections are zero.

    Raises:
        CheckpointError: something is in the folder, or a weight does not fit float16.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not an empty folder: name another one")
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        _write_checkpoint(model, tokenizer, temporary / "checkpoint", name)
        (temporary / "checkpoint").replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_checkpoint(
    model: NanoModel, tokenizer: NanoTokenizer, temporary: Path, name: str
) -> None:
    (temporary / "vision_tower").mkdir(parents=True)
    weights = {
        key: value.detach().to("cpu", torch.float16).contiguous()
        for key, value in (_official(model) | _unread_tower_parts(model.config)).items()
    }
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{key}: a trained weight does not fit float16")
    save_file(weights, str(temporary / "model.safetensors"), metadata={"format": "pt"})
    (temporary / "model.safetensors").chmod(0o644)
    (temporary / "tokenizer.model").write_bytes(tokenizer.model)
    files = {
        "config.json": model_config(model.config, name),
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0},
        "tokenizer_config.json": tokenizer_config(),
        "special_tokens_map.json": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<unk>",
            "unk_token": "<unk>",
        },
        "vision_tower/config.json": tower_config(model.config),
        "vision_tower/preprocessor_config.json": preprocessor_config(model.config),
    }
    for file, content in files.items():
        (temporary / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_checkpoint(folder: Path) -> tuple[NanoModel, NanoTokenizer]:
    """Reads a folder of ``save_checkpoint`` as a float32 model.

    Raises:
        CheckpointError: a file is missing or does not fit.
    """
    try:
        opened = open_checkpoint(folder)
        model = NanoModel(config_of(opened.spec))
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        model.load_state_dict(
            {name: torch.tensor(opened.weights.read(name, shapes[name])) for name in shapes}
        )
        return model, load_tokenizer(folder / "tokenizer.model")
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a nano checkpoint ({error})") from error


def model_config(config: NanoConfig, name: str) -> dict[str, Any]:
    """config.json as MobileVLM V2 writes it; with experts, MoE-LLaVA's ``moe`` block as well."""
    content: dict[str, Any] = {
        "_name_or_path": name,
        "architectures": ["MobileLlamaForCausalLM"],
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": CONTEXT,
        "max_sequence_length": CONTEXT,
        "mm_hidden_size": config.vision_hidden_size,
        "mm_projector_type": "ldpnetv2",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "vision_tower",
        "model_type": "mobilevlm",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_attention_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "use_mm_proj": True,
        "vision_tower_type": "clip",
        "vocab_size": config.vocab_size,
    }
    if config.num_experts:
        content["moe"] = {
            "moe_enable": True,
            "moe_mode": "sparse",
            "moe_layers_idx": list(config.moe_layers),
            "num_experts": [config.num_experts] * len(config.moe_layers),
            "top_k_experts": config.experts_per_token,
            "capacity_factor": 1.5,
            "eval_capacity_factor": 2.0,
            "min_capacity": 0,
            "use_residual": False,
            "router_aux_loss_coef": 0.01,
        }
    return content


def tower_config(config: NanoConfig) -> dict[str, Any]:
    """vision_tower/config.json of a CLIPVisionModel."""
    return {
        "architectures": ["CLIPVisionModel"],
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": config.vision_hidden_size,
        "image_size": config.image_size,
        "intermediate_size": config.vision_intermediate_size,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": config.vision_heads,
        "num_channels": 3,
        "num_hidden_layers": config.vision_layers + 1,
        "patch_size": config.patch_size,
        "projection_dim": config.vision_hidden_size,
        "torch_dtype": "float16",
    }


def preprocessor_config(config: NanoConfig) -> dict[str, Any]:
    """vision_tower/preprocessor_config.json of CLIP's image processor."""
    return {
        "crop_size": config.image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
        "size": config.image_size,
    }


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json of a Llama tokenizer."""
    special = {
        f"{name}_token": {
            "__type": "AddedToken",
            "content": content,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
        }
        for name, content in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))
    }
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": CONTEXT,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        **special,
    }


def _official(model: NanoModel) -> dict[str, Tensor]:
    return {official_name(name): value for name, value in model.state_dict().items()}


def _unread_tower_parts(config: NanoConfig) -> dict[str, Tensor]:
    """The tensors of a CLIPVisionModel that the selected features do not depend on."""
    size, inner = config.vision_hidden_size, config.vision_intermediate_size
    layer = f"{TOWER}encoder.layers.{config.vision_layers}."
    parts = {f"{TOWER}post_layernorm.weight": torch.ones(size)}
    parts[f"{TOWER}post_layernorm.bias"] = torch.zeros(size)
    for norm in ("layer_norm1", "layer_norm2"):
        parts[f"{layer}{norm}.weight"] = torch.ones(size)
        parts[f"{layer}{norm}.bias"] = torch.zeros(size)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        parts[f"{layer}self_attn.{name}.weight"] = torch.zeros(size, size)
        parts[f"{layer}self_attn.{name}.bias"] = torch.zeros(size)
    parts[f"{layer}mlp.fc1.weight"] = torch.zeros(inner, size)
    parts[f"{layer}mlp.fc1.bias"] = torch.zeros(inner)
    parts[f"{layer}mlp.fc2.weight"] = torch.zeros(size, inner)
    parts[f"{layer}mlp.fc2.bias"] = torch.zeros(size)
    return parts
