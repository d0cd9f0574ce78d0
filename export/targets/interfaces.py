"""Finished graphs with the inputs and outputs that other runtimes give and take.

The new graph lies beside ours and refers to the same file of weights, so that a bundle holds them
once.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from mobilevlm.spec import ModelSpec

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
Shape: TypeAlias = list[int | str]
Pixels: TypeAlias = Literal["normalised", "bytes"]
"""Form of an encoder's ``pixel_values``."""


def write_decoder(source: Path, target: Path, spec: ModelSpec, counted: bool) -> None:
    """Write a decoder of the hub's multimodal models: ``inputs_embeds`` and ``attention_mask`` in
    place of lengths, and the logits of the last position; of as many positions as
    ``num_logits_to_keep`` says (0: all) where they are ``counted``."""
    model = ir.load(source)
    graph, tape = model.graph, Tape()
    embeds = _input_named(graph, "inputs_embeds")
    embeds.shape = ir.Shape([1, "sequence_length", spec.decoder.hidden_size])
    mask = _value("attention_mask", INT64, [1, "total_sequence_length"])
    total = tape.op("Shape", [mask], {"start": 1, "end": 2})
    total = tape.op("Cast", [total], {"to": ir.DataType.INT32})
    length = tape.op("Shape", [embeds], {"start": 1, "end": 2})
    keep, positions = None, tape.op("Sub", [length, _constant(tape, np.array([1], np.int64))])
    if counted:
        keep = _value("num_logits_to_keep", INT64, [])
        positions = _last_positions(tape, tape.op("Squeeze", [length]), keep)
    if spec.decoder.sliding_layers:  # their buffers have all positions here
        _replace_input(graph, "window_length", total)
    _replace_input(graph, "total_length", total, mask)
    _replace_input(graph, "logits_positions", positions, keep)
    graph.insert_before(graph[0], _named(tape, "given"))
    ir.save(model, target)


def _last_positions(tape: Tape, length: ir.Value, keep: ir.Value) -> ir.Value:
    zero, one = (_constant(tape, np.array(number, np.int64)) for number in (0, 1))
    kept = tape.op("Min", [keep, length])
    kept = tape.op("Where", [tape.op("Equal", [keep, zero]), length, kept])
    return tape.op("Range", [tape.op("Sub", [length, kept]), length, one])


def write_embeddings(source: Path, target: Path, spec: ModelSpec, image_id: int) -> None:
    """Write an embedding table that puts images in: ``input_ids``, and ``image_features`` ``(rows,
    hidden_size)`` of which each ``image_id`` takes the next."""
    model = ir.load(source)
    graph, before, after = model.graph, Tape(), Tape()
    ids, rows, hidden = graph.inputs[0], graph.outputs[0], spec.decoder.hidden_size
    features = _value("image_features", FLOAT, ["image_rows", hidden])
    zero, axis = (_constant(before, np.array(number, np.int64)) for number in (0, 1))
    is_image = before.op("Equal", [ids, _constant(before, np.array(image_id, np.int64))])
    text_ids = before.op("Where", [is_image, zero, ids])
    for node in list(graph):
        for index, value in enumerate(node.inputs):
            if value is ids:
                node.replace_input_with(index, text_ids)
    # A row in front of all, for text: there may be no image.
    none = _constant(before, np.zeros((1, hidden), np.float32))
    padded = before.op("Concat", [none, features], {"axis": 0})
    count = before.op("CumSum", [before.op("Cast", [is_image], {"to": INT64}), axis])
    image_rows = before.op("Gather", [padded, before.op("Where", [is_image, count, zero])])
    graph.outputs.clear()
    rows.name = "text_rows"
    last = _constant(after, np.array([-1], np.int64))
    made = after.op("Where", [after.op("Unsqueeze", [is_image, last]), image_rows, rows])
    _describe(made, "inputs_embeds", FLOAT, [1, "sequence_length", hidden])
    graph.inputs.append(features)
    graph.outputs.append(made)
    graph.insert_before(graph[0], _named(before, "before"))
    graph.extend(_named(after, "after"))
    ir.save(model, target)


