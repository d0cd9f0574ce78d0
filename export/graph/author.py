"""Authors whole ONNX files: graph inputs and outputs around the stages' modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

from mobilevlm.bundle import data_path
from mobilevlm.checkpoint import Weights
from mobilevlm.console.progress import Advance, ignore
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.export.formats import Written
from mobilevlm.export.graph.decoder import DecoderStage, WatchedLayer
from mobilevlm.export.graph.dialects import CPU, ELEMENTARY, STATIC, Dialect, WatchingDialect
from mobilevlm.export.graph.encoder_decoder import EncodedDecoderStage, EncoderStage
from mobilevlm.export.graph.experts import SparseMLP
from mobilevlm.export.graph.layers import FLOAT, Linear
from mobilevlm.export.graph.static_decoder import StaticDecoderStage
from mobilevlm.export.graph.vision import VisionStage
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.export.quantize.gptq import HessianOf, no_hessian
from mobilevlm.export.quantize.rotation import rotated
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.recipe import Recipe
from mobilevlm.spec import ModelSpec
from mobilevlm.state_buffers import state_buffers

IR_VERSION = 10

Shape = list[int | str]


@dataclass(frozen=True)
class ChunkShape:
    """Sizes of a decoder graph with fixed shapes."""

    length: int
    """Positions that a run appends"""
    window: int
    """Earlier positions that it sees"""
    logits: int = 1
    """Positions whose logits it gives"""


def author_vision(
    weights: Weights,
    spec: ModelSpec,
    recipe: Recipe,
    path: Path,
    advance: Advance = ignore,
    hessian: HessianOf = no_hessian,
    dialect: Dialect | None = None,
) -> Written:
    """Writes the vision stage. ``dialect``: the recipe's when not given."""

    def build(builder: GraphBuilder, file: WeightFile) -> None:
        stage = VisionStage(file, spec)
        size, count = spec.image.square.size, spec.image.encoder.num_features
        pixels = _input(builder, "pixels", ir.DataType.UINT8, [1, size, size, 3])
        further = [
            _input(builder, name, ir.DataType.INT64, [1, name.replace("_ids", "_length")])
            for name in spec.image.connector.array_names
        ]
        tokens, features = stage(builder.op, pixels, *further)
        _output(
            builder,
            tokens,
            "visual_tokens",
            [1, spec.image.connector.num_rows, spec.image.connector.out_size],
        )
        _output(builder, features, "features", [1, count, spec.image.encoder.hidden_size])

    dialect = dialect or (ELEMENTARY if recipe.elementary else CPU)
    file = WeightFile(weights, data_path(path), recipe, advance, hessian, dialect)
    return _author("vision_encoder", path, file, build)


