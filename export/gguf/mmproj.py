"""Tower and projector as a GGUF file of llama.cpp's ``clip`` architecture (``mmproj``).

Names and metadata as llama.cpp's mtmd reads them (ggml-org/llama.cpp, tools/mtmd/clip.cpp and
models/llava.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np

from mobilevlm.checkpoint import Weights
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.gguf.tensors import FILE_TYPES, Tensor, write_file
from mobilevlm.export.quantize.rtn import Float32
from mobilevlm.families import Model
from mobilevlm.progress import Advance
from mobilevlm.spec import GGUFType, ModelSpec, ProjectorSpec, VisionSpec

LDP_GRID = 24
"""llama.cpp's LDP and LDPv2 are written for this patch grid."""

LINEAR_SCALE = 64.0
"""See :func:`_linear_as_mlp`."""


def write_mmproj(model: Model, kind: GGUFType, path: Path, advance: Advance) -> dict[str, float]:
    """Writes tower and projector, linear layers in ``kind``. Returns each quantized tensor's
    relative error."""
    spec = model.spec
    check_support(spec)
    source = _Source(model.weights, kind, advance)
    tensors = [*_tower_tensors(source, spec.vision), *_projector_tensors(source, spec.projector)]
    return write_file(path, "clip", lambda writer: _describe(writer, spec, kind), tensors)


def check_support(spec: ModelSpec) -> None:
    """Refuses what llama.cpp has no graph for.

    Raises:
        MobileVLMError: says which property.
    """
    projector, vision = spec.projector, spec.vision
    if projector.kind == "mlp" and projector.depth > 2:
        raise MobileVLMError(
            f"llama.cpp has no MLP projector with {projector.depth} layers: use --format onnx"
        )
    if projector.kind != "mlp" and projector.grid != LDP_GRID:
        raise MobileVLMError(
            f"llama.cpp's {projector.kind.upper()} projector takes {LDP_GRID} × {LDP_GRID} patches,"
            f" this model has {projector.grid} × {projector.grid}: use --format onnx"
        )
    if vision.hidden_size == vision.intermediate_size:
        raise MobileVLMError(
            "llama.cpp tells the tower's two MLP layers apart by their sizes, and in this model "
            "they are equal: use --format onnx"
        )


