"""What the machine can do at most, and what each stage asks of it at least.

Peaks are measured in the same run, on shapes like the model's: reading a gigabyte of memory, and
ONNX Runtime's own matrix products, the fastest kernels at hand in each precision. A stage can be no
faster than its floating-point operations at the peak, nor than its weights at the reading speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mobilevlm.spec import ConnectorSpec, DecoderSpec, ModelSpec, QFormerSpec, TransformerEncoder

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
    """What a stage asks for."""

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


def vision_work(spec: ModelSpec, weight_bytes: int) -> Work:
    """One picture through tower and projector."""
    return Work(
        tower_operations(spec.image.encoder) + projector_operations(spec.image.connector),
        weight_bytes,
    )


def prefill_work(spec: DecoderSpec, length: int, weight_bytes: int) -> Work:
    """A prompt through the decoder, logits of its last position only."""
    head = 2.0 * spec.hidden_size * spec.vocab_size
    layers = length * layer_operations(spec) * spec.num_hidden_layers
    # a position sees itself and those before it
    attention = 2.0 * length * (length + 1) * spec.num_attention_heads * spec.head_dim
    return Work(layers + attention * spec.num_hidden_layers + head, weight_bytes)


def decode_work(spec: DecoderSpec, length: int, weight_bytes: int, kv_bytes: int) -> Work:
    """One token after ``length`` others. ``kv_bytes``: of a stored key or value element."""
    heads = spec.num_attention_heads * spec.head_dim
    cached = 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * length
    operations = spec.num_hidden_layers * (layer_operations(spec) + 4.0 * length * heads)
    head = 2.0 * spec.hidden_size * spec.vocab_size
    return Work(operations + head, weight_bytes + cached * kv_bytes)


def layer_operations(spec: DecoderSpec) -> float:
    """Products with weights in one decoder layer, for one position."""
    heads, shared = spec.num_attention_heads, spec.num_key_value_heads
    attention = spec.hidden_size * spec.head_dim * (2 * heads + 2 * shared)
    return 2.0 * (attention + 3 * spec.hidden_size * spec.intermediate_size)


def tower_operations(spec: TransformerEncoder) -> float:
    """Patch embedding, and for each layer four projections, attention and the MLP."""
    tokens = spec.num_positions
    size, wide = spec.hidden_size, spec.intermediate_size
    patches = 2.0 * spec.num_patches * 3 * spec.patch_size**2 * size
    products = 2.0 * tokens * (4 * size * size + 2 * size * wide)
    attention = 4.0 * tokens * tokens * size
    return patches + spec.num_hidden_layers * (products + attention)


def projector_operations(spec: ConnectorSpec) -> float:
    """The least that gives the exact result: LDPv2's second product comes after its pooling."""
    patches, tokens = spec.grid**2, spec.num_tokens
    products = sum(2.0 * inner * outer for inner, outer in pairwise(spec.mlp_sizes))
    if spec.kind == "mlp":
        return patches * products
    if spec.kind == "mlp_downsample":
        return tokens * products
    if spec.qformer is not None:
        return tokens * products + qformer_operations(spec.qformer, spec.in_size, patches)
    first, square = 2.0 * spec.in_size * spec.out_size, 2.0 * spec.out_size**2
    if spec.kind == "ldpv2":
        return patches * first + tokens * (square + 18.0 * spec.out_size)
    # LDP: an MLP, then two blocks of depthwise and pointwise convolution, the second of stride 2
    return (
        patches * (first + 2 * square) + tokens * square + 18.0 * spec.out_size * (patches + tokens)
    )


def qformer_operations(spec: QFormerSpec, source_size: int, patches: int) -> float:
    """Of the queries, without an instruction: attention to each other and to the picture, MLP."""
    size, queries = spec.hidden_size, spec.num_queries
    own = queries * (4 * size * size + 2 * size * spec.intermediate_size) + 2 * queries**2 * size
    cross = queries * 2 * size * size + patches * 2 * source_size * size
    cross += 2 * queries * patches * size
    layers = range(spec.num_hidden_layers)
    return 2.0 * sum(own + cross * spec.has_cross_attention(index) for index in layers)


def share_of_roof(work: Work, seconds: float, operations_peak: float, read_peak: float) -> float:
    """The least possible time over the time it took."""
    return max(work.operations / operations_peak, work.bytes_read / read_peak) / seconds
