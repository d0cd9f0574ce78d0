"""LLaVA, LLaVA-1.5 and 1.6: a CLIP tower, a linear or MLP projector, and Vicuna or Mistral.

Official code: github.com/haotian-liu/LLaVA. LLaVA-RLHF and DRESS checkpoints have this shape too.
"""

from __future__ import annotations

from mobilevlm.checkpoint import Weights
from mobilevlm.conversation import INSTRUCTIONS
from mobilevlm.families.backbones import LLAMA
from mobilevlm.families.llava_layout import mlp_projector, read_layout
from mobilevlm.families.qwen_gemma import MISTRAL
from mobilevlm.families.registry import Source, register
from mobilevlm.spec import ModelSpec

_MISTRAL = "llava_mistral"


@register("llava", {"llava", "llava_llama", _MISTRAL}, r"linear|mlp[1-9]\d*x_gelu")
def read_llava(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads a LLaVA checkpoint. The conversation of the linear projector's time says "human", that
    of the MLP's says "user", and Mistral has one of its own; nothing in config.json tells the first
    two apart, so ``--conversation`` overrides it.
    """
    is_mistral = source.config["model_type"] == _MISTRAL
    linear = (source.config.get("mm_projector_type") or "linear") == "linear"
    words = INSTRUCTIONS if is_mistral else "llava_v1" if linear else "v1"
    return read_layout(
        source,
        family="llava",
        conversation=words,
        projector=mlp_projector,
        prefer_checkpoint_tower=False,
        backbone=MISTRAL if is_mistral else LLAMA,
    )
