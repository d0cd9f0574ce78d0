"""Limits of llama.cpp's image encoders: why a model is none of them, and where stock programs
prepare its images otherwise."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.errors import FileWarning, MobileVLMError
from mobilevlm.gguf.architectures import gguf_architecture
from mobilevlm.gguf.mmproj import WINDOW, full_layer_step, projector_name
from mobilevlm.gguf.names import projector_name as projector_name_of
from mobilevlm.image_encoder import NativeEncoder, TransformerEncoder
from mobilevlm.input_spec import (
    AnyResolution,
    AspectTiles,
    DynamicImage,
    DynamicTiles,
    FixedImage,
    Tiles,
)
from mobilevlm.spec import ModelSpec

LDP_GRID = 24
"""llama.cpp's LDP and LDPv2 are written for this patch grid."""
_EQUAL_SIZES = (
    "llama.cpp tells the tower's two MLP layers apart by their sizes, and in this model they are "
    "equal"
)


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
    if isinstance(vision, NativeEncoder):
        return _qwen_obstacle(vision, projector)
    if not isinstance(vision, TransformerEncoder):
        return f"llama.cpp has no image encoder of the kind {vision.kind}"
    if isinstance(spec.image.preparation, DynamicTiles):
        return _lfm2_obstacle(vision, projector)
    if projector_name(spec.image) == "gemma3":
        return _gemma3_obstacle(spec.image.preparation, vision, projector)
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
    """Warn of what llama.cpp computes otherwise, and of how programs other than this one prepare
    the images of a model from its files."""
    if gguf_architecture(spec.decoder) == "qwen2vl":
        warnings.warn(
            "GGUF: llama.cpp (found in llama-cpp-python 0.3.36) takes 0 for the epsilon of this "
            "decoder's norms, so logits of engines gguf and hybrid differ from the third digit on: "
            "engine onnx has the official ones",
            FileWarning,
            stacklevel=2,
        )
    image = spec.image.preparation
    told = ""
    if isinstance(image, AnyResolution):
        told = "show each image as one square, without tiles and the newlines between rows of them"
    elif isinstance(image, AspectTiles) and image.max_tiles > 1:
        told = "take the largest of several grids of tiles of one shape, however small the image"
    elif isinstance(image, Tiles) and image.max_tiles == 1:
        told = "show each image twice, as a tile and made small"
    elif isinstance(image, DynamicTiles) and not _is_usual(image):
        told = "make 2 to 10 tiles of 512 pixels, and 64 to 256 visual tokens of a whole image"
    elif isinstance(image, DynamicImage):
        area = image.factor**2
        least, most = (round(pixels / area) for pixels in (image.min_pixels, image.max_pixels))
        if (least, most) != _QWEN_TOKENS:
            told = (
                f"make {_QWEN_TOKENS[0]} to {_QWEN_TOKENS[1]} visual tokens of an image unless "
                f"told --image-min-tokens {least} --image-max-tokens {most}"
            )
    if told:
        warnings.warn(
            f"GGUF: stock programs of llama.cpp {told}: their answers may differ; engine gguf here "
            f"prepares images as the official code does",
            FileWarning,
            stacklevel=2,
        )


_QWEN_TOKENS = (8, 4096)
"""Fewest and most visual tokens of an image, without options."""


def _is_usual(tiles: DynamicTiles) -> bool:
    """Return whether images are prepared as llama.cpp has it for LFM2-VL."""
    area, whole = tiles.whole.factor**2, tiles.whole
    return (
        (tiles.size, tiles.min_tiles, tiles.max_tiles) == (512, 2, 10)
        and (whole.min_pixels, whole.max_pixels) == (64 * area, 256 * area)
        and tiles.split_pixels == 2 * whole.max_pixels
        and tiles.thumbnail
    )


_SIGLIP: dict[str, Any] = {
    "class_token": False, "patch_bias": True, "pre_norm": False, "post_norm": True,
    "class_feature": False, "hidden_act": "gelu_tanh",
}  # fmt: skip


def _gemma3_obstacle(image: object, vision: TransformerEncoder, projector: ConnectorSpec) -> str:
    """Why the model is not llama.cpp's Gemma 3: a SigLIP, averaging, a norm and one matrix."""
    if vision != replace(vision, **_SIGLIP, resized_positions=False):
        return "llama.cpp's tower before averaged patches is SigLIP, this model has another"
    if not isinstance(image, FixedImage):
        return "llama.cpp's Gemma 3 takes images that become one square, this model's do not"
    if projector.depth != 1 or projector.bias or projector.newline:
        return "llama.cpp's Gemma 3 has one Linear without a bias behind the averaged patches"
    if projector.pool_norm_eps != vision.layer_norm_eps:
        return "llama.cpp's Gemma 3 has one epsilon for the tower and the projector's norm"
    return _EQUAL_SIZES if vision.hidden_size == vision.intermediate_size else ""


def _lfm2_obstacle(vision: TransformerEncoder, projector: ConnectorSpec) -> str:
    """Why the model is not llama.cpp's LFM2-VL: a SigLIP 2, a pixel unshuffle and an MLP."""
    if vision != replace(vision, **_SIGLIP, resized_positions=True):
        return "llama.cpp's tower on tiles of any shape is SigLIP 2, this model has another"
    if projector_name_of(projector) != "lfm2" or projector.depth != 2 or not projector.bias:
        return "llama.cpp's LFM2-VL joins patches row by row before an MLP of two layers"
    return ""


def _qwen_obstacle(vision: NativeEncoder, projector: ConnectorSpec) -> str:
    """Why the model is none of llama.cpp's Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""
    if (vision.frames, vision.merge_size, vision.rope_theta) != (2, 2, 10000.0):
        return "llama.cpp's towers of Qwen-VL have patches of 2 frames in squares of 2 × 2"
    is_third, is_rms = vision.position_grid > 0, vision.norm == "rms"
    expected = replace(
        vision, hidden_act="gelu_tanh" if is_third else "silu" if is_rms else "quick_gelu",
        mlp="gated" if is_rms else "plain", patch_bias=is_third,
        position_grid=0 if is_rms else vision.position_grid,
        window=vision.window if is_rms else 0, full_layers=vision.full_layers if is_rms else (),
        deep_layers=vision.deep_layers if is_third else (),
    )  # fmt: skip
    if vision != expected or (projector.norm_kind, projector.norm_eps) != (
        vision.norm, vision.norm_eps,
    ):  # fmt: skip
        return "llama.cpp has the towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, this is another"
    square = vision.patch_size * vision.merge_size
    if vision.window and vision.window != WINDOW // square:
        return f"llama.cpp's Qwen2.5-VL has windows of {WINDOW} pixels, this model has others"
    if full_layer_step(vision) is None:
        return "llama.cpp's Qwen2.5-VL sees the whole image in every so-manieth layer alone"
    return _EQUAL_SIZES if vision.hidden_size == vision.intermediate_size else ""


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
