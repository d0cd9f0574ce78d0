"""LFM2-VL: a SigLIP 2 tower on patches of an image's own shape, tiles of large images and the whole
made small, squares of patches joined before an MLP, and LFM2.

Official code: the class ``Lfm2VlForConditionalGeneration`` of transformers and its processor.
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
from mobilevlm.families.internvl import tile_counts
from mobilevlm.families.registry import Source, register
from mobilevlm.families.towers import (
    SIGLIP,
    SIGLIP_MEAN,
    SIGLIP_STD,
    channels,
    transformer_spec,
)
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import MOST_PATCHES, DynamicImage, DynamicTiles, InputSpec, LayoutSpec
from mobilevlm.spec import ModelSpec
from mobilevlm.tokenizers.tokenizer import token_text, tokenizer_settings

_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
           "num_attention_heads": 12, "num_patches": 256, "patch_size": 16, "num_channels": 3,
           "layer_norm_eps": 1e-6}  # fmt: skip
"""Defaults of ``Siglip2VisionConfig``."""
_TILES: dict[str, Any] = {
    "downsample_factor": 2, "encoder_patch_size": 16, "tile_size": 512, "max_pixels_tolerance": 2.0,
    "min_image_tokens": 64, "max_image_tokens": 256, "min_tiles": 2, "max_tiles": 10,
    "do_image_splitting": True, "use_thumbnail": True}  # fmt: skip
"""Defaults of ``Lfm2VlImageProcessorFast``."""
_EXPECTED = {"projector_hidden_act": "gelu", "vision_feature_layer": -1}
_TOWERS = ("model.vision_tower.", "vision_tower.")
_PROJECTORS = ("model.multi_modal_projector.", "multi_modal_projector.")
_PARTS = ("weight", "bias")
_MARKS = {
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail": "<|img_thumbnail|>",
}
"""Tokens around an image, by their keys in tokenizer_config.json."""


@register("lfm2_vl", {"lfm2_vl", "lfm2-vl"}, keys={"text_config", "vision_config"},
          ready_tokenizer=True)  # fmt: skip
def read_lfm2_vl(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads LFM2-VL and LFM2.5-VL."""
    hub = open_hub(source)
    check_only(hub.path, source.config, _EXPECTED)
    vision, (decoder, backbone) = _tower(hub), hub.decoder()
    factor = config_value(hub.path, source.config, "downsample_factor", int, 2)
    tiles = _tiles(hub, vision, factor)
    row_id, mark = hub.image_token("image_token_id", "image_token_index")
    connector = _connector(hub, vision, decoder.hidden_size, factor)
    spec = ModelSpec(
        family="lfm2_vl",
        name=source.name,
        inputs={"image": InputSpec(tiles, vision, connector, _layout(hub, tiles, row_id))},
        decoder=decoder,
        conversation=hub.conversation(mark),
    )
    tower_refs, skipped = hub.tower_refs(vision, _TOWERS)
    refs = decoder_refs(hub.files, decoder, backbone) | tower_refs
    patches = "vision.patch_embedding.weight"
    refs[patches] = replace(refs[patches], joined=(2, 3, 1))
    place = hub.prefix(_PROJECTORS, "linear_1.weight")
    for ours, theirs, parts in (
        ("norm", "layer_norm", _PARTS if connector.norm else ()),
        ("mlp.0", "linear_1", _PARTS if connector.bias else _PARTS[:1]),
        ("mlp.1", "linear_2", _PARTS if connector.bias else _PARTS[:1]),
    ):
        for part in parts:
            refs[f"projector.{ours}.{part}"] = TensorRef(hub.files, f"{place}{theirs}.{part}")
    return spec, hub.weights(refs, decoder, backbone, skipped)