def author_decoder(
    weights: Weights,
    spec: ModelSpec,
    recipe: Recipe,
    path: Path,
    advance: Advance = ignore,
    hessian: HessianOf = no_hessian,
) -> Written:
    """Writes the decoder stage. ``weights``: as they are without a rotation, which the recipe asks
    for; ``hessian``: with it."""
    decoder = spec.decoder
    encoded: Shape = [1, decoder.num_attention_heads, "prompt_length", decoder.head_dim]
    rows: Shape = [1, "length", decoder.hidden_size]

    def build(builder: GraphBuilder, file: WeightFile) -> None:
        stage = (EncodedDecoderStage if decoder.encoder_layers else DecoderStage)(file, decoder)
        embeds = _input(builder, "inputs_embeds", FLOAT, rows)
        total = _input(builder, "total_length", ir.DataType.INT32, [1])
        positions = _input(builder, "logits_positions", ir.DataType.INT64, ["positions"])
        past = _state_inputs(builder, decoder)
        further: list[Any] = []
        if decoder.encoder_layers:
            further = [_key_value_inputs(builder, "cross", decoder.num_hidden_layers, encoded)]
        if decoder.rope_sections or decoder.deep_layers:
            table: Shape = ["length", decoder.rotary_channels // 2]
            names = ("rotary_cos", "rotary_sin") if decoder.rope_sections else ()
            tables = tuple(_input(builder, name, FLOAT, table) for name in names)
            deep = {
                layer: _input(builder, f"deep.{layer}", FLOAT, rows)
                for layer in decoder.deep_layers
            }
            further = [tables, deep]
        logits, presents, routers = stage(builder.op, embeds, total, positions, past, *further)
        _output(builder, logits, "logits", [1, "positions", decoder.vocab_size])
        _state_outputs(builder, decoder, presents)
        for index, router in routers.items():  # the last layer only has the positions asked for
            length = "positions" if index == decoder.num_hidden_layers - 1 else "length"
            experts = decoder.num_experts(index)
            _output(builder, router, f"router_logits.{index}", [1, length, experts])

    source = rotated(weights, spec) if recipe.is_rotated else weights
    file = WeightFile(source, data_path(path), recipe, advance, hessian)
    return _author("decoder_model_merged", path, file, build)


def author_watched_layer(
    weights: Weights, spec: DecoderSpec, index: int, path: Path
) -> dict[str, tuple[str, ...]]:
    """Writes one layer of a decoder in float32, with the input of each linear layer as an output;
    return the layers that read each of these outputs."""
    dialect = WatchingDialect.of(CPU)
    watched: dict[str, tuple[str, ...]] = {}
    rows: Shape = [1, "length", spec.hidden_size]

    def build(builder: GraphBuilder, file: WeightFile) -> None:
        stage = WatchedLayer(file, index, spec)
        hidden = _input(builder, "hidden", FLOAT, rows)
        total = _input(builder, "total_length", ir.DataType.INT32, [1])
        past = _state_inputs(builder, spec, index)[index]
        tables: tuple[Any, ...] = ()
        if spec.rope_sections:
            table: Shape = ["length", spec.rotary_channels // 2]
            tables = tuple(
                _input(builder, name, FLOAT, table) for name in ("rotary_cos", "rotary_sin")
            )
        after, normed = stage(builder.op, hidden, total, past, tables)
        _output(builder, after, "after", rows)
        _output(builder, normed, "normed", rows)
        names = {
            id(weight): found
            for part in stage.modules()
            if isinstance(part, (Linear, SparseMLP))
            for weight, found in part.products
        }
        places: dict[int, str] = {}
        for weight, value in dialect.products:
            if id(value) not in places:
                places[id(value)] = value.name = f"input.{len(places)}"
                value.shape, value.type = None, ir.TensorType(FLOAT)
                builder.graph.outputs.append(value)
            place = places[id(value)]
            watched[place] = (*watched.get(place, ()), *names[id(weight)])

    recipe = replace(RECIPES["fp32"], experts="plain")
    _author("layer", path, WeightFile(weights, data_path(path), recipe, dialect=dialect), build)
    return watched


def author_encoder(
    weights: Weights,
    spec: ModelSpec,
    recipe: Recipe,
    path: Path,
    advance: Advance = ignore,
    hessian: HessianOf = no_hessian,
) -> Written:
    """Writes the encoder of a model that has one: the prompt to keys and values for the decoder."""
    decoder = spec.decoder
    shape: Shape = [1, "length", decoder.hidden_size]
    encoded: Shape = [1, decoder.num_attention_heads, "length", decoder.head_dim]

    def build(builder: GraphBuilder, file: WeightFile) -> None:
        stage = EncoderStage(file, decoder)
        states, cross = stage(builder.op, _input(builder, "inputs_embeds", FLOAT, shape))
        _output(builder, states, "encoder_states", shape)
        _key_value_outputs(builder, "cross", cross, encoded)

    file = WeightFile(weights, data_path(path), recipe, advance, hessian)
    return _author("encoder_model", path, file, build)


def author_static_decoder(
    weights: Weights,
    spec: ModelSpec,
    recipe: Recipe,
    path: Path,
    shape: ChunkShape,
    advance: Advance = ignore,
    hessian: HessianOf = no_hessian,
) -> Written:
    """Writes the decoder stage for chunks of one size, see
    :mod:`mobilevlm.export.graph.static_decoder`."""
    decoder = spec.decoder
    length, window = shape.length, shape.window
    heads, dim = decoder.num_key_value_heads, decoder.head_dim
    dialect = ELEMENTARY if recipe.elementary else STATIC

    def build(builder: GraphBuilder, file: WeightFile) -> None:
        stage = StaticDecoderStage(file, decoder)
        embeds = _input(builder, "inputs_embeds", FLOAT, [1, length, decoder.hidden_size])
        mask = _input(builder, "attention_mask", FLOAT, [1, 1, length, window + length])
        table: Shape = [1, length, 1, decoder.rotary_channels]
        rotary = (
            _input(builder, "rotary_cos", FLOAT, table),
            _input(builder, "rotary_sin", FLOAT, table),
        )
        if dialect.floats_only:
            rows: Shape = [1, shape.logits, length]
            position = _input(builder, "logits_position", FLOAT, rows)
        else:
            position = _input(builder, "logits_position", ir.DataType.INT32, [shape.logits])
        past = _key_value_inputs(
            builder, "past_key_values", decoder.num_hidden_layers, [1, heads, window, dim]
        )
        near, turned = mask, rotary
        if decoder.sliding_layers:
            near = _input(builder, "sliding_mask", FLOAT, [1, 1, length, window + length])
            if decoder.sliding_rope_theta is not None:
                turned = (
                    _input(builder, "sliding_cos", FLOAT, table),
                    _input(builder, "sliding_sin", FLOAT, table),
                )
        masks, tables = (mask, near), (rotary, turned)
        logits, presents = stage(builder.op, embeds, masks, tables, position, past)
        _output(builder, logits, "logits", [1, shape.logits, decoder.vocab_size])
        _key_value_outputs(builder, "present", presents, [1, heads, length, dim])

    file = WeightFile(weights, data_path(path), recipe, advance, hessian, dialect)
    return _author("decoder", path, file, build)


def author_embeddings(
    weights: Weights, spec: ModelSpec, recipe: Recipe, path: Path, advance: Advance = ignore
) -> Written:
    """Writes the embedding table as a graph of one Gather. The runtime maps the data file itself
    instead, so that only the rows in use become resident."""
    decoder = spec.decoder

    def build(builder: GraphBuilder, file: WeightFile) -> None:
        table = file.read("decoder.embed_tokens.weight", decoder.vocab_size, decoder.hidden_size)
        half = recipe.embeddings == "fp16"
        weight = file.parameter(table.astype(np.float16) if half else table, "embed_tokens.weight")
        builder.graph.initializers["embed_tokens.weight"] = weight
        ids = _input(builder, "input_ids", ir.DataType.INT64, [1, "length"])
        rows = builder.op.Gather(weight, ids)
        embeds = builder.op.Cast(rows, to=FLOAT) if half else rows
        if decoder.embed_scale != 1:
            embeds = builder.op.Mul(embeds, decoder.embed_scale)
        _output(builder, embeds, "inputs_embeds", [1, "length", decoder.hidden_size])

    file = WeightFile(weights, data_path(path), recipe, advance)
    return _author("embed_tokens", path, file, build)


def _author(
    name: str,
    path: Path,
    file: WeightFile,
    build: Callable[[GraphBuilder, WeightFile], None],
) -> Written:
    opsets = dict(file.dialect.opset_imports)
    graph = ir.Graph([], [], nodes=[], opset_imports=opsets, name=name)
    try:
        build(GraphBuilder(graph), file)
    finally:
        file.close()
    for node in graph:
        node.metadata_props.clear()  # where in the modules it was made: bytes a device never needs
    ir.save(ir.Model(graph, ir_version=IR_VERSION, producer_name="mobilevlm"), path)
    return Written(file.errors, round(file.bytes_per_token))


def _input(builder: GraphBuilder, name: str, dtype: ir.DataType, shape: Shape) -> Any:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    builder.graph.inputs.append(value)
    return value


def _output(builder: GraphBuilder, value: Any, name: str, shape: Shape) -> None:
    value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(FLOAT)
    builder.graph.outputs.append(value)


def _state_inputs(
    builder: GraphBuilder, spec: DecoderSpec, only: int | None = None
) -> list[tuple[Any, ...]]:
    """The buffers of each layer, or of one alone."""
    found: list[tuple[Any, ...]] = [()] * spec.num_hidden_layers
    for buffer in state_buffers(spec):
        if only not in (None, buffer.layer):
            continue
        shape: Shape = ["capacity" if size is None else size for size in buffer.shape]
        found[buffer.layer] += (_input(builder, buffer.past, FLOAT, shape),)
    return found


def _state_outputs(
    builder: GraphBuilder, spec: DecoderSpec, presents: Iterable[tuple[Any, ...]]
) -> None:
    """``presents``: of each layer; of a short convolution its inputs, earlier ones first."""
    for buffer, value in zip(state_buffers(spec), chain(*presents), strict=True):
        shape: Shape = ["capacity" if size is None else size for size in buffer.shape]
        if buffer.kind == "convolution":
            shape = [1, "inputs", spec.hidden_size]
        _output(builder, value, buffer.present, shape)


def _key_value_inputs(
    builder: GraphBuilder, name: str, layers: int, shape: Shape
) -> list[tuple[Any, Any]]:
    """Keys and values of each layer."""
    return [
        (
            _input(builder, f"{name}.{index}.key", FLOAT, shape),
            _input(builder, f"{name}.{index}.value", FLOAT, shape),
        )
        for index in range(layers)
    ]


def _key_value_outputs(
    builder: GraphBuilder, name: str, pairs: Iterable[tuple[Any, Any]], shape: Shape
) -> None:
    for index, (key, value) in enumerate(pairs):
        _output(builder, key, f"{name}.{index}.key", shape)
        _output(builder, value, f"{name}.{index}.value", shape)
