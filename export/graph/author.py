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
from mobilevlm.export.graph.delta import GatedDelta
from mobilevlm.export.graph.dialects import CPU, ELEMENTARY, STATIC, Dialect, WatchingDialect
from mobilevlm.export.graph.drawing import CodeEmbedding, CodeHead, ImageDecoder
from mobilevlm.export.graph.encoder_decoder import EncodedDecoderStage, EncoderStage
from mobilevlm.export.graph.experts import SparseMLP
from mobilevlm.export.graph.layers import FLOAT, Linear
from mobilevlm.export.graph.sound import AudioStage
from mobilevlm.export.graph.static_decoder import StaticDecoderStage
from mobilevlm.export.graph.vision import VisionStage
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.export.quantize.gptq import HessianOf, no_hessian
from mobilevlm.export.quantize.rotation import rotated
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.linear_groups import linear_groups
from mobilevlm.recipe import Recipe
from mobilevlm.spec import ModelSpec
from mobilevlm.state_buffers import LAYER_ROWS, slot_buffers, state_buffers

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


def author_encoded(
    weights: Weights,
    spec: ModelSpec,
    recipe: Recipe,
    path: Path,
    advance: Advance = ignore,
    hessian: HessianOf = no_hessian,
    dialect: Dialect | None = None,
) -> Written:
    """Writes the vision or the audio stage, whichever the model has. ``dialect``: the recipe's when
    not given."""

    def build(builder: GraphBuilder, file: WeightFile) -> None:
        _build_encoded(builder, file, spec)

    dialect = dialect or (ELEMENTARY if recipe.elementary else CPU)
    file = WeightFile(weights, data_path(path), recipe, advance, hessian, dialect)
    return _author(f"{spec.encoder_stage}_encoder", path, file, build)


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
    decoder, draws = spec.decoder, spec.draws
    encoded: Shape = [1, decoder.num_attention_heads, "prompt_length", decoder.head_dim]
    count: int | str = "sequences" if draws else 1
    rows: Shape = [count, "length", decoder.hidden_size]

    def build(builder: GraphBuilder, file: WeightFile) -> None:
        stage: EncodedDecoderStage | DecoderStage = (
            EncodedDecoderStage(file, decoder)
            if decoder.encoder_layers
            else DecoderStage(file, decoder, several=draws)
        )
        embeds = _input(builder, "inputs_embeds", FLOAT, rows)
        total = _input(builder, "total_length", ir.DataType.INT32, [1])
        positions = _input(builder, "logits_positions", ir.DataType.INT64, ["positions"])
        past = _state_inputs(builder, decoder, count=count)
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
        if decoder.sliding_layers or decoder.image_blocks:
            window = None
            if decoder.sliding_layers:
                window = _input(builder, "window_length", ir.DataType.INT32, [1])
            further = [*(further or [(), {}]), window, _image_inputs(builder, decoder)]
        named = _sound_input(builder, decoder) | _layer_input(builder, decoder)
        given = (embeds, total, positions, past, *further)
        logits, presents, routers = stage(builder.op, *given, **named)
        _output(builder, logits, "logits", [count, "positions", decoder.vocab_size])
        if draws:
            shape: Shape = [count, "positions", decoder.hidden_size]
            _output(builder, stage.states, "states", shape)
        _state_outputs(builder, decoder, presents, count)
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
        source = spec.kv_layer(index)
        past = _state_inputs(builder, spec, source)[source]
        tables: tuple[Any, ...] = ()
        if spec.rope_sections:
            table: Shape = ["length", spec.rotary_channels // 2]
            tables = tuple(
                _input(builder, name, FLOAT, table) for name in ("rotary_cos", "rotary_sin")
            )
        image = _image_inputs(builder, spec)
        deep = None
        if index in spec.deep_layers:
            deep = _input(builder, f"deep.{index}", FLOAT, rows)
        named = _sound_input(builder, spec)
        if spec.layer_input_size:
            own: Shape = [1, "length", spec.layer_input_size]
            named["own"] = _input(builder, LAYER_ROWS, FLOAT, own)
        after, normed, present = stage(
            builder.op, hidden, total, past, tables, image, deep, **named
        )
        if index in spec.kv_sources:
            for buffer, value in zip(slot_buffers(spec, layer=index), present, strict=True):
                sizes: Shape = ["slots" if size is None else size for size in buffer.shape]
                _output(builder, value, buffer.present, sizes)
        _output(builder, after, "after", rows)
        _output(builder, normed, "normed", rows)
        for value, readers in _watched(stage, dialect):
            value.name = f"input.{len(watched)}"
            watched[value.name] = readers
            value.shape, value.type = None, ir.TensorType(FLOAT)
            builder.graph.outputs.append(value)

    recipe = replace(RECIPES["fp32"], experts="plain")
    _author("layer", path, WeightFile(weights, data_path(path), recipe, dialect=dialect), build)
    return watched


def author_watched_encoder(
    weights: Weights, spec: ModelSpec, wanted: Callable[[str], bool], hessian: bool, path: Path
) -> dict[int, tuple[str, ...]]:
    """Writes the vision or audio stage in float32 whose outputs are figures of wanted layers'
    inputs, ``rows.N``, ``maximum.N``, ``squares.N`` (sums) and, with ``hessian``, ``products.N``;
    return the layers that read each of these inputs, by N."""
    dialect = WatchingDialect.of(CPU)
    watched: dict[int, tuple[str, ...]] = {}
    in_sizes = {name: group.in_size for group in linear_groups(spec) for name in group.names}

    def build(builder: GraphBuilder, file: WeightFile) -> None:
        stage, op = _build_encoded(builder, file, spec), builder.op
        builder.graph.outputs.clear()
        for value, readers in _watched(stage, dialect):
            found = tuple(filter(wanted, readers))
            if not found:
                continue
            number = len(watched)
            watched[number] = found
            size = in_sizes[found[0]]
            rows = op.Reshape(value, [-1, size])
            count = op.Shape(rows, end=1)
            count.name = f"rows.{number}"
            count.shape, count.type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
            builder.graph.outputs.append(count)
            magnitudes = op.ReduceMax(op.Abs(rows), [0], keepdims=0)
            _output(builder, magnitudes, f"maximum.{number}", [size])
            squares = op.ReduceSumSquare(rows, [0], keepdims=0)
            _output(builder, squares, f"squares.{number}", [size])
            if hessian:
                products = op.MatMul(op.Transpose(rows, perm=[1, 0]), rows)
                _output(builder, products, f"products.{number}", [size, size])

    file = WeightFile(weights, data_path(path), RECIPES["fp32"], dialect=dialect)
    _author("watched_encoder", path, file, build)
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


def author_image_head(
    weights: Weights, spec: ModelSpec, recipe: Recipe, path: Path, advance: Advance = ignore
) -> Written:
    """Writes the head that chooses codes of images; ``weights`` as of :func:`author_decoder`."""
    output, width = spec.drawing, spec.decoder.hidden_size

    def build(builder: GraphBuilder, file: WeightFile) -> None:
        states = _input(builder, "states", FLOAT, ["sequences", 1, width])
        logits = CodeHead(file, output, width)(builder.op, states)
        _output(builder, logits, "logits", ["sequences", 1, output.num_codes])

    source = rotated(weights, spec) if recipe.is_rotated else weights
    return _author("image_head", path, WeightFile(source, data_path(path), recipe, advance), build)


def author_code_embeddings(
    weights: Weights, spec: ModelSpec, recipe: Recipe, path: Path, advance: Advance = ignore
) -> Written:
    """Writes the embedding of codes."""
    output, width = spec.drawing, spec.decoder.hidden_size

    def build(builder: GraphBuilder, file: WeightFile) -> None:
        codes = _input(builder, "codes", ir.DataType.INT64, [1, "length"])
        embeds = CodeEmbedding(file, output, width)(builder.op, codes)
        _output(builder, embeds, "inputs_embeds", [1, "length", width])

    file = WeightFile(weights, data_path(path), recipe, advance)
    return _author("code_embeddings", path, file, build)


def author_image_decoder(
    weights: Weights, spec: ModelSpec, recipe: Recipe, path: Path, advance: Advance = ignore
) -> Written:
    """Writes the decoder of codes to pixels."""
    output = spec.drawing

    def build(builder: GraphBuilder, file: WeightFile) -> None:
        codes = _input(builder, "codes", ir.DataType.INT64, [1, output.num_tokens])
        values = ImageDecoder(file, output)(builder.op, codes)
        _output(builder, values, "image", [1, output.edge, output.edge, 3])

    file = WeightFile(weights, data_path(path), recipe, advance)
    return _author("image_decoder", path, file, build)


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
        if decoder.layer_input_size:
            _output_layer_rows(builder, file, decoder, ids, half)

    file = WeightFile(weights, data_path(path), recipe, advance)
    return _author("embed_tokens", path, file, build)


def _output_layer_rows(
    builder: GraphBuilder, file: WeightFile, spec: DecoderSpec, ids: Any, half: bool
) -> None:
    """Write the table of layers' own inputs behind the other one, and look up its rows."""
    sizes, dtype = (spec.vocab_size, spec.layer_input_width), np.float16 if half else np.float32
    weight = file.table("decoder.embed_layers.weight", *sizes, dtype)
    builder.graph.initializers["embed_layers.weight"] = weight
    rows = builder.op.Gather(weight, ids)
    rows = builder.op.Cast(rows, to=FLOAT) if half else rows
    shape = [1, -1, spec.num_hidden_layers, spec.layer_input_size]
    rows = builder.op.Mul(builder.op.Reshape(rows, shape), spec.layer_input_size**0.5)
    _output(builder, rows, LAYER_ROWS, [1, "length", *shape[2:]])


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


def _build_encoded(
    builder: GraphBuilder, file: WeightFile, spec: ModelSpec
) -> VisionStage | AudioStage:
    build = _build_audio if spec.has_sound else _build_vision
    return build(builder, file, spec)


def _build_vision(builder: GraphBuilder, file: WeightFile, spec: ModelSpec) -> VisionStage:
    """Build the vision stage with its inputs and outputs."""
    stage, edge = VisionStage(file, spec), spec.image.edge
    edges: Shape = ["height", "width"] if edge is None else [edge, edge]
    rows: Shape = ["visual_tokens"] if edge is None else [spec.image.connector.num_rows]
    count: Shape = [spec.image.num_features or "features"]
    channels = 3 if spec.image.connector.kind != "merger" else "channels"
    pixels = _input(builder, "pixels", ir.DataType.UINT8, [1, *edges, channels])
    further = [
        _input(builder, name, ir.DataType.INT64, [1, name.replace("_ids", "_length")])
        for name in spec.image.connector.array_names
    ]
    tokens, features, deep = stage(builder.op, pixels, *further)
    shape: Shape = [1, *rows, spec.image.connector.out_size]
    _output(builder, tokens, "visual_tokens", shape)
    for name, added in zip(spec.image.connector.deep_names, deep, strict=True):
        _output(builder, added, name, shape)
    _output(builder, features, "features", [1, *count, spec.image.encoder.hidden_size])
    return stage


def _build_audio(builder: GraphBuilder, file: WeightFile, spec: ModelSpec) -> AudioStage:
    """Build the audio stage with its input and outputs."""
    stage, audio = AudioStage(file, spec), spec.audio
    bins = audio.mel.bins * audio.mel.joined
    mel = _input(builder, "mel", FLOAT, [1, bins, "frames"])
    rows, features = stage(builder.op, mel)
    _output(builder, rows, "audio_tokens", [1, "rows", audio.connector.out_size])
    _output(builder, features, "features", [1, "features", audio.encoder.hidden_size])
    return stage


def _watched(stage: Any, dialect: WatchingDialect) -> list[tuple[Any, tuple[str, ...]]]:
    """Return each input of the stage's linear layers, in the order of use, with those that read
    it."""
    names = {
        id(weight): found
        for part in stage.modules()
        if isinstance(part, (Linear, SparseMLP, GatedDelta))
        for weight, found in part.products
    }
    inputs: dict[int, tuple[Any, tuple[str, ...]]] = {}
    for weight, value in dialect.products:
        if id(weight) in names:
            _, before = inputs.get(id(value), (value, ()))
            inputs[id(value)] = value, (*before, *names[id(weight)])
    return list(inputs.values())


def _input(builder: GraphBuilder, name: str, dtype: ir.DataType, shape: Shape) -> Any:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    builder.graph.inputs.append(value)
    return value


def _output(builder: GraphBuilder, value: Any, name: str, shape: Shape) -> None:
    value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(FLOAT)
    builder.graph.outputs.append(value)


def _sound_input(builder: GraphBuilder, spec: DecoderSpec) -> dict[str, Any]:
    """Return the input that tells a decoder with products for sound whether a prompt has some."""
    return {"sound": _input(builder, "sound", FLOAT, [1])} if spec.sound_rank else {}


def _layer_input(builder: GraphBuilder, spec: DecoderSpec) -> dict[str, Any]:
    """Return the input with the rows of the table of layers' own inputs."""
    shape: Shape = [1, "length", spec.num_hidden_layers, spec.layer_input_size]
    return {"stored": _input(builder, LAYER_ROWS, FLOAT, shape)} if spec.layer_input_size else {}


def _image_inputs(builder: GraphBuilder, spec: DecoderSpec) -> tuple[Any, Any] | None:
    """Rows of a run that lie in images, and the slot behind the last of each one's image."""
    if not spec.image_blocks:
        return None
    rows, ends = (
        _input(builder, name, ir.DataType.INT64, ["image_rows"])
        for name in ("image_rows", "image_ends")
    )
    return rows, ends


def _state_inputs(
    builder: GraphBuilder, spec: DecoderSpec, only: int | None = None, count: int | str = 1
) -> list[tuple[Any, ...]]:
    """The buffers of each layer, or of one alone. ``count``: sequences."""
    found: list[tuple[Any, ...]] = [()] * spec.num_hidden_layers
    for buffer in state_buffers(spec):
        if only not in (None, buffer.layer):
            continue
        sizes = buffer.shape[1:]
        shape: Shape = [count, *("capacity" if size is None else size for size in sizes)]
        found[buffer.layer] += (_input(builder, buffer.past, FLOAT, shape),)
    return found


def _state_outputs(
    builder: GraphBuilder,
    spec: DecoderSpec,
    presents: Iterable[tuple[Any, ...]],
    count: int | str = 1,
) -> None:
    """``presents``: of each layer; of a short convolution its inputs, earlier ones first.
    ``count``: sequences."""
    for buffer, value in zip(state_buffers(spec), chain(*presents), strict=True):
        sizes = buffer.shape[1:]
        shape: Shape = [count, *("capacity" if size is None else size for size in sizes)]
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
