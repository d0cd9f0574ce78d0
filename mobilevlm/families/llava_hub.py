"""LLaVA's line in the hub's layout (llava-hf/…): a CLIP tower, an MLP, and a language model.

Official code: the class ``LlavaForConditionalGeneration`` of transformers.
"""

from __future__ import annotations

import re

from mobilevlm.checkpoint import TensorRef, Weights, check_presence
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import decoder_refs, skipped_names
from mobilevlm.families.config import config_value
from mobilevlm.families.hub import HubCheckpoint, open_hub
from mobilevlm.families.registry import Source, register
from mobilevlm.families.towers import (
    Tower,
    image_spec,
    skipped_tower_names,
    tower_names,
    transformer_spec,
)
from mobilevlm.input_spec import ConnectorSpec, InputSpec, LayoutSpec, TransformerEncoder
from mobilevlm.spec import ModelSpec

_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "image_size": 224, "patch_size": 32}  # fmt: skip
"""Defaults of ``CLIPVisionConfig``."""
_TOWERS = ("model.vision_tower.", "vision_tower.")
_PROJECTORS = ("model.multi_modal_projector.", "multi_modal_projector.")
_LINEARS = {"mlp.0": "linear_1", "mlp.1": "linear_2"}


@register("llava_hub", {"llava"}, keys={"text_config", "vision_config"}, ready_tokenizer=True)
def read_llava_hub(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads LLaVA-1.5 in the hub's layout."""
    hub = open_hub(source)
    vision = clip_tower(hub)
    decoder, backbone = hub.decoder()
    connector = ConnectorSpec(
        "mlp", vision.hidden_size, decoder.hidden_size, 2, vision.grid, vision.grid
    )
    row_id, mark = hub.image_token("image_token_id", "image_token_index")
    tower = Tower(str(hub.path), hub.vision, hub.processor, source.folder)
    spec = ModelSpec(
        family="llava_hub",
        name=source.name,
        inputs={
            "image": InputSpec(
                image_spec(tower, vision, "crop"), vision, connector, LayoutSpec(row_id=row_id)
            )
        },
        decoder=decoder,
        conversation=hub.conversation(mark),
    )
    refs = decoder_refs(hub.files, decoder, backbone)
    place = hub.prefix(_TOWERS, "vision_model.embeddings.patch_embedding.weight")
    for ours, theirs in tower_names(vision).items():
        refs[ours] = TensorRef(hub.files, place + theirs)
    between = hub.prefix(_PROJECTORS, "linear_1.weight")
    for ours, theirs in _LINEARS.items():
        for part in ("weight", "bias"):
            refs[f"projector.{ours}.{part}"] = TensorRef(hub.files, f"{between}{theirs}.{part}")
    check_presence(refs)
    skipped = skipped_tower_names(vision, hub.vision, re.escape(place))
    source.check_unread(refs, hub.files, [*skipped_names(decoder, backbone), *skipped])
    return spec, Weights(refs)


def clip_tower(hub: HubCheckpoint) -> TransformerEncoder:
    """Return the tower as far as the layer that ``vision_feature_layer`` names.

    Raises:
        CheckpointError: it is no CLIP, or a value is missing or wrong.
    """
    path, config = hub.path, {**_CLIP, **hub.vision}
    kind = config_value(path, config, "model_type", str, "clip_vision_model")
    if kind != "clip_vision_model":
        raise CheckpointError(
            f"{path}: 'vision_config' has model_type {kind!r:.60}, expected 'clip_vision_model'"
        )
    strategy = config_value(
        path, hub.source.config, "vision_feature_select_strategy", str, "default"
    )
    if strategy != "default":
        raise CheckpointError(
            f"{path}: 'vision_feature_select_strategy' is {strategy!r:.60}, expected 'default'"
        )
    layers = config_value(path, config, "num_hidden_layers", int)
    select = hub.source.config.get("vision_feature_layer", -2)
    if type(select) is not int or not -layers - 1 <= select <= layers:
        raise CheckpointError(
            f"{path}: 'vision_feature_layer' is {select!r:.60}, but the tower has {layers} layers"
        )
    kept = select if select >= 0 else layers + 1 + select
    return transformer_spec(path, config, kept, "quick_gelu")
