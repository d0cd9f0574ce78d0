"""Keys and values in 8 bits: a fourth of the memory, and of the bytes that a step reads of them.

The finished decoder is run in float on calibration data. What it leaves in its buffers says how far
each channel of each head goes, and that becomes a constant of the graph: GroupQueryAttention then
rounds what it stores, and reads integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mobilevlm.bundle import Bundle
from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.calibration.data import find_samples
from mobilevlm.export.calibration.samples import Sample, sample_rows
from mobilevlm.model import Model
from mobilevlm.plan import Plan
from mobilevlm.runtime.engines import EncoderEngine, Float32, NoImages
from mobilevlm.runtime.engines.opening import onnx_decoder, onnx_vision
from mobilevlm.state_buffers import slot_buffers

SAMPLES = 16
"""At most so many are run: a channel's range is that of a few thousand positions."""
HEADROOM = 1.1
"""Factor of the calibrated range: other data go further, and values beyond the scale are
clipped."""
_ATTENTION = "GroupQueryAttention"
_SCALES = 12
"""Input of the keys' scales, which those of values follow"""
_PAST = {"key": 3, "value": 4}
"""Inputs of what is stored"""


def check_cache(model: Model) -> None:
    """Raises MobileVLMError: this decoder's keys and values stay float."""
    if model.spec.decoder.encoder_layers:
        raise MobileVLMError(
            f"kv_cache int8: the decoder of {model.spec.name} has an encoder, whose keys and "
            f"values are float: leave it out"
        )
    if model.spec.decoder.shared_kv_layers:
        raise MobileVLMError(
            f"kv_cache int8: layers of {model.spec.name} read keys and values of others, which "
            f"ONNX Runtime's attention has for float32 only: leave it out"
        )


def quantize_cache(model: Model, bundle: Bundle, calibration: str) -> bool:
    """Makes the ONNX graphs of the bundle's decoder store integers, with the same scales.
    ``calibration``: data as in recipes, read where they are needed. False: the graphs do already.

    Raises:
        MobileVLMError, PromptError, ImageError: a sample is wrong.
    """
    paths = [
        bundle.path(part.path)
        for part in bundle.manifest.artifacts
        if part.format == "onnx" and part.stage in ("decoder", "prefill")
    ]
    stored = {path: _stored_scales(path) for path in paths}
    if all(stored.values()):
        return False
    # One that an interrupted export has finished settles the other's.
    known = next((scales for scales in stored.values() if scales), None)
    scales = known or _measure(model, bundle, find_samples(calibration, model)[:SAMPLES])
    for path in paths:
        if not stored[path]:
            rewrite(path, scales)
    return True


def _measure(model: Model, bundle: Bundle, samples: Sequence[Sample]) -> dict[str, Float32]:
    """Scales ``(1, num_key_value_heads, 1, cache_head_dim)`` by the names of buffers."""
    plan = Plan()
    vision: EncoderEngine = NoImages()
    if model.spec.encoded is not None:
        artifact = bundle.artifact(model.spec.encoder_stage, "onnx")
        vision = onnx_vision(bundle, bundle.path(artifact.path), plan)
    path = bundle.path(bundle.artifact("decoder", "onnx").path)
    decoder = onnx_decoder(bundle, path, plan, cache=np.float32)
    state = decoder.new_state()
    largest: Float32 | None = None
    with progress.track("kv_cache", len(samples)) as advance:
        for sample in samples:
            state.rewind(0)
            decoder.extend(state, sample_rows(model, sample, vision, decoder.embed))
            filled = decoder.save(state, 0)
            parts = {part.name: part for part in slot_buffers(model.spec.decoder)}
            whole, window = iter(filled.data), iter(() if filled.window is None else filled.window)
            found = np.stack(
                [
                    np.abs(next(window if parts[name].kind == "sliding" else whole)).max(axis=1)
                    for name in state.buffers
                ]
            )
            largest = found if largest is None else np.maximum(largest, found)
            advance(1)
    vision.close()
    decoder.close()
    assert largest is not None
    # A channel that is always 0 may have any scale.
    scales = np.maximum(largest, 1e-6) * np.float32(HEADROOM / 127)
    return {name: scale[None, :, None] for name, scale in zip(state.buffers, scales, strict=True)}


def _stored_scales(path: Path) -> dict[str, Float32] | None:
    """Return the scales that a graph has, by buffer; none where it stores float32."""
    graph = ir.load(path).graph
    found: dict[str, Float32] = {}
    for node in graph:
        if node.op_type == _ATTENTION and len(node.inputs) > _SCALES:
            for offset, place in enumerate(_PAST.values()):
                past, scale = node.inputs[place], node.inputs[_SCALES + offset]
                assert past is not None and scale is not None and scale.const_value is not None
                found[_buffer(past)] = scale.const_value.numpy()
    return found or None


def rewrite(path: Path, scales: dict[str, NDArray[np.float32]]) -> None:
    """Give the attention of a graph these scales; its weights lie in another file."""
    model = ir.load(path)
    graph, integers = model.graph, ir.TensorType(ir.DataType.INT8)
    for node in list(graph):
        if node.op_type != _ATTENTION:
            continue
        node.resize_inputs(_SCALES + len(_PAST))
        for offset, (kind, place) in enumerate(_PAST.items()):
            past, present = node.inputs[place], node.outputs[1 + offset]
            assert past is not None
            name = _buffer(past)
            scale = ir.Value(name=f"{name}.scale", const_value=ir.tensor(scales[name]))
            scale.shape, scale.type = ir.Shape(scales[name].shape), ir.TensorType(ir.DataType.FLOAT)
            graph.register_initializer(scale)
            node.replace_input_with(_SCALES + offset, scale)
            past.type = present.type = integers
            node.attributes.add(ir.AttrString(f"{kind[0]}_quant_type", "PER_CHANNEL"))
            for reader in [use.node for use in present.uses()]:
                _restore(graph, reader, scale)
        node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
    draft = path.with_name(f"{path.name}.draft")
    ir.save(model, draft)
    draft.replace(path)


def _restore(graph: ir.Graph, reader: ir.Node, scale: ir.Value) -> None:
    """Multiply what a node takes of a buffer of integers by their scales."""
    taken = reader.outputs[0]
    readers = [(use.node, use.idx) for use in taken.uses()]
    cast = ir.node("Cast", [taken], attributes={"to": ir.DataType.FLOAT})
    product = ir.node("Mul", [cast.outputs[0], scale])
    cast.outputs[0].name, product.outputs[0].name = f"{taken.name}.float", f"{taken.name}.scaled"
    taken.type = ir.TensorType(ir.DataType.INT8)
    graph.insert_after(reader, [cast, product])
    for node, place in readers:
        node.replace_input_with(place, product.outputs[0])


def _buffer(past: ir.Value) -> str:
    """``0.key`` of ``past_key_values.0.key``."""
    return str(past.name).removeprefix("past_key_values.")
