"""The decoder stage in fixed point for NPUs: one graph for chunks of the prompt, one for single
tokens, with the same weights (one data file) and the same scales, so that the keys and values of
one go into the other as they are: 8-bit integers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mobilevlm.console import progress
from mobilevlm.console.progress import Advance
from mobilevlm.export.calibration.samples import Sample, sample_rows
from mobilevlm.export.fixed_shapes.vision import (
    FLOAT,
    Inputs,
    Overrides,
    float_model,
    producers,
    quantize_model,
    silent,
    source_of,
    stored_weights,
    watch_ranges,
)
from mobilevlm.export.formats import Written
from mobilevlm.export.graph.author import (
    ChunkShape,
    author_encoded,
    author_static_decoder,
)
from mobilevlm.export.graph.weight_file import INLINE_BYTES
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.export.quantize.errors import weight_error
from mobilevlm.linear_groups import linear_groups
from mobilevlm.model import Model
from mobilevlm.plan import default_threads
from mobilevlm.recipe import LinearFormat, Recipe
from mobilevlm.runtime.engines.onnx.engine import OnnxVision
from mobilevlm.runtime.engines.onnx.npu import MASKED, masks_of, tables_of

_HEADROOM = 16.0
"""Logits of attention, in nats: how far below all others a masked one stays. exp(-16) is 1e-7."""
_SHARE = {"rmin": np.float32(0), "rmax": np.float32(1)}
"""Range of probabilities."""
_MASKS = {"attention_mask", "sliding_mask"}
LONGEST_SAMPLE = 512
"""Positions of a sample that calibrate; what is longer is cut."""


def author_qdq_decoder(
    model: Model,
    samples: Sequence[Sample],
    recipe: Recipe,
    paths: Sequence[Path],
    shapes: Sequence[ChunkShape],
    data: Path,
    advance: Advance,
) -> Written:
    """Writes a graph for each shape to its path, and the weights of all to ``data``; calibrated on
    prompts and answers of the samples.

    Raises:
        MobileVLMError, PromptError, ImageError: a sample is wrong.
    """
    floats = replace(recipe, decoder=FLOAT, lm_head=FLOAT, experts="dense")
    weights, spec, layers = model.weights, model.spec, recipe.decoder
    with tempfile.TemporaryDirectory(dir=data.parent, prefix=f".{data.name}.") as folder:
        source = Path(folder) / "float.onnx"
        embeds = list(_embeds(model, samples, Path(folder)))
        longest = max(len(rows) for rows in embeds)
        with progress.track("calibration", len(embeds)) as seen, silent():
            whole = ChunkShape(longest, window=1, logits=longest)
            author_static_decoder(weights, spec, floats, source, whole)
            inputs = _inputs(model, embeds, longest, seen)
            ranges = watch_ranges(source, layers.calibrator, float_model(source), inputs)
        made = []
        for shape in shapes:
            author_static_decoder(weights, spec, floats, source, shape, advance)
            with silent():
                float_graph = float_model(source)
                more = _overrides(float_graph, ranges, layers)
                made.append(_integer_states(quantize_model(float_graph, layers, ranges, more)))
    _save_together(made, paths, data)
    stored = stored_weights(weights, paths[0], spec)
    groups = [group for group in linear_groups(spec) if group.name.startswith("decoder.")]
    errors = {",".join(group.names): weight_error(weights, stored, group) for group in groups}
    return Written(errors, data.stat().st_size)


def _embeds(model: Model, samples: Sequence[Sample], folder: Path) -> Iterator[Float32]:
    """Yield the float32 decoder's input ``(length, hidden_size)`` for each sample."""
    spec, path = model.spec, folder / "vision.onnx"
    floats = LinearFormat("fp32")
    recipe = Recipe("", floats, floats, floats, floats, "fp32", None)  # type: ignore[arg-type]
    shape = (spec.decoder.vocab_size, spec.decoder.hidden_size)
    table = model.weights.read("decoder.embed_tokens.weight", shape)
    if spec.decoder.embed_scale != 1:
        table = table * np.float32(spec.decoder.embed_scale)
    author_encoded(model.weights, spec, recipe, path)
    vision = OnnxVision(path, default_threads())
    with progress.track("images", len(samples)) as advance:
        for sample in samples:
            yield sample_rows(model, sample, vision, table.__getitem__).embeds[:LONGEST_SAMPLE]
            advance(1)
    vision.close()


def _inputs(
    model: Model, embeds: Sequence[Float32], length: int, seen: Advance
) -> Iterator[Inputs]:
    """Whole samples in one chunk with nothing before; shorter ones end in their last row again and
    again, which reaches no further than it does once."""
    spec = model.spec.decoder
    tables = {name: table[None, :length, None] for name, table in tables_of(spec).items()}
    heads, dim = spec.num_key_value_heads, spec.head_dim
    past = np.zeros((1, heads, 1, dim), np.float32)
    for rows in embeds:
        more = np.repeat(rows[-1:], length - len(rows), axis=0)
        yield {
            "inputs_embeds": np.concatenate([rows, more])[None],
            **masks_of(spec, length, 1, 0),
            **tables,
            "logits_position": np.arange(length, dtype=np.int32),
            **{
                f"past_key_values.{index}.{kind}": past
                for index in range(spec.num_hidden_layers)
                for kind in ("key", "value")
            },
        }
        seen(1)


