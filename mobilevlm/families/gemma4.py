"""Gemma 4 of its small sizes (E2B, E4B), with images: a tower on patches of an image's own shape
whose linear layers are clipped, averages of squares of patches, one matrix, and a decoder with
inputs of its own for each layer. Sound is not heard.

Official code: the class ``Gemma4ForConditionalGeneration`` of transformers and its processor.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

from mobilevlm.checkpoint import TensorRef, Weights, read_json
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.errors import CheckpointError, FileWarning
from mobilevlm.families.backbones import decoder_refs
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.gemma4_text import unused_names
from mobilevlm.families.hub import HubCheckpoint, open_hub
from mobilevlm.families.registry import Source, register
from mobilevlm.image_encoder import BOUNDS, NativeEncoder
from mobilevlm.input_spec import DynamicImage, InputSpec, LayoutSpec
from mobilevlm.spec import ModelSpec

_VISION: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16,
    "num_attention_heads": 12, "head_dim": 64, "rms_norm_eps": 1e-6, "pooling_kernel_size": 3,
    "patch_size": 16, "position_embedding_size": 10240, "use_clipped_linears": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}  # fmt: skip
"""Defaults of ``Gemma4VisionConfig``."""
_EXPECTED = {"attention_bias": False, "standardize": False,
             "hidden_activation": "gelu_pytorch_tanh"}  # fmt: skip
_TOKENS = 280
"""Default of ``max_soft_tokens``."""
_NORMS = {
    "norm1": "input_layernorm",
    "attn_output_norm": "post_attention_layernorm",
    "norm2": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_LINEARS = {
    **{f"attn.{part}_proj": f"self_attn.{part}_proj" for part in "qkv"},
    "attn.out_proj": "self_attn.o_proj",
    **{f"mlp.{part}_proj": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_SOUND = ("model.audio_tower.", "model.embed_audio.")


@register("gemma4", {"gemma4"}, keys={"text_config", "vision_config"}, ready_tokenizer=True)
def read_gemma4(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads E2B and E4B."""
    hub = open_hub(source)
    vision, (decoder, backbone) = _tower(hub), hub.decoder()
    begin, _ = hub.image_token("boi_token_id")
    row_id, mark = hub.image_token("image_token_id")
    end, _ = hub.image_token("eoi_token_id")
    layout = LayoutSpec(begin_ids=(begin,), end_ids=(end,), row_id=row_id)
    # Of averages, whose norm the factor sqrt(hidden_size) before it only changes by its epsilon.
    connector = ConnectorSpec(
        "pool", vision.hidden_size, decoder.hidden_size, 1, 0, 0, factor=vision.merge_size,
        bias=False, norm_kind="rms", norm_eps=vision.norm_eps / vision.hidden_size,
    )  # fmt: skip
    spec = ModelSpec(
        family="gemma4",
        name=source.name,
        inputs={"image": InputSpec(_preparation(hub, vision), vision, connector, layout)},
        decoder=decoder,
        conversation=hub.conversation(mark),
    )
    refs = decoder_refs(hub.files, decoder, backbone) | _tower_refs(hub, vision)
    skipped = unused_names(decoder, re.escape(backbone.root))
    return spec, hub.weights(refs, decoder, backbone, [*skipped, *_sound(hub)])


def _sound(hub: HubCheckpoint) -> list[str]:
    """Return patterns of the tensors that hear, which nothing reads; a warning names them."""
    names = [name for name in hub.files if name.startswith(_SOUND)]
    if names:
        warnings.warn(
            f"{hub.source.folder}: {len(names)} tensors of its sound encoder are not read "
            f"({names[0]}, …, {names[-1]}): this model is exported without sound",
            FileWarning,
            stacklevel=2,
        )
    return [re.escape(start) for start in _SOUND]


