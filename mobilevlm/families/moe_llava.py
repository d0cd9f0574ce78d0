"""MoE-LLaVA: a CLIP tower, an MLP projector, and sparse experts in one of four language models.

Official code: github.com/PKU-YuanGroup/MoE-LLaVA (moellava/model/language_model/llava_*_moe.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from mobilevlm.checkpoint import Weights
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import LLAMA, PHI, QWEN, STABLELM, Backbone
from mobilevlm.families.llava_layout import (
    Naming,
    ProjectorLayout,
    check_depth,
    mlp_layout,
    read_layout,
)
from mobilevlm.families.registry import Source, register
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.spec import ModelSpec
from mobilevlm.tokenizers.tokenizer import vocabulary_length


@dataclass(frozen=True)
class _Variant:
    backbone: Backbone
    conversation: str


_VARIANTS = {
    "moe_llava_llama": _Variant(LLAMA, "v1"),
    "moe_llava_phi": _Variant(PHI, "phi"),
    "moe_llava_qwen": _Variant(QWEN, "qwen"),
    "moe_llava_stablelm": _Variant(STABLELM, "stablelm"),
}
"""By ``model_type``."""
_NAMING = Naming(tower="image_tower", projector="mm_projector.image_spatial_proj")


@register("moe_llava", set(_VARIANTS), r".*")
def read_moe_llava(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads a MoE-LLaVA checkpoint. A training save holds a copy of the tower, which the official
    loader ignores. It cuts embeddings and head to the tokenizer's length, and so does this: rows
    beyond are padding.
    """
    variant = _VARIANTS[source.config["model_type"]]
    spec, weights = read_layout(
        source,
        family="moe_llava",
        conversation=variant.conversation,
        projector=lambda config, vision: _projector(source, config, vision),
        prefer_checkpoint_tower=False,
        backbone=variant.backbone,
        naming=_NAMING,
    )
    stored, length = spec.decoder.vocab_size, vocabulary_length(source.tokenizer)
    if length > stored:
        raise CheckpointError(
            f"{source.folder}: the tokenizer has {length} tokens, but 'vocab_size' in config.json "
            f"is {stored}: these files are of different models"
        )
    tables = ("decoder.embed_tokens.weight", "decoder.lm_head.weight")
    decoder = replace(spec.decoder, vocab_size=length)
    return replace(spec, decoder=decoder), weights.first_rows(tables, length, stored)


def _projector(
    source: Source, config: dict[str, Any], vision: TransformerEncoder
) -> ProjectorLayout:
    """``linear``, ``mlpNx_gelu``, or the same after pooling 2 × 2 (``pool_mlpNx_gelu``)."""
    check_depth(source.folder / "config.json", config, "image_projector_type")
    kind = config.get("image_projector_type") or "linear"
    match = re.fullmatch(r"(pool_)?mlp([1-9]\d*)x_gelu", str(kind))
    if kind == "linear":
        return mlp_layout(config, vision, 1, "")
    if match is None:
        raise CheckpointError(
            f"{source.folder / 'config.json'}: image_projector_type {kind!r:.60} is not supported "
            f"(nor are Q-Former, simple and cheap projectors): expected linear, mlp2x_gelu or "
            f"pool_mlp2x_gelu (any depth)"
        )
    if match[1] is None:
        return mlp_layout(config, vision, int(match[2]), "{}.")
    if vision.grid % 2:
        raise CheckpointError(
            f"{source.folder / 'config.json'}: {kind} pools 2 × 2, but the tower's grid has "
            f"{vision.grid} patches an edge"
        )
    return mlp_layout(config, vision, int(match[2]), "block.{}.", vision.grid // 2)
