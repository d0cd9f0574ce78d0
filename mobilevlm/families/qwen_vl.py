"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: a tower on images near their own size, a merger, and
Qwen2, Qwen3 or Qwen3.5 with positions of three axes.

Official code: the classes ``Qwen2VLForConditionalGeneration``, ``Qwen2_5_VL…``, ``Qwen3VL…`` and
``Qwen3_5…`` of transformers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.checkpoint import Weights
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import decoder_refs
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.hub import HubCheckpoint, open_hub
from mobilevlm.families.qwen_tower import KINDS, THIRD, read_tower, tower_refs
from mobilevlm.families.registry import Source, register
from mobilevlm.families.towers import CLIP_MEAN, CLIP_STD, channels
from mobilevlm.image_encoder import NativeEncoder
from mobilevlm.input_spec import MOST_FRAMES, ClipSpec, DynamicImage, InputSpec, LayoutSpec
from mobilevlm.spec import ModelSpec

_PIXELS = {"qwen2_vl": (56**2, 28**2 * 1280), "qwen2_5_vl": (56**2, 28**2 * 1280),
           "qwen3_vl": (65536, 16777216), "qwen3_5": (65536, 16777216)}  # fmt: skip
"""Least and greatest numbers of pixels where the processor's file has none."""
_FRAME_ROWS = 768
"""Visual tokens of a frame of a clip, at most, in Qwen's own loader."""


@register("qwen_vl", set(KINDS), keys={"vision_config"}, ready_tokenizer=True)
def read_qwen_vl(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads all four, with the language model's keys at the top level or in ``text_config``."""
    kind = source.config["model_type"]
    if "text_config" not in source.config:
        flat = {key: value for key, value in source.config.items() if key != "vision_config"}
        text = {**flat, "model_type": f"{kind}_text"}
        source = replace(source, config={**source.config, "text_config": text})
    hub = open_hub(source)
    decoder, backbone = hub.decoder()
    vision = read_tower(hub, kind)
    decoder = replace(decoder, deep_layers=tuple(range(len(vision.deep_layers))))
    if len(vision.deep_layers) > decoder.num_hidden_layers:
        raise CheckpointError(
            f"{hub.path}: 'deepstack_visual_indexes' has {len(vision.deep_layers)} layers, but the "
            f"language model has {decoder.num_hidden_layers}"
        )
    connector = ConnectorSpec(
        "merger", vision.hidden_size, decoder.hidden_size, 2, 0, 0, factor=vision.merge_size,
        inner_size=vision.hidden_size * vision.square, norm_kind=vision.norm,
        norm_eps=vision.norm_eps, deep=len(vision.deep_layers),
    )  # fmt: skip
    row_id, mark = hub.image_token("image_token_id")
    video_id = None
    if hub.source.config.get("video_token_id") is not None:
        video_id = hub.image_token("video_token_id")[0]
    spec = ModelSpec(
        family="qwen3_5" if kind == "qwen3_5" else "qwen_vl",
        name=source.name,
        inputs={
            "image": InputSpec(
                _preparation(hub, vision, kind),
                vision,
                connector,
                LayoutSpec(row_id=row_id, video_row_id=video_id),
            )
        },
        decoder=decoder,
        conversation=hub.conversation(mark),
    )
    refs = decoder_refs(hub.files, decoder, backbone) | tower_refs(hub, vision)
    return spec, hub.weights(refs, decoder, backbone)


def _preparation(hub: HubCheckpoint, vision: NativeEncoder, kind: str) -> DynamicImage:
    """Return the settings of the image and the video processor.

    Raises:
        CheckpointError: a value is wrong, or does not fit the tower.
    """
    where, settings = hub.processor_path, hub.processor
    least, most = _pixels(where, settings, vision, *_PIXELS[kind])
    mean, std = ((0.5,) * 3, (0.5,) * 3) if kind in THIRD else (CLIP_MEAN, CLIP_STD)
    image = DynamicImage(
        vision.patch_size, vision.merge_size, least, most,
        channels(settings.get("image_mean"), mean, str(where), "image_mean"),
        channels(settings.get("image_std"), std, str(where), "image_std"),
    )  # fmt: skip
    return replace(image, clip=_clip(hub, vision, kind, image))


def _clip(hub: HubCheckpoint, vision: NativeEncoder, kind: str, image: DynamicImage) -> ClipSpec:
    """Return the settings of the video processor. Frames have at most the visual tokens that Qwen's
    own loader gives them, unless it says otherwise.

    Raises:
        CheckpointError: as of :func:`_preparation`, or pixels are normalized otherwise than images.
    """
    unit, is_third = image.factor**2, kind in THIRD
    largest = _FRAME_ROWS * unit
    where, settings = hub.video_processor or (hub.processor_path, {})
    usual = (image.min_pixels, max(min(image.max_pixels, largest), image.min_pixels, unit))
    if is_third:
        usual = (128 * unit, largest)
    least, most = _pixels(where, settings, vision, *usual)
    for key in ("image_mean", "image_std"):
        own = getattr(image, key.removeprefix("image_"))
        if channels(settings.get(key), own, str(where), key) != own:
            raise CheckpointError(
                f"{where}: {key!r} is {settings[key]!r:.60}, expected that of images, {list(own)}"
            )
    if settings.get("num_frames") is not None:
        raise CheckpointError(
            f"{where}: 'num_frames' is {settings['num_frames']!r:.60}, expected 'fps': the number "
            f"of frames follows from the length of a video"
        )
    fewest = config_value(where, settings, "min_frames", int, 4)
    highest = config_value(where, settings, "max_frames", int, 768)
    if not fewest <= highest <= MOST_FRAMES:
        raise CheckpointError(
            f"{where}: 'max_frames' is {highest}, expected {fewest} ('min_frames') to {MOST_FRAMES}"
        )
    sampling: dict[str, Any] = {
        "frames_per_second": config_value(where, settings, "fps", float, 2.0),
        "min_frames": fewest,
        "max_frames": highest,
    }
    if is_third:
        return ClipSpec(least, largest, most, **sampling, tells_times=True)
    pace = 0.0
    if kind == "qwen2_5_vl":
        pace = config_value(hub.path, hub.vision, "tokens_per_second", float, 2.0)
    return ClipSpec(least, most, **sampling, sampling="parts", positions_per_second=pace)


def _pixels(
    where: Path, settings: dict[str, Any], vision: NativeEncoder, least: int, most: int
) -> tuple[int, int]:
    """Return the least and greatest numbers of pixels that a processor's settings give, else these:
    they have keys of their own, else they are called edges.

    Raises:
        CheckpointError: they hold no visual token, or another setting does not fit the tower.
    """
    parts = {"patch_size": vision.patch_size, "merge_size": vision.merge_size,
             "temporal_patch_size": vision.frames, "resample": 3}  # fmt: skip
    check_only(where, settings, parts)
    edges = config_value(where, settings, "size", dict, {})
    least, most = (
        config_value(where, settings, key, int, config_value(where, edges, edge, int, default))
        for edge, key, default in (
            ("shortest_edge", "min_pixels", least),
            ("longest_edge", "max_pixels", most),
        )
    )
    unit = (vision.patch_size * vision.merge_size) ** 2
    if not least <= most or most < unit:
        raise CheckpointError(
            f"{where}: images have {least} to {most} pixels, expected a range that reaches {unit}, "
            f"one visual token"
        )
    return least, most
