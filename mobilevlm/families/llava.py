"""LLaVA and LLaVA-1.5: a CLIP tower, a linear or MLP projector, and Vicuna.

Official code: github.com/haotian-liu/LLaVA. LLaVA-RLHF and DRESS checkpoints have this shape too.
"""

from __future__ import annotations

from mobilevlm.checkpoint import Weights
from mobilevlm.families.llava_layout import mlp_projector, read_layout
from mobilevlm.families.registry import Source, register
from mobilevlm.spec import ModelSpec


@register("llava", {"llava", "llava_llama"}, r"linear|mlp[1-9]\d*x_gelu")
def read_llava(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads a LLaVA checkpoint. The conversation of the linear projector's time says "human", that
    of the MLP's says "user"; nothing in config.json tells, so ``--conversation`` overrides it.
    """
    linear = (source.config.get("mm_projector_type") or "linear") == "linear"
    return read_layout(
        source,
        family="llava",
        conversation="llava_v1" if linear else "v1",
        projector=mlp_projector,
        prefer_checkpoint_tower=False,
    )