def _describe(writer: gguf.GGUFWriter, spec: ModelSpec, kind: GGUFType) -> None:
    vision, image = spec.vision, spec.image
    writer.add_type("mmproj")
    writer.add_name(spec.name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(2)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type(spec.projector.kind)
    writer.add_vision_projection_dim(spec.projector.out_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    # Without this key llama.cpp leaves the last layer of the file out.
    writer.add_array("clip.vision.feature_layer", [vision.num_hidden_layers])
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(image.mean)
    writer.add_vision_image_std(image.std)
    writer.add_vision_use_gelu(vision.hidden_act == "gelu")
    writer.add_string("clip.vision.mm_patch_merge_type", "flat")


class _Source:
    """Makes the tensors of the file from the model's weights."""

    def __init__(self, weights: Weights, kind: GGUFType, advance: Advance) -> None:
        self.weights, self.kind, self.advance = weights, kind, advance

    def tensor(
        self,
        name: str,
        source: str,
        *shape: int,
        kind: GGUFType | None = None,
        change: Callable[[Float32], Float32] | None = None,
        stored: tuple[int, ...] | None = None,
    ) -> Tensor:
        """``source`` of the given shape; matrices in the file's type, vectors in float32, unless
        ``kind`` is given. ``change`` makes values of the shape ``stored`` of it."""

        def read() -> Float32:
            self.advance(math.prod(shape))
            values = self.weights.read(source, shape)
            return change(values) if change else values.reshape(stored or shape)

        return Tensor(
            name, stored or shape, kind or ("f32" if len(shape) == 1 else self.kind), read
        )

    def pair(self, name: str, source: str, *shape: int) -> Iterator[Tensor]:
        """Weight and bias of a linear layer or a norm."""
        yield self.tensor(f"{name}.weight", f"{source}.weight", *shape)
        yield self.tensor(f"{name}.bias", f"{source}.bias", shape[0])


def _tower_tensors(source: _Source, spec: VisionSpec) -> Iterator[Tensor]:
    hidden, wide, patch = spec.hidden_size, spec.intermediate_size, spec.patch_size
    yield source.tensor("v.class_embd", "vision.class_embedding", hidden)
    yield source.tensor(
        "v.patch_embd.weight",
        "vision.patch_embedding.weight",
        hidden,
        3,
        patch,
        patch,
        kind="f32" if source.kind == "f32" else "f16",
    )
    yield source.tensor(
        "v.position_embd.weight",
        "vision.position_embedding.weight",
        spec.num_patches + 1,
        hidden,
        kind="f32",
    )
    yield from source.pair("v.pre_ln", "vision.pre_norm", hidden)
    for index in range(spec.num_hidden_layers):
        ours, theirs = f"vision.layers.{index}", f"v.blk.{index}"
        yield from source.pair(f"{theirs}.ln1", f"{ours}.norm1", hidden)
        for name in ("q", "k", "v", "out"):
            yield from source.pair(
                f"{theirs}.attn_{name}", f"{ours}.attn.{name}_proj", hidden, hidden
            )
        yield from source.pair(f"{theirs}.ln2", f"{ours}.norm2", hidden)
        yield from source.pair(f"{theirs}.ffn_up", f"{ours}.mlp.fc1", wide, hidden)
        yield from source.pair(f"{theirs}.ffn_down", f"{ours}.mlp.fc2", hidden, wide)


def _projector_tensors(source: _Source, spec: ProjectorSpec) -> Iterator[Tensor]:
    if spec.kind == "mlp" and spec.depth == 1:
        yield from _linear_as_mlp(source, spec)
        return
    first, second = {
        "mlp": ("mm.0", "mm.2"),
        "ldp": ("mm.model.mlp.1", "mm.model.mlp.3"),
        "ldpv2": ("mm.model.mlp.0", "mm.model.mlp.2"),
    }[spec.kind]
    yield from source.pair(first, "projector.mlp.0", spec.out_size, spec.in_size)
    yield from source.pair(second, "projector.mlp.1", spec.out_size, spec.out_size)
    if spec.kind == "ldp":
        for block in (0, 1):
            yield from _inverted_residual(source, spec, block)
    if spec.kind == "ldpv2":
        yield _depthwise(source, "mm.model.peg.0.weight", "projector.peg.weight", spec)
        yield source.tensor("mm.model.peg.0.bias", "projector.peg.bias", spec.out_size)


def _linear_as_mlp(source: _Source, spec: ProjectorSpec) -> Iterator[Tensor]:
    """LLaVA's one Linear as the two that llama.cpp has, with GELU between: gelu(z) − gelu(−z) = z.

    The products are scaled up, since from 10 on llama.cpp's GELU is the identity, and below it is
    read from a table in float16.
    """
    size, inner = spec.out_size, 2 * spec.out_size

    def both_signs(values: Float32) -> Float32:
        return np.concatenate([values, -values]) * np.float32(LINEAR_SCALE)

    def difference() -> Float32:
        unit = np.eye(size, dtype=np.float32) / np.float32(LINEAR_SCALE)
        return np.concatenate([unit, -unit], axis=1)

    yield source.tensor(
        "mm.0.weight", "projector.mlp.0.weight", size, spec.in_size,
        change=both_signs, stored=(inner, spec.in_size),
    )  # fmt: skip
    yield source.tensor(
        "mm.0.bias", "projector.mlp.0.bias", size, change=both_signs, stored=(inner,)
    )
    yield Tensor("mm.2.weight", (size, inner), source.kind, difference)
    yield Tensor("mm.2.bias", (size,), "f32", lambda: np.zeros(size, np.float32))


def _inverted_residual(source: _Source, spec: ProjectorSpec, block: int) -> Iterator[Tensor]:
    size, squeezed = spec.out_size, spec.squeeze_size
    ours, theirs = f"projector.blocks.{block}", f"mm.model.mb_block.{block + 1}.block"

    def pointwise(name: str, part: str, out_size: int, in_size: int) -> Tensor:
        return source.tensor(
            name, f"{ours}.{part}.weight", out_size, in_size, 1, 1,
            kind="f32" if source.kind == "f32" else "f16", stored=(out_size, in_size),
        )  # fmt: skip

    yield _depthwise(source, f"{theirs}.0.0.weight", f"{ours}.depthwise.weight", spec)
    yield from source.pair(f"{theirs}.0.1", f"{ours}.norm1", size)
    yield pointwise(f"{theirs}.1.fc1.weight", "squeeze", squeezed, size)
    yield source.tensor(f"{theirs}.1.fc1.bias", f"{ours}.squeeze.bias", squeezed)
    yield pointwise(f"{theirs}.1.fc2.weight", "excite", size, squeezed)
    yield source.tensor(f"{theirs}.1.fc2.bias", f"{ours}.excite.bias", size)
    yield pointwise(f"{theirs}.2.0.weight", "pointwise", size, size)
    yield from source.pair(f"{theirs}.2.1", f"{ours}.norm2", size)


def _depthwise(source: _Source, name: str, ours: str, spec: ProjectorSpec) -> Tensor:
    """llama.cpp's depthwise convolution works in float16 only."""
    size = spec.out_size
    return source.tensor(name, ours, size, 1, 3, 3, kind="f16", stored=(size, 3, 3))
