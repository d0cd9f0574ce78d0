"""InternViT, the tower of InternVL, and the connector behind it: shape and tensor names.

What attention and the MLP add to the residual stream is multiplied by learned factors for each
channel (layer scale). They are folded into the rows of the linear layers before them when these are
read: the same function, and scales for each row take no notice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm.checkpoint import RowRange, TensorRef, Weights, check_presence
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import Backbone, decoder_refs, skipped_names
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.fused import Branch, FusedLayer, FusedTensors
from mobilevlm.families.hub import HubCheckpoint
from mobilevlm.families.towers import kept_layers, transformer_spec
from mobilevlm.image_encoder import TransformerEncoder

FACTOR = 2
"""Patches along an edge of the square that becomes one visual token."""


@dataclass(frozen=True)
class Names:
    """Names of one layout: tensors, and keys of the tower's configuration."""

    towers: tuple[str, ...]
    """Prefixes that the tower has been under."""
    class_token: str
    positions: str
    patches: str
    layers: str
    parts: dict[str, str]
    """Names of a layer's parts."""
    scales: dict[str, str]
    """Factors of a layer by what they are folded into."""
    connectors: tuple[str, ...]
    links: dict[str, str]
    """Names of the connector's parts."""
    defaults: dict[str, Any]
    """Defaults of the tower's configuration."""
    expected: dict[str, Any]
    """Settings of the 300M tower; 6B has norms of queries and keys, RMSNorm, and no biases."""
    fused_qkv: str | None = None


HUB = Names(
    ("vision_tower.", "model.vision_tower."),
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection",
    "encoder.layer",
    {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        **{f"attn.{part}_proj": f"attention.{part}_proj" for part in "qkv"},
        "attn.out_proj": "attention.projection_layer",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    {"attn.out_proj": "lambda_1", "mlp.fc2": "lambda_2"},
    ("multi_modal_projector.", "model.multi_modal_projector."),
    {"norm": "layer_norm", "mlp.0": "linear_1", "mlp.1": "linear_2"},
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
     "num_attention_heads": 16, "image_size": 448, "patch_size": 14, "layer_norm_eps": 1e-6,
     "attention_bias": False},
    {"attention_bias": True, "use_qk_norm": False, "norm_type": "layer_norm",
     "use_mean_pooling": True, "use_absolute_position_embeddings": True},
)  # fmt: skip
OPENGVLAB = Names(
    ("vision_model.",),
    "embeddings.class_embedding",
    "embeddings.position_embedding",
    "embeddings.patch_embedding",
    "encoder.layers",
    {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.out_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    {"attn.out_proj": "ls1", "mlp.fc2": "ls2"},
    ("mlp1.",),
    {"norm": "0", "mlp.0": "1", "mlp.1": "3"},
    {"hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 48,
     "num_attention_heads": 25, "image_size": 224, "patch_size": 14, "layer_norm_eps": 1e-6,
     "qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm"},
    {"qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"},
    fused_qkv="attn.qkv",
)  # fmt: skip


def intern_vit(
    path: Path, names: Names, config: dict[str, Any], outer: dict[str, Any], key: str
) -> TransformerEncoder:
    """Return the tower of a configuration as far as the layer that ``key`` of the model's names.

    Raises:
        CheckpointError: it is another one, its grid cannot be split into squares, or a value is
            missing or wrong.
    """
    given = {key: value for key, value in config.items() if value is not None}
    config = {**names.defaults, **given}
    check_only(path, config, names.expected)
    config |= {key: _edge(path, config, key) for key in ("image_size", "patch_size")}
    layers = config_value(path, config, "num_hidden_layers", int)
    kept = kept_layers(path, outer, key, -1, layers)
    vision = transformer_spec(path, config, kept, "gelu", patch_bias=True, pre_norm=False)
    if vision.grid % FACTOR:
        raise CheckpointError(
            f"{path}: 'image_size' {vision.image_size} is {vision.grid} patches of "
            f"{vision.patch_size} along an edge, expected a multiple of {FACTOR}: so many become "
            f"one visual token"
        )
    return vision


def intern_weights(
    hub: HubCheckpoint,
    names: Names,
    vision: TransformerEncoder,
    decoder: DecoderSpec,
    backbone: Backbone,
) -> Weights:
    """Return all tensors of a checkpoint, layer scale folded.

    Raises:
        CheckpointError: some are missing, or nothing reads them.
    """
    tower = hub.prefix(names.towers, names.class_token)
    link = hub.prefix(names.connectors, f"{names.links['norm']}.weight")
    layers = dict(_scaled_layers(vision, names, f"{tower}{names.layers}"))
    files = FusedTensors(hub.files, layers)
    refs = decoder_refs(files, decoder, backbone) | _tower_refs(files, names, vision, tower)
    for ours, theirs in names.links.items():
        for part in ("weight", "bias"):
            refs[f"projector.{ours}.{part}"] = TensorRef(files, f"{link}{theirs}.{part}")
    check_presence(refs)
    numbers = "|".join(
        map(str, range(vision.num_hidden_layers, hub.vision.get("num_hidden_layers", 0)))
    )
    dropped = rf"{re.escape(f'{tower}{names.layers}')}\.({numbers or '(?!)'})\."
    hub.source.check_unread(refs, files, [*skipped_names(decoder, backbone), dropped])
    return Weights(refs)


def _scaled_layers(
    vision: TransformerEncoder, names: Names, layers: str
) -> Iterator[tuple[str, FusedLayer]]:
    """Yield the linear layers whose output layer scale multiplies."""
    size = vision.hidden_size
    for index in range(vision.num_hidden_layers):
        for ours, scale in names.scales.items():
            module = f"{layers}.{index}.{names.parts[ours]}"
            shape = size, vision.intermediate_size if ours == "mlp.fc2" else size
            yield module, FusedLayer(shape, (Branch(module, factors=f"{layers}.{index}.{scale}"),))


def _tower_refs(
    files: FusedTensors, names: Names, vision: TransformerEncoder, tower: str
) -> dict[str, TensorRef]:
    refs = {
        "vision.class_embedding": TensorRef(files, f"{tower}{names.class_token}", outer=2),
        "vision.position_embedding.weight": TensorRef(files, f"{tower}{names.positions}", outer=1),
    }
    size = vision.hidden_size
    for part in ("weight", "bias"):
        stored = f"{tower}{names.patches}.{part}"
        refs[f"vision.patch_embedding.{part}"] = TensorRef(files, stored)
        for index in range(vision.num_hidden_layers):
            ours, theirs = f"vision.layers.{index}", f"{tower}{names.layers}.{index}"
            for name, other in names.parts.items():
                refs[f"{ours}.{name}.{part}"] = TensorRef(files, f"{theirs}.{other}.{part}")
            if names.fused_qkv is None:
                continue
            for place, name in enumerate("qkv"):
                rows = RowRange(place * size, (place + 1) * size, 3 * size)
                stored = f"{theirs}.{names.fused_qkv}.{part}"
                refs[f"{ours}.attn.{name}_proj.{part}"] = TensorRef(files, stored, rows)
    return refs


def _edge(path: Path, config: dict[str, Any], key: str) -> int:
    """Return an edge in pixels, which may be given for both directions."""
    value = config[key]
    both = value if isinstance(value, list) and len(value) == 2 else [value, value]
    if both[0] != both[1]:
        raise CheckpointError(f"{path}: {key!r} is {value!r:.60}, expected a square")
    return config_value(path, {key: both[0]}, key, int)
