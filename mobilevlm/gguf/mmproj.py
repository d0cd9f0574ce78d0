"""Image encoders and projectors as files of llama.cpp's ``clip`` architecture: the keys and tensors
of each family, from the spec.

Names as llama.cpp's mtmd reads them (ggml-org/llama.cpp, tools/mtmd/clip.cpp and models/).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from mobilevlm.gguf.encoder import FEATURE_LAYER, GREATEST_TILES, LEAST_TILES, LONGEST_EDGE
from mobilevlm.gguf.names import Entry, native_entries, projector_entries, tower_entries
from mobilevlm.gguf.names import projector_name as projector_of
from mobilevlm.image_encoder import NativeEncoder, TransformerEncoder
from mobilevlm.input_spec import AspectTiles, InputSpec, Tiles

Value: TypeAlias = bool | int | float | str | list[int] | list[float] | list[bool]

NATIVE = ("qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger")
"""Projectors behind a tower on images of any size."""
EXACT = (*NATIVE, "gemma3", "lfm2")
"""Projectors whose files have the keys of :func:`mmproj_keys` and no others that change results."""
WINDOW = 112
"""Pixels along each edge of a window of Qwen2.5-VL's tower: llama.cpp has no key for it."""
_NOMINAL_EDGE = 560
"""Image size in files of towers that have no size of their own."""


def projector_name(image: InputSpec) -> str:
    """Return llama.cpp's name of a projector."""
    tower = image.encoder
    if not isinstance(tower, NativeEncoder):
        return projector_of(image.connector)
    if tower.norm == "rms":
        return "qwen2.5vl_merger"
    return "qwen3vl_merger" if tower.position_grid else "qwen2vl_merger"


def mmproj_entries(image: InputSpec) -> Iterator[Entry]:
    """Yield all tensors of a file, in its order."""
    if isinstance(image.encoder, NativeEncoder):
        yield from native_entries(image.encoder, image.connector)
        return
    class_last = projector_name(image) == "internvl"
    yield from tower_entries(image.transformer, class_last=class_last)
    yield from projector_entries(image.connector)


def mmproj_keys(image: InputSpec) -> dict[str, Value]:
    """Return the keys that say how an image is encoded, in the order of the file."""
    name, tower, pixels = projector_name(image), image.encoder, image.pixels
    assert isinstance(tower, TransformerEncoder | NativeEncoder)
    vision: dict[str, Value] = {
        "projection_dim": image.connector.out_size,
        "image_size": _edge(tower),
        "patch_size": tower.patch_size,
        "embedding_length": tower.hidden_size,
        "feed_forward_length": tower.intermediate_size,
        "block_count": tower.num_hidden_layers,
        "attention.head_count": tower.num_attention_heads,
        "attention.layer_norm_epsilon": _epsilon(tower),
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }
    keys: dict[str, Value] = {
        "clip.has_vision_encoder": True,
        "clip.projector_type": name,
        **{f"clip.vision.{key}": value for key, value in vision.items()},
        "clip.use_gelu": tower.hidden_act in ("gelu", "gelu_tanh"),
    }
    if isinstance(tower, NativeEncoder):
        return keys | _native_keys(tower)
    connector = image.connector
    if name == "gemma3":
        keys["clip.vision.projector.scale_factor"] = connector.grid // connector.out_grid
    if name in ("lfm2", "idefics3", "internvl"):
        keys["clip.vision.projector.scale_factor"] = connector.factor
    if name in EXACT:
        return keys
    keys["clip.has_llava_projector"] = True
    # Without this key llama.cpp leaves the last layer of a CLIP out.
    keys[FEATURE_LAYER] = [tower.num_hidden_layers]
    keys["clip.vision.mm_patch_merge_type"] = "flat"
    tiles = image.preparation
    if isinstance(tiles, AspectTiles):
        keys |= {LEAST_TILES: tiles.min_tiles, GREATEST_TILES: tiles.max_tiles}
    if isinstance(tiles, Tiles):
        keys[LONGEST_EDGE] = tiles.size if tiles.max_tiles == 1 else tiles.longest_edge
    return keys


def _native_keys(tower: NativeEncoder) -> dict[str, Value]:
    keys: dict[str, Value] = {"clip.vision.spatial_merge_size": tower.merge_size}
    if tower.norm == "rms":
        keys["clip.use_silu"] = True
        keys["clip.vision.n_wa_pattern"] = full_layer_step(tower) or 0
    if tower.position_grid:
        layers = range(tower.num_hidden_layers)
        keys["clip.vision.is_deepstack_layers"] = [layer in tower.deep_layers for layer in layers]
    return keys


def full_layer_step(tower: NativeEncoder) -> int | None:
    """Return the number of layers from one that sees the whole image to the next, 0 where all do;
    none where the layers are other ones than that gives."""
    if not tower.window:
        return 0
    layers = range(tower.num_hidden_layers)
    step = min(tower.full_layers, default=tower.num_hidden_layers) + 1
    found = tuple(layer for layer in layers if (layer + 1) % step == 0)
    return step if found == tower.full_layers else None


def _edge(tower: TransformerEncoder | NativeEncoder) -> int:
    if isinstance(tower, TransformerEncoder):
        return tower.image_size
    return tower.position_grid * tower.patch_size or _NOMINAL_EDGE


def _epsilon(tower: TransformerEncoder | NativeEncoder) -> float:
    return tower.layer_norm_eps if isinstance(tower, TransformerEncoder) else tower.norm_eps