def _tower(hub: HubCheckpoint) -> TransformerEncoder:
    """Return the tower, whose table of positions is a square."""
    config = {**_VISION, **{key: value for key, value in hub.vision.items() if value is not None}}
    check_only(hub.path, config, {"num_channels": 3})
    patches = config_value(hub.path, config, "num_patches", int)
    if math.isqrt(patches) ** 2 != patches:
        raise CheckpointError(f"{hub.path}: 'num_patches' is {patches}, expected a square number")
    config["image_size"] = math.isqrt(patches) * config_value(hub.path, config, "patch_size", int)
    layers = config_value(hub.path, config, "num_hidden_layers", int)
    traits = {**SIGLIP, "post_norm": True, "resized_positions": True}
    return transformer_spec(hub.path, config, layers, "gelu_pytorch_tanh", **traits)


def _connector(
    hub: HubCheckpoint, vision: TransformerEncoder, out_size: int, factor: int
) -> ConnectorSpec:
    config = hub.source.config
    return ConnectorSpec(
        "mlp_downsample",
        vision.hidden_size,
        out_size,
        2,
        vision.grid,
        -(-vision.grid // factor),
        factor=factor,
        norm=config_value(hub.path, config, "projector_use_layernorm", bool, True),
        bias=config_value(hub.path, config, "projector_bias", bool, True),
        inner_size=config_value(hub.path, config, "projector_hidden_size", int, 2560),
    )


def _tiles(hub: HubCheckpoint, vision: TransformerEncoder, factor: int) -> DynamicTiles:
    """Return how images are prepared, by the image processor's settings. ``factor``: patches along
    each edge of a visual token.

    Raises:
        CheckpointError: a value is wrong, or does not fit the model.
    """
    where = hub.processor_path
    settings = {**_TILES, **{key: item for key, item in hub.processor.items() if item is not None}}
    patch = vision.patch_size
    expected = {"resample": 2, "encoder_patch_size": patch, "downsample_factor": factor}
    check_only(where, settings, expected)
    area = (patch * factor) ** 2
    least, most = (
        area * config_value(where, settings, f"{end}_image_tokens", int) for end in ("min", "max")
    )
    size = config_value(where, settings, "tile_size", int)
    if not least <= most <= MOST_PATCHES * patch**2 or size**2 % area:
        raise CheckpointError(
            f"{where}: 'min_image_tokens', 'max_image_tokens' and 'tile_size' are {least // area}, "
            f"{most // area} and {size}, expected a range and a multiple of {math.isqrt(area)}"
        )
    splits = config_value(where, settings, "do_image_splitting", bool)
    tiles = tile_counts(where, settings, "min_tiles", "max_tiles") if splits else (1, 1)
    mean, std = (
        channels(settings.get(key), default, str(where), key)
        for key, default in (("image_mean", SIGLIP_MEAN), ("image_std", SIGLIP_STD))
    )
    whole = DynamicImage(patch, factor, least, most, mean, std, "torch_bilinear", least_edge=True)
    tolerance = config_value(where, settings, "max_pixels_tolerance", float)
    thumbnail = config_value(where, settings, "use_thumbnail", bool)
    return DynamicTiles(size, *tiles, whole, int(most * tolerance), thumbnail)


def _layout(hub: HubCheckpoint, tiles: DynamicTiles, row_id: int) -> LayoutSpec:
    """Return the ids around an image and its tiles."""
    path = hub.source.folder_with("processor_config.json") / "processor_config.json"
    settings = {**hub.source.config, **(read_json(path) if path.is_file() else {})}
    if not config_value(path, settings, "use_image_special_tokens", bool, True):
        return LayoutSpec(row_id=row_id)
    named = tokenizer_settings(hub.source.folder)
    begin, end, small = (
        (hub.token_id(token_text(named.get(key)) or text),) for key, text in _MARKS.items()
    )
    most = tiles.max_tiles if tiles.max_tiles > 1 else 0
    marks = tuple(
        tuple((hub.token_id(f"<|img_row_{row}_col_{column}|>"),)
              for column in range(1, most // row + 1))
        for row in range(1, most + 1)
    )  # fmt: skip
    return LayoutSpec(end, row_id=row_id, begin_ids=begin, tile_ids=marks, thumbnail_ids=small)
