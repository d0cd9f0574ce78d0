"""Janus-Pro in the hub's layout: a SigLIP-like tower, an MLP and a Llama that answers; a head for
codes and a decoder of them that draws.

Official code: the class ``JanusForConditionalGeneration`` of transformers and its processor.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mobilevlm.checkpoint import TensorRef, Weights, read_json
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import decoder_refs
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.hub import HubCheckpoint, open_hub
from mobilevlm.families.janus_drawing import drawing_refs, read_drawing, unread_names
from mobilevlm.families.registry import Source, register
from mobilevlm.families.towers import SIGLIP, Tower, image_spec, transformer_spec
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import FixedImage, InputSpec, LayoutSpec
from mobilevlm.spec import ModelSpec
from mobilevlm.tokenizers.tokenizer import token_text, tokenizer_settings

_VISION: dict[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_channels": 3,
    "patch_size": 16, "image_size": 384, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
    "mlp_ratio": 4.0, "attention_bias": True, "use_qk_norm": False, "depth": 2,
    "num_image_tokens": 576, "model_type": "janus_vision_model"}  # fmt: skip
"""Defaults of ``JanusVisionConfig``."""
_ONLY = {"hidden_act": "gelu", "attention_bias": True, "use_qk_norm": False, "num_channels": 3}
DEFAULT_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language.\n\n"
)
"""Goes before the text of each prompt, where the processor's settings say so (its
``DEFAULT_SYSTEM_PROMPT``)."""
_ROOTS = ("model.", "")
_MARKS = {"boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
"""Tokens around an image, by their keys in tokenizer_config.json."""
_SMALLEST_EDGE = 14
"""Default of the image processor's ``min_size``."""


@dataclass(frozen=True)
class JanusLayout:
    """How a checkpoint differs from the hub's layout."""

    before: str
    """Template text before the conversation, but not before prompts of images"""
    template: str | None = None
    """Chat template of a checkpoint that brings none"""
    stored: Callable[[TensorRef], TensorRef] = lambda ref: ref
    """Place of a tensor, given the one in the hub's layout"""
    unread: tuple[str, ...] = tuple(unread_names())
    """Regular expressions of tensors that nobody reads"""


@register("janus", {"janus"}, keys={"text_config", "vision_config"}, ready_tokenizer=True)
def read_janus(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads a checkpoint of Janus or Janus-Pro."""
    spoken = f"{{{{- {json.dumps(DEFAULT_SYSTEM)} -}}}}" if _processor(source) else ""
    return read_layout(source, JanusLayout(spoken))


def read_layout(source: Source, layout: JanusLayout) -> tuple[ModelSpec, Weights]:
    """Read a checkpoint whose configuration has the hub's keys."""
    hub = open_hub(source)
    settings = {**_VISION, **{key: item for key, item in hub.vision.items() if item is not None}}
    vision, (decoder, backbone) = _tower(hub, settings), hub.decoder()
    depth = config_value(hub.path, settings, "depth", int)
    grid = vision.grid
    connector = ConnectorSpec("mlp", vision.hidden_size, decoder.hidden_size, depth, grid, grid)
    preparation = _preparation(hub, vision)
    row_id, mark = hub.image_token("image_token_id", "image_token_index")
    named = tokenizer_settings(source.folder)
    begin, end = (hub.token_id(token_text(named.get(key)) or text) for key, text in _MARKS.items())
    marks = LayoutSpec(begin_ids=(begin,), end_ids=(end,), row_id=row_id)
    plain = hub.conversation(mark, otherwise=layout.template)
    drawing = read_drawing(hub, decoder, plain.chat_template, begin)
    spec = ModelSpec(
        family="janus",
        name=source.name,
        inputs={"image": InputSpec(preparation, vision, connector, marks)},
        decoder=decoder,
        conversation=hub.conversation(mark, before=layout.before, otherwise=layout.template),
        outputs={"image": drawing},
    )
    tower_refs, skipped = hub.tower_refs(vision, _ROOTS)
    refs = decoder_refs(hub.files, decoder, backbone) | {
        ours: replace(ref, name=ref.name.replace(".out_proj.", ".projection_layer."))
        for ours, ref in tower_refs.items()
    }
    place = hub.prefix(_ROOTS, "aligner.fc1.weight")
    for index in range(depth):
        theirs = f"{place}aligner.{'fc1' if index == 0 else f'hidden_layers.{index - 1}'}"
        for part in ("weight", "bias"):
            refs[f"projector.mlp.{index}.{part}"] = TensorRef(hub.files, f"{theirs}.{part}")
    refs |= drawing_refs(hub, drawing, decoder.hidden_size)
    refs = {ours: layout.stored(ref) for ours, ref in refs.items()}
    return spec, hub.weights(refs, decoder, backbone, [*skipped, *layout.unread])


def _tower(hub: HubCheckpoint, config: dict[str, Any]) -> TransformerEncoder:
    """Return the tower, whose MLP is a multiple of its width."""
    check_only(hub.path, config, {**_ONLY, "model_type": "janus_vision_model"})
    width = config_value(hub.path, config, "hidden_size", int)
    ratio = config_value(hub.path, config, "mlp_ratio", float)
    sized = {**config, "intermediate_size": int(width * ratio)}
    layers = config_value(hub.path, config, "num_hidden_layers", int)
    vision = transformer_spec(hub.path, sized, layers, "gelu", **SIGLIP, post_norm=True)
    tokens = config_value(hub.path, config, "num_image_tokens", int)
    if tokens != vision.num_patches:
        raise CheckpointError(
            f"{hub.path}: 'num_image_tokens' is {tokens}, but the tower has {vision.num_patches} "
            f"patches ('image_size' over 'patch_size', squared)"
        )
    return vision


def _preparation(hub: HubCheckpoint, vision: TransformerEncoder) -> FixedImage:
    """Return how images are prepared: resized by the longer edge, then padded.

    Raises:
        CheckpointError: a setting is wrong, or not supported.
    """
    where, settings = hub.processor_path, hub.processor
    check_only(where, settings, {"do_pad": True, "image_size": vision.image_size})
    square = image_spec(Tower(str(where), hub.vision, settings, None), vision, "fit")
    if any(settings.get(key) is None for key in ("image_mean", "image_std")):
        raise CheckpointError(f"{where}: 'image_mean' and 'image_std' are missing")
    if square.shortest_edge != square.size:
        raise CheckpointError(
            f"{where}: 'size' is {square.shortest_edge}, but the tower takes {square.size} pixels"
        )
    color = list(square.pad_color)
    if settings.get("background_color", color) not in (color, tuple(color)):
        raise CheckpointError(
            f"{where}: 'background_color' is {settings['background_color']!r:.60}, expected the "
            f"mean colour, {color}"
        )
    least = config_value(where, settings, "min_size", int, _SMALLEST_EDGE)
    return replace(square, shortest_edge=min(least, square.size))


def _processor(source: Source) -> bool:
    """Return whether prompts begin with the default system prompt."""
    path = source.folder_with("processor_config.json") / "processor_config.json"
    settings = read_json(path) if path.is_file() else {}
    return config_value(path, settings, "use_default_system_prompt", bool, False)
