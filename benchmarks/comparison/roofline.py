"""Upper limits of the machine, and the least work of each stage.

Peaks are measured in the same run, on shapes like the model's: reading a gigabyte of memory, and
ONNX Runtime's own matrix products, the fastest kernels at hand in each precision. A stage can be no
faster than its floating-point operations at the peak, nor than its weights at the reading speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.image_encoder import ConvEncoder, NativeEncoder, SquareEncoder
from mobilevlm.input_spec import InputSpec
from mobilevlm.linear_groups import (
    LinearGroup,
    decoder_groups,
    expansion_groups,
    projector_groups,
    stage_groups,
    tower_groups,
)
from mobilevlm.spec import ModelSpec

BYTES_READ = 2**30
CHUNK = 2**23
ROWS, INPUTS, OUTPUTS = 576, 2048, 5632
"""A product of the size that vision and prefill are made of."""
REPEATS = 7


@dataclass(frozen=True)
class Peaks:
    """Per second, on all threads; the best of some repetitions."""

    read: float
    """Bytes of memory read."""
    float32: float
    """Operations in a float32 product."""
    int8: float
    """Operations in a product of uint8 rows and int8 weights, quantization of the rows included."""


@dataclass(frozen=True)
class Work:
    """Least work of a stage."""

    operations: float
    """Multiplications and additions."""
    bytes_read: float
    """Weights, and in decode keys and values."""


def measure_peaks(threads: int) -> Peaks:
    """Takes a second or two, and 1 GiB of memory. Needs the onnx package."""
    operations = 2.0 * ROWS * INPUTS * OUTPUTS
    return Peaks(
        read=measure_read(threads),
        float32=operations / _best(_product("MatMul", threads)),
        int8=operations / _best(_product("DynamicQuantizeMatMul", threads)),
    )


def measure_read(threads: int) -> float:
    """Bytes of memory read per second."""
    return BYTES_READ / _best(_reader(threads))


def _best(action: Callable[[], object]) -> float:
    """Seconds of the fastest repetition: disturbances only ever make it slower."""
    action()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def _reader(threads: int) -> Callable[[], object]:
    values = np.ones(BYTES_READ // 4, np.float32)
    chunks = np.split(values, BYTES_READ // CHUNK)
    pool = ThreadPoolExecutor(threads)
    return lambda: sum(pool.map(np.max, chunks))  # a compare per value is far below the read


def _product(operator: str, threads: int) -> Callable[[], object]:
    """A session with one product by a constant matrix."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    if operator == "MatMul":
        weights = [random.standard_normal((INPUTS, OUTPUTS), np.float32)]
        domain = ""
    else:
        # 7 bits: without VNNI, products of 8 bits saturate
        weights = [
            random.integers(-64, 64, (INPUTS, OUTPUTS)).astype(np.int8),
            np.array([0.01], np.float32),
        ]
        domain = "com.microsoft"
    names = [f"w{index}" for index in range(len(weights))]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", *names], ["y"], domain=domain)],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, OUTPUTS])],
        [numpy_helper.from_array(w, name) for w, name in zip(weights, names, strict=True)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(onnx.ModelProto.SerializeToString(model), options)
    rows = random.standard_normal((ROWS, INPUTS), np.float32)
    return lambda: session.run(None, {"x": rows})


def vision_work(spec: ModelSpec, weight_bytes: int, runs: Sequence[int]) -> Work:
    """One photo through tower and projector. ``runs``: positions inside the encoder in each of its
    runs, as one for each tile."""
    encoder = spec.image.encoder
    if isinstance(encoder, NativeEncoder):
        operations = sum(_native_operations(encoder, spec.image, patches) for patches in runs)
    else:
        assert isinstance(encoder, SquareEncoder)
        tile = tower_operations(encoder) + projector_operations(spec.image.connector)
        operations = len(runs) * tile
    return Work(operations, weight_bytes)


def prefill_work(spec: DecoderSpec, length: int, weight_bytes: int) -> Work:
    """A prompt through the decoder, logits of its last position only. Where there is an encoder,
    the prompt passes that, and the decoder takes its first step."""
    width = spec.num_attention_heads * spec.head_dim
    if spec.encoder_layers:
        attention = 4.0 * length * length * width * spec.encoder_layers
        step = decode_work(spec, length, weight_bytes, 0)
        encoded = length * token_operations(spec, "encoder") + attention
        return Work(encoded + step.operations, weight_bytes)
    layers = length * token_operations(spec, "layers")
    # a position sees itself and those before it
    attention = 2.0 * length * (length + 1) * width
    head = token_operations(spec, "lm_head")
    return Work(layers + attention * spec.num_hidden_layers + head, weight_bytes)


def decode_work(spec: DecoderSpec, length: int, weight_bytes: int, kv_bytes: int) -> Work:
    """One token after ``length`` others. ``kv_bytes``: of a stored key or value element."""
    heads = spec.num_attention_heads * spec.head_dim
    cached = 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * length
    products = token_operations(spec, "layers") + token_operations(spec, "lm_head")
    attention = 4.0 * length * heads * spec.num_hidden_layers
    return Work(products + attention, weight_bytes + cached * kv_bytes)


def token_operations(spec: DecoderSpec, part: Literal["encoder", "layers", "lm_head"]) -> float:
    """Return the operations of products with weights for one position in a part of a decoder: of
    sparse experts only those that a token uses."""
    groups = (group for group in decoder_groups(spec) if group.name.split(".")[1] == part)
    return 2.0 * sum(group.size * _share(spec, group) for group in groups)


def _share(spec: DecoderSpec, group: LinearGroup) -> float:
    """Return the share of tokens that a layer multiplies."""
    if spec.experts is None or ".experts." not in group.name:
        return 1.0
    return spec.experts.top_k / spec.num_experts(int(group.name.split(".")[2]))


def _native_operations(spec: NativeEncoder, image: InputSpec, patches: int) -> float:
    """Tower and mergers."""
    size = spec.hidden_size
    operations = 2.0 * patches * spec.patch_values * size
    operations += 2.0 * patches * sum(group.size for group in tower_groups(spec))
    for layer in range(spec.num_hidden_layers):
        seen = min(patches, (spec.window_of(layer) * spec.merge_size) ** 2 or patches)
        operations += 4.0 * patches * seen * size
    rows = patches // spec.square
    return operations + 2.0 * rows * sum(group.size for group in projector_groups(image.connector))


def tower_operations(spec: SquareEncoder) -> float:
    """Patch embedding, and the products and attention of each layer."""
    if isinstance(spec, ConvEncoder):
        return _conv_operations(spec)
    tokens, size = spec.num_positions, spec.hidden_size
    patches = 2.0 * spec.num_patches * 3 * spec.patch_size**2 * size
    products = 2.0 * tokens * sum(group.size for group in tower_groups(spec))
    return patches + products + spec.num_hidden_layers * 4.0 * tokens * tokens * size


def _conv_operations(spec: ConvEncoder) -> float:
    """Convolutions, and the products and attention of each stage."""
    first, positions = spec.widths[0], spec.stage_grid(0) ** 2
    operations = 2.0 * positions * first * (4 * 27 + 9 + first)
    for stage, width in enumerate(spec.widths):
        positions, depth = spec.stage_grid(stage) ** 2, spec.depths[stage]
        products = sum(group.size for group in stage_groups(spec, stage))
        kernels = 49 * (depth + (stage > 0))
        if stage in spec.attention_stages:
            operations += 4.0 * positions * positions * width * depth
            kernels += 49
        else:
            kernels += 9 * depth
        operations += 2.0 * positions * (products + kernels * width)
    operations += 18.0 * spec.num_features * spec.hidden_size
    return operations + 2.0 * sum(group.size for group in expansion_groups(spec))


def projector_operations(spec: ConnectorSpec) -> float:
    """The least that gives the exact result: LDPv2's second product comes after its pooling. A
    Q-Former reads no instruction."""
    patches, tokens = spec.grid**2, spec.num_tokens
    operations = 0.0
    for group in projector_groups(spec):
        all_patches = group.name.endswith(".cross.key_proj") or spec.kind == "ldp"
        all_patches |= (spec.kind, group.name) == ("ldpv2", "projector.mlp.0")
        rows = patches if all_patches else tokens
        operations += 2.0 * rows * group.size * (".text_mlp." not in group.name)
    if spec.kind == "ldpv2":
        operations += 18.0 * spec.out_size * tokens
    if spec.kind == "ldp":  # two blocks of depthwise and pointwise convolution, one of stride 2
        operations += (18.0 + 2.0 * spec.out_size) * spec.out_size * (patches + tokens)
    if (queries := spec.qformer) is not None:
        seen = sum(
            tokens + patches * queries.has_cross_attention(index)
            for index in range(queries.num_hidden_layers)
        )
        operations += 4.0 * tokens * queries.hidden_size * seen
    return operations


def share_of_roof(work: Work, seconds: float, operations_peak: float, read_peak: float) -> float:
    """The least possible time over the time it took."""
    return max(work.operations / operations_peak, work.bytes_read / read_peak) / seconds
