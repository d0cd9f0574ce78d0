"""Tower and projector as a GGUF file of llama.cpp's ``clip`` architecture (``mmproj``).

Names and metadata as llama.cpp's mtmd reads them (ggml-org/llama.cpp, tools/mtmd/clip.cpp and
models/llava.cpp).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np

from mobilevlm.checkpoint import Weights
from mobilevlm.console.progress import Advance
from mobilevlm.errors import FileWarning, MobileVLMError
from mobilevlm.export.gguf.fallbacks import say_fallbacks
from mobilevlm.export.gguf.tensors import FILE_TYPES, Tensor, write_file
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.gguf.encoder import LONGEST_EDGE
from mobilevlm.gguf.names import Entry, projector_entries, projector_name, tower_entries
from mobilevlm.input_spec import (
    AnyResolution,
    AspectTiles,
    ConnectorSpec,
    FixedImage,
    Tiles,
    TransformerEncoder,
)
from mobilevlm.model import Model
from mobilevlm.spec import GGUFType, ModelSpec

LDP_GRID = 24
"""llama.cpp's LDP and LDPv2 are written for this patch grid."""

LINEAR_SCALE = 64.0
"""See :func:`_linear_as_mlp`."""
_EQUAL_SIZES = (
    "llama.cpp tells the tower's two MLP layers apart by their sizes, and in this model they are "
    "equal"
)


def write_mmproj(model: Model, kind: GGUFType, path: Path, advance: Advance) -> dict[str, float]:
    """Writes tower and projector, linear layers in ``kind``. Returns each quantized tensor's
    relative error."""
    spec = model.spec
    check_support(spec)
    tensors = list(_tensors(model, kind, advance))
    errors = write_file(path, "clip", lambda writer: _describe(writer, spec, kind), tensors)
    say_fallbacks(path, kind, [tensor.name for tensor in tensors if tensor.type == kind])
    return errors


def check_support(spec: ModelSpec) -> None:
    """Refuses what llama.cpp has no graph for.

    Raises:
        MobileVLMError: says which property.
    """
    if reason := obstacle(spec):
        raise MobileVLMError(f"{reason}: use --format onnx")


def obstacle(spec: ModelSpec) -> str:
    """Why llama.cpp has no graph for tower and projector; empty where it has one."""
    projector, vision = spec.image.connector, spec.image.encoder
    if not isinstance(vision, TransformerEncoder):
        return f"llama.cpp has no image encoder of the kind {vision.kind}"
    if isinstance(spec.image.preparation, AspectTiles):
        return _internvl_obstacle(spec.image.preparation, vision, projector)
    if isinstance(spec.image.preparation, Tiles):
        return _idefics3_obstacle(spec.image.preparation, vision, projector)
    if not isinstance(spec.image.preparation, FixedImage | AnyResolution):
        return "llama.cpp's files are for images that become one square, this model's do not"
    if projector.kind not in ("mlp", "ldp", "ldpv2"):
        return f"llama.cpp has no projector of the kind {projector.kind}"
    if not (vision.class_token and vision.pre_norm) or vision.post_norm or vision.class_feature:
        return "llama.cpp's tower for such projectors is CLIP's, this model has another"
    if projector.kind == "mlp" and projector.depth > 2:
        return f"llama.cpp has no MLP projector with {projector.depth} layers"
    if projector.newline and projector.depth != 2:
        return "llama.cpp's tower beside a newline has an MLP of two layers, this model another"
    if projector.kind == "mlp" and projector.out_grid != projector.grid:
        return "llama.cpp has no MLP projector that pools"
    if projector.kind != "mlp" and projector.grid != LDP_GRID:
        return (
            f"llama.cpp's {projector.kind.upper()} projector takes {LDP_GRID} × {LDP_GRID} patches,"
            f" this model has {projector.grid} × {projector.grid}"
        )
    if vision.hidden_size == vision.intermediate_size:
        return _EQUAL_SIZES
    return ""


def warn_of_differences(spec: ModelSpec) -> None:
    """Warn of how programs other than this one prepare the images of a model from its files."""
    image = spec.image.preparation
    told = ""
    if isinstance(image, AnyResolution):
        told = "show each image as one square, without tiles and the newlines between rows of them"
    elif isinstance(image, AspectTiles) and image.max_tiles > 1:
        told = "take the largest of several grids of tiles of one shape, however small the image"
    elif isinstance(image, Tiles) and image.max_tiles == 1:
        told = "show each image twice, as a tile and made small"
    if told:
        warnings.warn(
            f"GGUF: stock programs of llama.cpp {told}: their answers may differ; engine gguf here "
            f"prepares images as the official code does",
            FileWarning,
            stacklevel=2,
        )


def _internvl_obstacle(
    tiles: AspectTiles, vision: TransformerEncoder, projector: ConnectorSpec
) -> str:
    """Why the model is not llama.cpp's InternVL: an InternViT of 300M, four patches a token."""
    expected = replace(
        vision, class_token=True, patch_bias=True, pre_norm=False, post_norm=False,
        class_feature=False, hidden_act="gelu",
    )  # fmt: skip
    if vision != expected:
        return "llama.cpp's tower beside tiles of the image's shape is InternViT, this is another"
    if projector.kind != "mlp_downsample" or projector.depth != 2 or projector.order != "rows":
        return "llama.cpp's InternVL joins patches row by row before an MLP of two layers"
    if not (projector.norm and projector.bias) or projector.grid % projector.factor:
        return "llama.cpp's InternVL has a norm before its MLP and a grid that divides into squares"
    if tiles.min_tiles > 1:  # it ends the process at an image that is one tile
        return f"llama.cpp's InternVL takes images of one tile, this model's have {tiles.min_tiles}"
    if tiles.max_tiles > 1 and not tiles.thumbnail:
        return "llama.cpp's InternVL always has the image made small after several tiles"
    if vision.hidden_size == vision.intermediate_size:
        return _EQUAL_SIZES
    return ""


