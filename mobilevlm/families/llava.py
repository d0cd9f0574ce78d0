"""LLaVA and LLaVA-1.5: a CLIP tower, a linear or MLP projector, and Vicuna.

Official code: github.com/haotian-liu/LLaVA. LLaVA-RLHF and DRESS checkpoints have this shape too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilevlm.checkpoint import Weights
from mobilevlm.families import OpenOptions, register
from mobilevlm.families.llava_layout import mlp_projector, read_layout
from mobilevlm.spec import ModelSpec


@register("llava", {"llava", "llava_llama"}, r"linear|mlp[1-9]\d*x_gelu")
def read_llava(
    folder: Path, config: dict[str, Any], options: OpenOptions
) -> tuple[ModelSpec, Weights]:
    """Reads a LLaVA checkpoint. The conversation of the linear projector's time says "human", that
    of the MLP's says "user"; nothing in config.json tells, so ``--conversation`` overrides it.
    """
    linear = (config.get("mm_projector_type") or "linear") == "linear"
    return read_layout(
        folder,
        config,
        options,
        family="llava",
        conversation="llava_v1" if linear else "v1",
        projector=mlp_projector,
        prefer_checkpoint_tower=False,
    )
