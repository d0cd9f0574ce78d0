"""Tower and projector as a GGUF file of llama.cpp's ``clip`` architecture (``mmproj``).

Names and metadata as llama.cpp's mtmd reads them (ggml-org/llama.cpp, tools/mtmd/clip.cpp and
models/llava.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gguf
import numpy as np

from mobilevlm.checkpoint import Weights
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.console.progress import Advance
from mobilevlm.export.gguf.fallbacks import say_fallbacks
from mobilevlm.export.gguf.support import check_support
from mobilevlm.export.gguf.tensors import FILE_TYPES, Tensor, write_file
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.gguf.mmproj import mmproj_entries, mmproj_keys, projector_name
from mobilevlm.gguf.names import Entry, tower_entries
from mobilevlm.model import Model
from mobilevlm.spec import GGUFType, ModelSpec

LINEAR_SCALE = 64.0
"""See :func:`_linear_as_mlp`."""


def write_mmproj(model: Model, kind: GGUFType, path: Path, advance: Advance) -> dict[str, float]:
    """Writes tower and projector, linear layers in ``kind``. Returns each quantized tensor's
    relative error."""
    spec = model.spec
    check_support(spec)
    tensors = list(_tensors(model, kind, advance))
    errors = write_file(path, "clip", lambda writer: _describe(writer, spec, kind), tensors)
    say_fallbacks(path, kind, [tensor.name for tensor in tensors if tensor.type == kind])
    return errors


def _describe(writer: gguf.GGUFWriter, spec: ModelSpec, kind: GGUFType) -> None:
    writer.add_type("mmproj")
    writer.add_name(spec.name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(2)
    for key, value in mmproj_keys(spec.image).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


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
        def read(ours: str) -> Float32:
            values = model.weights.read(ours, entry.shape)
            if entry.frame is not None:
                values = values[:, :, entry.frame]
            advance(values.size)
            if entry.transposed:
                values = values.T
            if not entry.stack:
                values = values.reshape(entry.stored)
            return np.roll(values, -1, axis=0) if entry.first_last else values

        parts = [partial(read, ours) for ours in entry.parts]
        return Tensor(entry.theirs, entry.stored, kinds[entry.store], parts)

    image = model.spec.image
    if projector_name(image) == "mlp" and image.connector.depth == 1:
        yield from map(tensor, tower_entries(image.transformer))
        yield from _linear_as_mlp(model.weights, image.connector, kind, advance)
        return
    yield from map(tensor, mmproj_entries(image))


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
