"""InternVL3 and 3.5: an InternViT tower on tiles of the image's shape, squares of patches joined
before an MLP, and Qwen2 or Qwen3.

Official code: the class ``InternVLForConditionalGeneration`` of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilevlm.checkpoint import Weights
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.hub import HubCheckpoint, open_hub
from mobilevlm.families.intern_vit import FACTOR, HUB, intern_vit, intern_weights
from mobilevlm.families.registry import Source, register
from mobilevlm.families.towers import channels, pixel_edge
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import MOST_TILES, AspectTiles, InputSpec, LayoutSpec
from mobilevlm.spec import ModelSpec
from mobilevlm.tokenizers.tokenizer import token_text, tokenizer_settings

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_EXPECTED = {
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "downsample_ratio": 1 / FACTOR,
}
_MARKS = {"start_image_token": "<img>", "end_image_token": "</img>"}
"""Tokens around an image, by their keys in tokenizer_config.json."""


@register("internvl", {"internvl"}, keys={"text_config", "vision_config"}, ready_tokenizer=True)
def read_internvl(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads InternVL in the hub's layout."""
    hub = open_hub(source)
    check_only(hub.path, source.config, _EXPECTED)
    vision = intern_vit(hub.path, HUB, hub.vision, source.config, "vision_feature_layer")
    row_id, mark = hub.image_token("image_token_id", "image_token_index")
    settings = tokenizer_settings(source.folder)
    begin, end = (
        hub.token_id(token_text(settings.get(key)) or usual) for key, usual in _MARKS.items()
    )
    decoder, backbone = hub.decoder()
    spec = ModelSpec(
        family="internvl",
        name=source.name,
        inputs={
            "image": InputSpec(
                _preparation(hub, vision),
                vision,
                connector(vision, decoder.hidden_size),
                LayoutSpec(begin_ids=(begin,), end_ids=(end,), row_id=row_id),
            )
        },
        decoder=decoder,
        conversation=hub.conversation(mark),
    )
    return spec, intern_weights(hub, HUB, vision, decoder, backbone)


def connector(vision: TransformerEncoder, out_size: int) -> ConnectorSpec:
    """Return the connector: joined patches, norm, an MLP of two layers."""
    return ConnectorSpec(
        "mlp_downsample", vision.hidden_size, out_size, 2, vision.grid, vision.grid // FACTOR
    )


def _preparation(hub: HubCheckpoint, vision: TransformerEncoder) -> AspectTiles:
    """Return the tiles of the image processor's settings.

    Raises:
        CheckpointError: a value is wrong, or asks for what is not supported.
    """
    where, settings = hub.processor_path, hub.processor
    check_only(where, settings, {"resample": 3})  # crop_to_patches: the processor sets it
    size = pixel_edge(settings.get("size"), vision.image_size, str(where), "size")
    if size != vision.image_size:
        raise CheckpointError(
            f"{where}: 'size' is {size}, but the tower takes {vision.image_size} pixels"
        )
    least, most = tile_counts(where, settings, "min_patches", "max_patches")
    return AspectTiles(
        size,
        least,
        most,
        channels(settings.get("image_mean"), IMAGENET_MEAN, str(where), "image_mean"),
        channels(settings.get("image_std"), IMAGENET_STD, str(where), "image_std"),
    )


def tile_counts(
    path: Path, settings: dict[str, Any], least: str, most: str, default: int = 12
) -> tuple[int, int]:
    """Return how many tiles a grid has at least and at most, by their keys; ``default``: at most.

    Raises:
        CheckpointError: they are no range, or more than :data:`MOST_TILES`.
    """
    fewest, largest = (
        config_value(path, settings, key, int, default) for key, default in ((least, 1), (most, 12))
    )
    if not fewest <= largest <= MOST_TILES:
        raise CheckpointError(
            f"{path}: {least!r} and {most!r} are {fewest} and {largest}, expected a range of tiles "
            f"up to {MOST_TILES}"
        )
    return fewest, largest