def _tower(hub: HubCheckpoint) -> NativeEncoder:
    """Return the tower.

    Raises:
        CheckpointError: a value is missing or wrong, or does not fit the others.
    """
    path = hub.path
    config = {**_VISION, **{key: value for key, value in hub.vision.items() if value is not None}}
    width, inner, depth, heads, patch, side, rows = (
        config_value(path, config, key, int)
        for key in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "patch_size", "pooling_kernel_size", "position_embedding_size",
        )
    )  # fmt: skip
    one = {"head_dim": width // heads, "num_key_value_heads": heads}
    check_only(path, config, {**_EXPECTED, **one})
    if width % heads or width // heads % 4:
        raise CheckpointError(
            f"{path}: the tower has 'hidden_size' {width} and {heads} heads, expected heads of a "
            f"multiple of 4 channels: rows and columns turn pairs of them"
        )
    rotary = config_value(path, config, "rope_parameters", dict)
    check_only(path, rotary, {"rope_type": "default"})
    return NativeEncoder(
        width, inner, depth, heads, patch, side, "gelu_tanh", "rms",
        config_value(path, config, "rms_norm_eps", float), "gated", frames=1,
        rope_theta=config_value(path, rotary, "rope_theta", float), bias=False, head_norms=True,
        post_norms=True, clipped=config_value(path, config, "use_clipped_linears", bool),
        axis_positions=rows,
    )  # fmt: skip


def _preparation(hub: HubCheckpoint, vision: NativeEncoder) -> DynamicImage:
    """Return how images are prepared.

    Raises:
        CheckpointError: a value is wrong, or does not fit the tower.
    """
    where, settings = hub.processor_path, hub.processor_that(normalizes=False)
    fixed = {"patch_size": vision.patch_size, "pooling_kernel_size": vision.merge_size,
             "resample": 3}  # fmt: skip
    check_only(where, settings, fixed)
    tokens = config_value(where, settings, "max_soft_tokens", int, _TOKENS)
    path = hub.source.folder_with("processor_config.json") / "processor_config.json"
    written = read_json(path).get("image_seq_length") if path.is_file() else None
    if written not in (None, tokens):
        raise CheckpointError(
            f"{path}: 'image_seq_length' is {written!r:.40}, but 'max_soft_tokens' is {tokens}: "
            f"these settings are of different models"
        )
    pixels = tokens * (vision.patch_size * vision.merge_size) ** 2
    half = (0.5, 0.5, 0.5)  # the tower makes 2x - 1 of x / 255
    return DynamicImage(
        vision.patch_size,
        vision.merge_size,
        pixels,
        pixels,
        half,
        half,
        fill_edge=vision.axis_positions * vision.patch_size,
    )


def _tower_refs(hub: HubCheckpoint, vision: NativeEncoder) -> dict[str, TensorRef]:
    """Return the tensors of the tower and the connector."""
    files, tower = hub.files, "model.vision_tower."
    patches, order = f"{tower}patch_embedder", _rotary_order(vision)
    heads = range(0, vision.hidden_size, vision.head_dim)
    rows = tuple(start + channel for start in heads for channel in order)
    places = f"{patches}.position_embedding_table"
    refs = {
        "vision.patch_embedding.weight": TensorRef(
            files, f"{patches}.input_proj.weight", joined=(3, 4, 1, 2)
        ),
        "vision.position_embedding.weight": TensorRef(files, places),
        "projector.mlp.0.weight": TensorRef(
            files, "model.embed_vision.embedding_projection.weight"
        ),
    }
    for index in range(vision.num_hidden_layers):
        ours, theirs = f"vision.layers.{index}", f"{tower}encoder.layers.{index}"
        for name, stored in _NORMS.items():
            refs[f"{ours}.{name}.weight"] = TensorRef(files, f"{theirs}.{stored}.weight")
        for part in "qk":
            stored = f"{theirs}.self_attn.{part}_norm.weight"
            refs[f"{ours}.attn.{part}_norm.weight"] = TensorRef(files, stored, order=order)
        for name, stored in _LINEARS.items():
            module, turned = f"{theirs}.{stored}", name in ("attn.q_proj", "attn.k_proj")
            weight = f"{module}.linear.weight" if vision.clipped else f"{module}.weight"
            refs[f"{ours}.{name}.weight"] = TensorRef(files, weight, order=rows if turned else ())
            for bound in BOUNDS if vision.clipped else ():
                refs[f"{ours}.{name}.{bound}"] = TensorRef(files, f"{module}.{bound}", scalar=True)
    return refs


def _rotary_order(vision: NativeEncoder) -> tuple[int, ...]:
    """Return the stored channels of a head in our order. In each half, of columns and of rows, they
    stand as first and second of pairs; here firsts of both, rows before columns, are before
    seconds."""
    quarter = vision.head_dim // 4
    starts = (2 * quarter, 0, 3 * quarter, quarter)
    return tuple(start + channel for start in starts for channel in range(quarter))
