"""MobileVLM V1 and V2: a CLIP tower, an LDP or LDPv2 projector, and MobileLLaMA.

Official code: github.com/Meituan-AutoML/MobileVLM (mobilevlm/model/vision_projector.py).
"""

from __future__ import annotations

from typing import Any

from mobilevlm.checkpoint import Weights
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.families.llava_layout import ProjectorLayout, mlp_projector, read_layout
from mobilevlm.families.registry import Source, register
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.spec import ModelSpec

LDPV2_GRID = 12
"""LDPv2 pools any patch grid to 12 × 12."""


@register("mobilevlm", {"mobilevlm"}, r"ldpnet|ldpnetv2|linear|mlp[1-9]\d*x_gelu")
@register("mobilevlm-llava", {"llava", "llava_llama"}, r"ldpnet|ldpnetv2")
def read_mobilevlm(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads a MobileVLM checkpoint. With LDPv2 the tower was trained too, so the checkpoint's own
    tower weights win over the tower folder; otherwise the folder wins, as in the official loader.
    """
    kind = source.config.get("mm_projector_type") or "linear"
    return read_layout(
        source,
        family="mobilevlm",
        conversation="v1",
        projector=_PROJECTORS.get(kind, mlp_projector),
        prefer_checkpoint_tower="v2" in kind,
    )


def _ldpv2(config: dict[str, Any], vision: TransformerEncoder) -> ProjectorLayout:
    hidden = config["hidden_size"]
    spec = ConnectorSpec("ldpv2", vision.hidden_size, hidden, 2, vision.grid, LDPV2_GRID)
    names = {"mlp.0": "mlp.mlp.0", "mlp.1": "mlp.mlp.2", "peg": "peg.peg.0"}
    return ProjectorLayout(spec, _with_parts(names, ("weight", "bias")))


def _ldp(config: dict[str, Any], vision: TransformerEncoder) -> ProjectorLayout:
    hidden = config["hidden_size"]
    spec = ConnectorSpec("ldp", vision.hidden_size, hidden, 2, vision.grid, -(-vision.grid // 2))
    names = _with_parts({"mlp.0": "model.mlp.1", "mlp.1": "model.mlp.3"}, ("weight", "bias"))
    for block in (0, 1):
        ours, theirs = f"blocks.{block}", f"model.mb_block.{block + 1}.block"
        names[f"{ours}.depthwise.weight"] = f"{theirs}.0.0.weight"
        names[f"{ours}.pointwise.weight"] = f"{theirs}.2.0.weight"
        layers = {
            f"{ours}.norm1": f"{theirs}.0.1",
            f"{ours}.squeeze": f"{theirs}.1.fc1",
            f"{ours}.excite": f"{theirs}.1.fc2",
            f"{ours}.norm2": f"{theirs}.2.1",
        }
        names |= _with_parts(layers, ("weight", "bias"))
    return ProjectorLayout(spec, names)


def _with_parts(names: dict[str, str], parts: tuple[str, ...]) -> dict[str, str]:
    return {f"{ours}.{part}": f"{name}.{part}" for ours, name in names.items() for part in parts}


_PROJECTORS = {"ldpnet": _ldp, "ldpnetv2": _ldpv2}
