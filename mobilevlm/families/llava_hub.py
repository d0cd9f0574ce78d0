"""LLaVA's line in the hub's layout (llava-hf/…): a tower, an MLP, and a language model.

Official code: the classes ``LlavaForConditionalGeneration`` (LLaVA-1.5), ``LlavaNext…`` (1.6) and
``LlavaOnevision…`` of transformers.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from mobilevlm.checkpoint import TensorRef, Weights
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import decoder_refs
from mobilevlm.families.config import config_value
from mobilevlm.families.hub import HubCheckpoint, open_hub
from mobilevlm.families.pinpoints import agreed_grids
from mobilevlm.families.registry import Source, register
from mobilevlm.families.towers import (
    SIGLIP,
    SIGLIP_DEFAULTS,
    Tower,
    image_spec,
    kept_layers,
    transformer_spec,
)
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import AnyResolution, FixedImage, InputSpec, LayoutSpec
from mobilevlm.spec import ModelSpec

_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "image_size": 224, "patch_size": 32}  # fmt: skip
"""Defaults of ``CLIPVisionConfig``."""
_KINDS: dict[str, tuple[dict[str, Any], str, str, dict[str, bool]]] = {
    "clip_vision_model": (_CLIP, "quick_gelu", "default", {}),
    "siglip_vision_model": (
        SIGLIP_DEFAULTS,
        "gelu_pytorch_tanh",
        "full",
        SIGLIP,
    ),
}
"""Towers by ``model_type``: defaults of their keys, activation, what is selected of their features
(all patches, and no class token), and differences from CLIP."""
_SELECTED = {
    "llava": (-2, "default"),
    "llava_next": (-2, "default"),
    "llava_onevision": (-1, "full"),
}
"""Defaults of ``vision_feature_layer`` and ``vision_feature_select_strategy`` by model."""
_TOWERS = ("model.vision_tower.", "vision_tower.")
_PROJECTORS = ("model.multi_modal_projector.", "multi_modal_projector.")
_LINEARS = {"mlp.0": "linear_1", "mlp.1": "linear_2"}
_PARTS = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
"""Settings of the projector that are known here."""


@register("llava_hub", set(_SELECTED), keys={"text_config", "vision_config"}, ready_tokenizer=True)
def read_llava_hub(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision in the hub's layout."""
    hub = open_hub(source)
    vision = _tower(hub)
    for key, value in _PARTS.items():
        if source.config.get(key, value) != value:
            found = source.config[key]
            raise CheckpointError(f"{hub.path}: {key!r} is {found!r:.60}, expected {value!r}")
    decoder, backbone = hub.decoder()
    preparation = _preparation(hub, vision)
    has_newline = isinstance(preparation, AnyResolution)
    grid = vision.grid
    connector = ConnectorSpec(
        "mlp", vision.hidden_size, decoder.hidden_size, 2, grid, grid, newline=has_newline
    )
    row_id, mark = hub.image_token("image_token_id", "image_token_index")
    spec = ModelSpec(
        family="llava_hub",
        name=source.name,
        inputs={"image": InputSpec(preparation, vision, connector, LayoutSpec(row_id=row_id))},
        decoder=decoder,
        conversation=hub.conversation(mark),
    )
    tower_refs, skipped = hub.tower_refs(vision, _TOWERS)
    refs = decoder_refs(hub.files, decoder, backbone) | tower_refs
    between = hub.prefix(_PROJECTORS, "linear_1.weight")
    for ours, theirs in _LINEARS.items():
        for part in ("weight", "bias"):
            refs[f"projector.{ours}.{part}"] = TensorRef(hub.files, f"{between}{theirs}.{part}")
    if has_newline:
        newline = f"{hub.prefix(('model.', ''), 'image_newline')}image_newline"
        refs["projector.newline"] = TensorRef(hub.files, newline)
    return spec, hub.weights(refs, decoder, backbone, skipped)


def _tower(hub: HubCheckpoint) -> TransformerEncoder:
    """Return the tower as far as the layer that ``vision_feature_layer`` names.

    Raises:
        CheckpointError: it is neither CLIP nor SigLIP, or a value is missing or wrong.
    """
    path, config = hub.path, hub.source.config
    kind = config_value(path, hub.vision, "model_type", str, "clip_vision_model")
    if kind not in _KINDS:
        raise CheckpointError(
            f"{path}: 'vision_config' has model_type {kind!r:.60}, expected {' or '.join(_KINDS)}"
        )
    defaults, activation, expected, traits = _KINDS[kind]
    usual_layer, usual = _SELECTED[config["model_type"]]
    strategy = config_value(path, config, "vision_feature_select_strategy", str, usual)
    if strategy != expected:
        raise CheckpointError(
            f"{path}: 'vision_feature_select_strategy' is {strategy!r:.60}, expected {expected!r} "
            f"of a {kind}"
        )
    tower = {**defaults, **hub.vision}
    layers = config_value(path, tower, "num_hidden_layers", int)
    kept = kept_layers(path, config, "vision_feature_layer", usual_layer, layers)
    return transformer_spec(path, tower, kept, activation, **traits)


def _preparation(hub: HubCheckpoint, vision: TransformerEncoder) -> FixedImage | AnyResolution:
    """Return how images are prepared: LLaVA-1.5 crops them to one square, the others tile them.

    Raises:
        CheckpointError: a setting is missing or wrong, or not supported.
    """
    config, model = hub.source.config, hub.source.config["model_type"]
    tower = Tower(str(hub.path), hub.vision, hub.processor, hub.source.folder)
    square = image_spec(tower, vision, "resize" if model == "llava_onevision" else "crop")
    if model == "llava":
        return square
    if square.shortest_edge != square.size:
        raise CheckpointError(
            f"{hub.processor_path}: 'size' is {square.shortest_edge}, expected the tile's "
            f"{square.size} pixels"
        )
    settings = {hub.processor_path: hub.processor, hub.path: config}
    grids = agreed_grids(settings, square.size)
    anyres = AnyResolution(square.size, grids, square.mean, square.std)
    if model == "llava_next":
        return anyres
    aspect = config_value(hub.path, config, "vision_aspect_ratio", str, "anyres_max_9")
    match = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", aspect)
    if match is None:
        raise CheckpointError(
            f"{hub.path}: 'vision_aspect_ratio' is {aspect!r:.60}, expected 'anyres_max_9' or "
            f"another number"
        )
    return replace(anyres, most_tiles=int(match[1]), several="square")