def _overrides(model: Any, ranges: Any, layers: LinearFormat) -> Overrides:
    """Ranges that calibration cannot know: earlier keys and values are like new ones, and masked
    logits of attention end a little below the others."""
    from onnxruntime.quantization import QuantType

    wide = QuantType.QUInt8 if layers.precision == "qdq8" else QuantType.QUInt16
    narrow = QuantType.QUInt8
    made, found = producers(model), {}

    def reach(name: str) -> dict[str, np.float32]:
        low, high = (float(value.item()) for value in ranges[name].range_value)
        return {"rmin": np.float32(min(low, 0)), "rmax": np.float32(max(high, 0))}

    for output in model.graph.output:
        if not output.name.startswith("present."):
            continue
        name, reader = source_of(made, output.name, None)
        past = output.name.replace("present", "past_key_values")
        found[name] = [{"quant_type": wide, **reach(name)}]
        if wide != narrow:
            convert: dict[str, Any] = {
                "quant_type": narrow,
                "recv_nodes": {reader.name},
                **reach(name),
            }
            found[name][0]["convert"] = convert
        joined = next(node for node in model.graph.node if past in node.input)
        for state in (past, *joined.output):
            found[state] = [{"quant_type": narrow, **reach(name)}]
        if name != output.name and wide == narrow:
            found[output.name] = [{"quant_type": narrow, **reach(name)}]
    lowest = 0.0
    for node in model.graph.node:
        if node.op_type == "GreaterOrEqual":  # experts are chosen: what is equal must stay equal
            found |= {name: [{"quant_type": wide, **_SHARE}] for name in node.input}
        if node.op_type == "Where":
            found[node.output[0]] = [{"quant_type": wide, **_SHARE}]
        if not _MASKS.isdisjoint(node.input):
            scores = reach(node.input[0])
            floor = scores["rmin"] - np.float32(_HEADROOM)
            lowest = min(lowest, float(floor - scores["rmax"]))
            found[node.output[0]] = [
                {"quant_type": wide, "rmin": np.float32(floor), "rmax": scores["rmax"]}
            ]
    mask = {"rmin": np.float32(max(lowest, MASKED)), "rmax": np.float32(0)}
    for value in model.graph.input:
        if value.name in _MASKS:
            found[value.name] = [{"quant_type": wide, **mask}]
    return found


def _integer_states(model: Any) -> Any:
    """Takes away what makes floats of keys and values at the graph's borders."""
    import onnx

    graph = model.graph
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    made = producers(model)
    dropped = []
    for value in graph.input:
        if value.name.startswith("past_key_values."):
            (quantize,) = readers[value.name]
            for reader in readers[quantize.output[0]]:
                _rename(reader.input, quantize.output[0], value.name)
            value.type.tensor_type.elem_type = onnx.TensorProto.UINT8
            dropped.append(quantize)
    for value in graph.output:
        if value.name.startswith("present."):
            dequantize = made[value.name]
            name, floats = dequantize.input[0], f"{value.name}.float"
            for reader in readers.get(value.name, []):
                _rename(reader.input, value.name, floats)
            dequantize.output[0] = floats
            for reader in readers[name]:
                _rename(reader.input, name, value.name)
            _rename(made[name].output, name, value.name)
            value.type.tensor_type.elem_type = onnx.TensorProto.UINT8
    for node in dropped:
        graph.node.remove(node)
    return model


def _rename(names: Any, old: str, new: str) -> None:
    for index, name in enumerate(names):
        if name == old:
            names[index] = new


def _save_together(models: Sequence[Any], paths: Sequence[Path], data: Path) -> None:
    """Writes the graphs; a large tensor that several have is once in the data file."""
    places: dict[tuple[str, bytes], tuple[int, int]] = {}
    import hashlib

    import onnx

    with data.open("wb") as file:
        for model, path in zip(models, paths, strict=True):
            model.producer_name, model.producer_version = "mobilevlm", ""
            for tensor in model.graph.initializer:
                content = onnx.numpy_helper.to_array(tensor).tobytes()
                if len(content) < INLINE_BYTES:
                    continue
                key = tensor.name, hashlib.sha256(content).digest()
                if key not in places:
                    file.write(b"\0" * (-file.tell() % 64))
                    places[key] = file.tell(), len(content)
                    file.write(content)
                _refer(tensor, data.name, *places[key])
            onnx.save_model(model, path)


def _refer(tensor: Any, location: str, offset: int, length: int) -> None:
    import onnx

    for field in ("raw_data", "float_data", "int32_data", "int64_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
