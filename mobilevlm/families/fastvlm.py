"""FastVLM: FastViTHD, an MLP and Qwen2, in the hub's layout and in Apple's own.

Official code: the class ``FastVlmForConditionalGeneration`` of transformers;
github.com/apple/ml-fastvlm.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from mobilevlm.checkpoint import TensorRef, Weights, check_presence
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.conversation import IMAGES_IN_TEXT
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import decoder_refs, skipped_names
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.fastvit import (
    TowerNames,
    apple_names,
    sized_tower,
    timm_names,
    tower_refs,
)
from mobilevlm.families.hub import HubCheckpoint, open_hub
from mobilevlm.families.llava_layout import image_aspect
from mobilevlm.families.registry import Source, register
from mobilevlm.families.towers import Tower, image_spec, pixel_edge
from mobilevlm.image_encoder import ConvEncoder
from mobilevlm.input_spec import FixedImage, InputSpec, LayoutSpec
from mobilevlm.spec import IMAGE_PLACEHOLDER, ConversationSpec, ModelSpec

_TIMM = ("model.vision_tower.timm_model.", "vision_tower.timm_model.")
_APPLE = "model.vision_tower.vision_tower.model."
_PROJECTORS = ("model.multi_modal_projector.", "multi_modal_projector.")
_HUB: dict[str, Any] = {
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}
"""Settings of config.json and the only value that each has; so it is with the others."""
_WRAPPER: dict[str, Any] = {"model_type": "timm_wrapper"}
_OWN: dict[str, Any] = {"mm_use_im_start_end": False, "mm_patch_merge_type": "flat"}
_PIXELS = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
"""Image processor of Apple's code, which no file of the checkpoint has."""


@register("fastvlm", {"fast_vlm"}, keys={"text_config", "vision_config"}, ready_tokenizer=True)
def read_fastvlm(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads FastVLM in the hub's layout."""
    hub = open_hub(source)
    path, vision_config, processor = hub.path, hub.vision, hub.processor
    check_only(path, source.config, _HUB)
    check_only(path, vision_config, _WRAPPER)
    name = config_value(path, vision_config, "architecture", str)
    size = pixel_edge(processor.get("crop_size"), 1024, str(hub.processor_path), "crop_size")
    arguments = config_value(path, vision_config, "model_args", dict, {})
    vision = sized_tower(path, name, size, arguments, vision_config.get("hidden_size"))
    row_id, mark = hub.image_token("image_token_id", "image_token_index")
    between = hub.prefix(_PROJECTORS, "linear_1.weight")
    return _assemble(
        hub,
        vision,
        timm_names(vision, hub.prefix(_TIMM, "stem.0.reparam_conv.weight")),
        [f"{between}linear_1", f"{between}linear_2"],
        image_spec(Tower(str(path), vision_config, processor, None), vision, "crop"),
        LayoutSpec(row_id=row_id),
        hub.conversation(mark),
    )


@register("fastvlm_apple", {"llava_qwen2"}, r"mlp2x_gelu", ready_tokenizer=True)
def read_apple(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads FastVLM in the layout of Apple's code: LLaVA's keys in Qwen2's config.json."""
    config = {**source.config, "text_config": {**source.config, "model_type": "qwen2"}}
    hub = open_hub(replace(source, config=config))
    check_only(hub.path, config, _OWN)
    name = config_value(hub.path, config, "mm_vision_tower", str)
    match = re.fullmatch(r"mobileclip_l_(\d{2,5})", name)
    if match is None:
        raise CheckpointError(
            f"{hub.path}: the vision tower {name!r:.60} is not known: expected mobileclip_l_1024 "
            f"or the same with another size"
        )
    tower = Tower(name, {}, _PIXELS, None)
    vision_config = config_value(hub.path, config, "vision_config", dict, {})
    arguments = config_value(hub.path, vision_config, "model_args", dict, {})
    channels = config.get("mm_hidden_size")
    vision = sized_tower(hub.path, "fastvit_mci3", int(match[1]), arguments, channels)
    conversation = hub.conversation(IMAGE_PLACEHOLDER, IMAGES_IN_TEXT)
    return _assemble(
        hub,
        vision,
        apple_names(vision, _APPLE),
        ["model.mm_projector.0", "model.mm_projector.2"],
        image_spec(tower, vision, image_aspect(hub.path, config)),
        LayoutSpec(),
        replace(conversation, tokenization="apart", parts=False),
    )


def _assemble(
    hub: HubCheckpoint,
    vision: ConvEncoder,
    names: TowerNames,
    projector: list[str],
    preparation: FixedImage,
    layout: LayoutSpec,
    conversation: ConversationSpec,
) -> tuple[ModelSpec, Weights]:
    """Return the model of these parts. ``projector``: its two Linears."""
    decoder, backbone = hub.decoder()
    connector = ConnectorSpec(
        "mlp", vision.hidden_size, decoder.hidden_size, 2, vision.grid, vision.grid
    )
    spec = ModelSpec(
        family="fastvlm",
        name=hub.source.name,
        inputs={"image": InputSpec(preparation, vision, connector, layout)},
        decoder=decoder,
        conversation=conversation,
    )
    fused, refs = tower_refs(hub.files, vision, names)
    refs |= decoder_refs(fused, decoder, backbone)
    for index, module in enumerate(projector):
        for part in ("weight", "bias"):
            refs[f"projector.mlp.{index}.{part}"] = TensorRef(fused, f"{module}.{part}")
    check_presence(refs)
    hub.source.check_unread(refs, fused, [*skipped_names(decoder, backbone), *names.skipped])
    return spec, Weights(refs)
