"""Towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, and the mergers behind them: their keys in
config.json and their tensor names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mobilevlm.checkpoint import RowRange, TensorRef
from mobilevlm.errors import CheckpointError
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.hub import HubCheckpoint
from mobilevlm.image_encoder import NativeEncoder

_TOWERS = ("model.visual.", "visual.")
_ACTIVATIONS: dict[str, Literal["silu", "quick_gelu", "gelu_tanh"]] = {
    "silu": "silu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_MERGER = ("ln_q", "mlp.0", "mlp.2")
_MERGER_3 = ("norm", "linear_fc1", "linear_fc2")
_LAYER = {"norm": "layer", "mlp": "plain"}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (
        {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4,
         "hidden_act": "quick_gelu", "patch_size": 14},
        _LAYER,
    ),
    "qwen2_5_vl": (
        {"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16,
         "hidden_act": "silu", "patch_size": 14, "window_size": 112,
         "fullatt_block_indexes": [7, 15, 23, 31]},
        {"norm": "rms", "mlp": "gated"},
    ),
    "qwen3_vl": (
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
         "hidden_act": "gelu_pytorch_tanh", "patch_size": 16, "num_position_embeddings": 2304,
         "deepstack_visual_indexes": [8, 16, 24]},
        {**_LAYER, "patch_bias": True},
    ),
}  # fmt: skip
"""Defaults of the tower's configuration, and its traits, by model."""
_DEFAULTS_3, _TRAITS_3 = KINDS["qwen3_vl"]
KINDS["qwen3_5"] = {**_DEFAULTS_3, "deepstack_visual_indexes": []}, _TRAITS_3
THIRD = ("qwen3_vl", "qwen3_5")
"""Models with the third tower."""


def read_tower(hub: HubCheckpoint, kind: str) -> NativeEncoder:
    """Return the tower.

    Raises:
        CheckpointError: a value is missing or wrong, does not fit the others, or is not supported.
    """
    path, (defaults, traits) = hub.path, KINDS[kind]
    given = {key: value for key, value in hub.vision.items() if value is not None}
    config = {**defaults, "spatial_merge_size": 2, "temporal_patch_size": 2, **given}
    check_only(path, config, {"in_channels": 3, "in_chans": 3})
    width_key = "embed_dim" if kind == "qwen2_vl" else "hidden_size"
    width, depth, patch, merge = (
        config_value(path, config, key, int)
        for key in (width_key, "depth", "patch_size", "spatial_merge_size")
    )
    if kind == "qwen2_vl":
        config["intermediate_size"] = int(width * config_value(path, config, "mlp_ratio", float))
    heads, name = config_value(path, config, "num_heads", int), config["hidden_act"]
    if width % heads or width // heads % 4:
        raise CheckpointError(
            f"{path}: the tower has {width_key} {width} and {heads} heads, expected heads of a "
            f"multiple of 4 channels: rows and columns turn pairs of them"
        )
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"{path}: 'hidden_act' is {name!r:.60}, expected one of {', '.join(_ACTIVATIONS)}"
        )
    further: dict[str, Any] = {}
    if kind == "qwen2_5_vl":
        window = config_value(path, config, "window_size", int) // (patch * merge)
        full = _layers(path, config, "fullatt_block_indexes", depth)
        further = {"window": window, "full_layers": full} if len(full) < depth else {}
    if kind in THIRD:
        count = config_value(path, config, "num_position_embeddings", int)
        if math.isqrt(count) ** 2 != count:
            raise CheckpointError(
                f"{path}: 'num_position_embeddings' is {count}, expected a square number"
            )
        deep = _layers(path, config, "deepstack_visual_indexes", depth)
        further = {"position_grid": math.isqrt(count), "deep_layers": deep}
    if further.get("window") == 0:
        raise CheckpointError(
            f"{path}: 'window_size' is {config['window_size']}, expected {patch * merge} or more"
        )
    return NativeEncoder(
        width, config_value(path, config, "intermediate_size", int), depth, heads, patch, merge,
        _ACTIVATIONS[name], norm_eps=1e-6, **traits, **further,
        frames=config_value(path, config, "temporal_patch_size", int),
    )  # fmt: skip


def _layers(path: Path, config: dict[str, Any], key: str, depth: int) -> tuple[int, ...]:
    """Return the layers of the tower that a key lists."""
    found = config[key]
    is_list = isinstance(found, list) and all(type(index) is int for index in found)
    if not is_list or sorted(set(found)) != found or not all(0 <= one < depth for one in found):
        raise CheckpointError(
            f"{path}: {key!r} is {found!r:.60}, expected layers of the tower's {depth}, in order"
        )
    return tuple(found)


def tower_refs(hub: HubCheckpoint, vision: NativeEncoder) -> dict[str, TensorRef]:
    """Return the tensors of the tower and its mergers."""
    root, size = hub.prefix(_TOWERS, "patch_embed.proj.weight"), vision.hidden_size
    refs = {
        f"{ours}.{part}": TensorRef(hub.files, f"{root}{theirs}.{part}")
        for ours, theirs, biased in _modules(vision)
        for part in (("weight", "bias") if biased else ("weight",))
    }
    for index in range(vision.num_hidden_layers):
        for place, name in enumerate("qkv"):
            rows = RowRange(place * size, (place + 1) * size, 3 * size)
            for part in ("weight", "bias"):
                stored = f"{root}blocks.{index}.attn.qkv.{part}"
                ours = f"vision.layers.{index}.attn.{name}_proj.{part}"
                refs[ours] = TensorRef(hub.files, stored, rows)
    if vision.position_grid:
        refs["vision.position_embedding.weight"] = TensorRef(hub.files, f"{root}pos_embed.weight")
    return refs


def _modules(vision: NativeEncoder) -> Iterator[tuple[str, str, bool]]:
    """Yield our name of each module beside queries, keys and values, theirs, and whether it has a
    bias. Qwen3-VL, which alone has learned positions, calls linear layers by other names."""
    is_third, normed = vision.position_grid > 0, vision.norm == "layer"
    yield "vision.patch_embedding", "patch_embed.proj", vision.patch_bias
    readers, maker = vision.mlp_linears
    for index in range(vision.num_hidden_layers):
        ours, theirs = f"vision.layers.{index}", f"blocks.{index}"
        yield f"{ours}.norm1", f"{theirs}.norm1", normed
        yield f"{ours}.norm2", f"{theirs}.norm2", normed
        yield f"{ours}.attn.out_proj", f"{theirs}.attn.proj", True
        for name in (*readers, maker):
            yield f"{ours}.mlp.{name}", f"{theirs}.mlp.{'linear_' * is_third}{name}", True
    parts = _MERGER_3 if is_third else _MERGER
    places = [("projector", "merger")]
    for index in range(len(vision.deep_layers)):
        places.append((f"projector.deep.{index}", f"deepstack_merger_list.{index}"))
    for ours, theirs in places:
        for name, part in zip(("norm", "mlp.0", "mlp.1"), parts, strict=True):
            yield f"{ours}.{name}", f"{theirs}.{part}", normed or name != "norm"
