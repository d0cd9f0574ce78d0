"""Gemma 3: a SigLIP tower whose features are averaged, normalised and multiplied by one matrix, and
a decoder that sees the rows of an image in both directions.

Official code: ``Gemma3ForConditionalGeneration`` of transformers and its processor, without pan and
scan.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from mobilevlm.checkpoint import TensorRef, Weights, read_json
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import decoder_refs
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.hub import HubCheckpoint, open_hub
from mobilevlm.families.registry import Source, register
from mobilevlm.families.towers import (
    SIGLIP,
    SIGLIP_DEFAULTS,
    Tower,
    image_spec,
    transformer_spec,
)
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import InputSpec, LayoutSpec
from mobilevlm.spec import ModelSpec
from mobilevlm.state_buffers import LONGEST_RUN

_TOWERS = ("model.vision_tower.", "vision_tower.")
_PROJECTORS = ("model.multi_modal_projector.", "multi_modal_projector.")
_NORM, _MATRIX = "mm_soft_emb_norm.weight", "mm_input_projection_weight"
_MARGIN = "\n\n"
"""Stands on both sides of an image (``Gemma3Processor``)."""
_ABSENT: dict[str, Any] = {"do_pan_and_scan": False}
"""Settings of the processor that would change the ids or the images."""


@register("gemma3", {"gemma3"}, keys={"text_config", "vision_config"}, ready_tokenizer=True)
def read_gemma3(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads a checkpoint of Gemma 3 with images."""
    hub = open_hub(source)
    check_only(hub.processor_path, hub.processor, _ABSENT)
    vision = _tower(hub)
    decoder, backbone = hub.decoder()
    decoder = replace(decoder, image_blocks=True)
    connector = _connector(hub, vision, decoder.hidden_size)
    tower = Tower(str(hub.path), hub.vision, hub.processor, source.folder)
    row_id, _ = hub.image_token("image_token_id", "image_token_index")
    begin, mark = hub.image_token("boi_token_id", "boi_token_index")
    end, _ = hub.image_token("eoi_token_id", "eoi_token_index")
    layout = LayoutSpec(begin_ids=(begin,), end_ids=(end,), row_id=row_id)
    preparation = image_spec(tower, vision, "resize", "bilinear")
    spec = ModelSpec(
        family="gemma3",
        name=source.name,
        inputs={"image": InputSpec(preparation, vision, connector, layout)},
        decoder=decoder,
        conversation=hub.conversation(mark, image_margin=_MARGIN),
    )
    tower_refs, skipped = hub.tower_refs(vision, _TOWERS)
    refs = decoder_refs(hub.files, decoder, backbone) | tower_refs
    between = hub.prefix(_PROJECTORS, _MATRIX)
    refs["projector.norm.weight"] = TensorRef(hub.files, between + _NORM, added=1.0)
    refs["projector.mlp.0.weight"] = TensorRef(hub.files, between + _MATRIX, transposed=True)
    return spec, hub.weights(refs, decoder, backbone, skipped)


def _tower(hub: HubCheckpoint) -> TransformerEncoder:
    given = {key: value for key, value in hub.vision.items() if value is not None}
    check_only(hub.path, given, {"model_type": "siglip_vision_model", "num_channels": 3})
    config = {**SIGLIP_DEFAULTS, **given}
    layers = config_value(hub.path, config, "num_hidden_layers", int)
    return transformer_spec(hub.path, config, layers, "gelu_pytorch_tanh", **SIGLIP, post_norm=True)


def _connector(hub: HubCheckpoint, vision: TransformerEncoder, out_size: int) -> ConnectorSpec:
    """Return the averaging connector, whose squares fill the tower's grid.

    Raises:
        CheckpointError: they do not, or the processor writes another number of tokens.
    """
    config = hub.source.config
    tokens = config_value(hub.path, config, "mm_tokens_per_image", int, 256)
    side = math.isqrt(tokens)
    if side * side != tokens or vision.grid % side or tokens > LONGEST_RUN:
        raise CheckpointError(
            f"{hub.path}: 'mm_tokens_per_image' is {tokens}, expected the square of a divisor of "
            f"the tower's {vision.grid} patches per edge ('image_size' over 'patch_size'), up to "
            f"{LONGEST_RUN}"
        )
    path = hub.source.folder_with("processor_config.json") / "processor_config.json"
    settings = read_json(path) if path.is_file() else {}
    written = config_value(path, settings, "image_seq_length", int, tokens)
    if written != tokens:
        raise CheckpointError(
            f"{path}: 'image_seq_length' is {written}, but 'mm_tokens_per_image' in config.json is "
            f"{tokens}: these files are of different models"
        )
    return ConnectorSpec(
        "mlp",
        vision.hidden_size,
        out_size,
        1,
        vision.grid,
        side,
        bias=False,
        pool_norm_eps=vision.layer_norm_eps,
    )