def _idefics3_obstacle(tiles: Tiles, vision: TransformerEncoder, projector: ConnectorSpec) -> str:
    """Why the model is not llama.cpp's Idefics3: a SigLIP, a pixel shuffle and one Linear."""
    expected = replace(
        vision, class_token=False, patch_bias=True, pre_norm=False, post_norm=True,
        class_feature=False, hidden_act="gelu_tanh",
    )  # fmt: skip
    if vision != expected or tiles.thumbnail != "last":
        return "llama.cpp's tower beside tiles and a small image is SigLIP, this model has another"
    if projector.kind != "mlp_downsample" or projector.depth != 1 or projector.order != "rows":
        return "llama.cpp's Idefics3 joins patches row by row before one Linear"
    if projector.norm or projector.bias or projector.grid % projector.factor:
        return "llama.cpp's Idefics3 has no norm and no bias, and a grid that divides into squares"
    if vision.hidden_size == vision.intermediate_size:
        return _EQUAL_SIZES
    return ""


def _describe(writer: gguf.GGUFWriter, spec: ModelSpec, kind: GGUFType) -> None:
    vision, image = spec.image.transformer, spec.image.square
    writer.add_type("mmproj")
    writer.add_name(spec.name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(2)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type(projector_name(spec.image.connector))
    writer.add_vision_projection_dim(spec.image.connector.out_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    # Without this key llama.cpp leaves the last layer of a CLIP out.
    writer.add_array("clip.vision.feature_layer", [vision.num_hidden_layers])
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(image.mean)
    writer.add_vision_image_std(image.std)
    writer.add_vision_use_gelu(vision.hidden_act != "quick_gelu")
    writer.add_string("clip.vision.mm_patch_merge_type", "flat")
    if isinstance(image, AspectTiles):
        writer.add_vision_projector_scale_factor(spec.image.connector.factor)
        writer.add_uint32("clip.vision.preproc_min_tiles", image.min_tiles)
        writer.add_uint32("clip.vision.preproc_max_tiles", image.max_tiles)
    if isinstance(image, Tiles):
        writer.add_vision_projector_scale_factor(spec.image.connector.factor)
        longest = image.size if image.max_tiles == 1 else image.longest_edge
        writer.add_uint32(LONGEST_EDGE, longest)


def _tensors(model: Model, kind: GGUFType, advance: Advance) -> Iterator[Tensor]:
    """All tensors in the order of the file."""
    float_kind: GGUFType = "f32" if kind == "f32" else "f16"
    kinds: dict[str, GGUFType] = {
        "matrix": kind,
        "convolution": float_kind,
        "depthwise": "f16",
        "float": "f32",
    }

    def tensor(entry: Entry) -> Tensor:
        def read() -> Float32:
            advance(math.prod(entry.shape))
            values = model.weights.read(entry.ours, entry.shape).reshape(entry.stored)
            return np.roll(values, -1, axis=0) if entry.first_last else values

        return Tensor(entry.theirs, entry.stored, kinds[entry.store], [read])

    projector = model.spec.image.connector
    class_last = projector_name(projector) == "internvl"
    for entry in tower_entries(model.spec.image.transformer, class_last=class_last):
        yield tensor(entry)
    if projector.kind == "mlp" and projector.depth == 1:
        yield from _linear_as_mlp(model.weights, projector, kind, advance)
        return
    for entry in projector_entries(projector):
        yield tensor(entry)


def _linear_as_mlp(
    weights: Weights, spec: ConnectorSpec, kind: GGUFType, advance: Advance
) -> Iterator[Tensor]:
    """LLaVA's one Linear as the two that llama.cpp has, with GELU between: gelu(z) − gelu(−z) = z.

    The products are scaled up, since from 10 on llama.cpp's GELU is the identity, and below it is
    read from a table in float16.
    """
    size, inner = spec.out_size, 2 * spec.out_size

    def both_signs(part: str, *shape: int) -> Float32:
        advance(math.prod(shape))
        values = weights.read(f"projector.mlp.0.{part}", shape)
        return np.concatenate([values, -values]) * np.float32(LINEAR_SCALE)

    yield Tensor(
        "mm.0.weight",
        (inner, spec.in_size),
        kind,
        [lambda: both_signs("weight", size, spec.in_size)],
    )
    yield Tensor("mm.0.bias", (inner,), "f32", [lambda: both_signs("bias", size)])
    yield Tensor("mm.2.weight", (size, inner), kind, [lambda: signed_difference(size)])
    yield Tensor("mm.2.bias", (size,), "f32", [lambda: np.zeros(size, np.float32)])


def signed_difference(size: int) -> Float32:
    """``(size, 2 * size)``: the first half of a vector less the second, scaled back."""
    unit = np.eye(size, dtype=np.float32) / np.float32(LINEAR_SCALE)
    return np.concatenate([unit, -unit], axis=1)