def write_image_encoder(source: Path, target: Path, spec: ModelSpec, pixels: Pixels) -> None:
    """Write an image encoder of any number of squares: ``pixel_values`` to ``image_features``.

    ``normalised``: float32 ``(…, 3, size, size)`` as the hub's models take them, to ``(squares,
    rows, hidden_size)``; they go back to the bytes that they were made of. ``bytes``: uint8
    ``(squares, size, size, 3)`` to ``(squares · rows, hidden_size)``. Our graph computes one square
    of bytes; it becomes the body of a loop over them.
    """
    model = ir.load(source)
    graph, tape = model.graph, Tape()
    size = spec.image.square.size
    square, rows = graph.inputs[0], graph.outputs[0]
    found = list(rows.shape or [])[1:]
    nodes = list(graph)
    graph.inputs.clear()
    graph.outputs.clear()
    graph.remove(nodes)
    given = _value("pixel_values", ir.DataType.UINT8, ["squares", size, size, 3])
    channels_last = given
    if pixels == "normalised":
        # Idefics3 has an axis for the prompt before that of the squares.
        leading: Shape = ["batch_size", "squares"] if spec.family == "smolvlm" else ["squares"]
        given = _value("pixel_values", FLOAT, [*leading, 3, size, size])
        channels_last = _as_bytes(tape, given, spec)
    graph.inputs.append(given)
    body = _one_square(graph, square, rows, nodes)
    features = tape.op("Scan", [channels_last], {"body": body, "num_scan_inputs": 1})
    shape: list[Any] = ["all_squares", *found]
    if pixels == "bytes":
        flat = _constant(tape, np.array([-1, spec.decoder.hidden_size], np.int64))
        features, shape = tape.op("Reshape", [features, flat]), ["image_rows", found[-1]]
    _describe(features, "image_features", FLOAT, shape)
    graph.outputs.append(features)
    graph.extend(_named(tape, "squares"))
    ir.save(model, target)


def _as_bytes(tape: Tape, given: ir.Value, spec: ModelSpec) -> ir.Value:
    """Return normalised pixels as the bytes that they were made of, channels last."""
    square = spec.image.square
    shape = _constant(tape, np.array([-1, 3, square.size, square.size], np.int64))
    scale, offset = (
        _constant(tape, (np.array(part) * 255).astype(np.float32).reshape(3, 1, 1))
        for part in (square.std, square.mean)
    )
    values = tape.op("Mul", [tape.op("Reshape", [given, shape]), scale])
    rounded = tape.op("Round", [tape.op("Add", [values, offset])])
    bounds = [_constant(tape, np.array(bound, np.float32)) for bound in (0, 255)]
    stored = tape.op("Cast", [tape.op("Clip", [rounded, *bounds])], {"to": ir.DataType.UINT8})
    return tape.op("Transpose", [stored], {"perm": [0, 2, 3, 1]})


def _one_square(graph: ir.Graph, pixels: ir.Value, rows: ir.Value, nodes: list[ir.Node]) -> Any:
    """Return the body of the loop: what the graph computed, of one square without a batch axis."""
    given = _value("square", ir.DataType.UINT8, list(pixels.shape or [])[1:])
    before, after = Tape(), Tape()
    axes = _constant(before, np.array([0], np.int64))
    batched = before.op("Unsqueeze", [given, axes])
    ir.convenience.replace_all_uses_with(pixels, batched)
    found = after.op("Squeeze", [rows, axes])
    _describe(found, "square_features", FLOAT, list(rows.shape or [])[1:])
    nodes = [*_named(before, "square_in"), *nodes, *_named(after, "square_out")]
    opsets = dict(graph.opset_imports)
    return ir.Graph([given], [found], nodes=nodes, opset_imports=opsets, name="one_square")


def _input_named(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.inputs if value.name == name)


def _replace_input(graph: ir.Graph, name: str, by: ir.Value, given: ir.Value | None = None) -> None:
    """Let a value that is computed take the place of an input, and another input that of it."""
    old = _input_named(graph, name)
    ir.convenience.replace_all_uses_with(old, by)
    place = graph.inputs.index(old)
    graph.inputs[place : place + 1] = [] if given is None else [given]


def _named(tape: Tape, prefix: str) -> list[ir.Node]:
    """Return new nodes with names that no other graph, inner or outer, has."""
    for index, node in enumerate(tape.nodes):
        node.name = f"{prefix}.{index}"
        for value in node.outputs:
            value.name = value.name or node.name
    return list(tape.nodes)


def _constant(tape: Tape, array: np.ndarray[Any, Any]) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(array)})


def _value(name: str, dtype: ir.DataType, shape: Iterable[Any]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(dtype))


def _describe(value: ir.Value, name: str, dtype: ir.DataType, shape: Iterable[Any]) -> None:
    value.name, value.shape, value.type = name, ir.Shape(list(shape)), ir.TensorType(dtype)
