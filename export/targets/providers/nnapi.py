"""NNAPI (Android 8.1 and later; what is here takes Android 10, its feature level 3).

NNAPI has no fixed point of 16 bits and, in onnxruntime, none for the products of attention: a
graph for it is in float, which ``NNAPI_FLAG_USE_FP16`` lets it compute in 16 bits.
"""

from __future__ import annotations

from mobilevlm.export.targets.providers import (
    Node,
    Provider,
    Rule,
    clips_to,
    constant,
    dimensions,
    first_input,
    output_type,
    plain_gemm,
    rank_up_to,
    static_shapes,
)

_FLOAT = first_input("float32")
_BYTES = ("uint8", "int8")


def _product(node: Node) -> str | None:
    """Two matrices of which the second is a constant, or as many matrices as many others."""
    first, second = node.input(0), node.input(1)
    if first is None or second is None or first.shape is None or second.shape is None:
        return "its shape varies"
    a, b = first.shape, second.shape
    if len(a) >= 3 and len(a) == len(b):
        return None if a[:-2] == b[:-2] else "its batches differ"
    if len(a) != 2 or len(b) != 2:
        return f"{len(a)} and {len(b)} dimensions"
    return None if second.constant else "input 1 is no constant"


def _gemm(node: Node) -> str | None:
    second, bias = node.input(1), node.input(2)
    turned = node.attributes.get("transB", 0)
    if second is None or second.shape is None or (not turned and not second.constant):
        return "input 1 is no constant"
    columns = second.shape[0 if turned else 1]
    if bias is not None and (bias.shape is None or bias.shape[-1:] != (columns,)):
        return "its bias is no row"
    return None


def _even_split(node: Node) -> str | None:
    sizes = {tensor.shape for tensor in node.outputs if tensor is not None}
    return None if len(sizes) == 1 else "uneven pieces"


def _indices(node: Node) -> str | None:
    second = node.input(1)
    fits = second is not None and (second.constant or second.dtype == "int32")
    return None if fits else "indices are no constant"


_PLAIN: dict[str, tuple[Rule, ...]] = dict.fromkeys(
    ("Abs", "Add", "BatchNormalization", "Concat", "Div", "Elu", "Exp", "Flatten", "Floor",
     "Identity", "LeakyRelu", "Log", "LRN", "Max", "Min", "Mul", "Neg", "Pow", "PRelu", "Relu",
     "Sigmoid", "Sin", "Softmax", "Sqrt", "Sub", "Tanh", "Transpose"),
    (_FLOAT,),
)  # fmt: skip
_POOLS: dict[str, tuple[Rule, ...]] = dict.fromkeys(
    ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "Resize"),
    (_FLOAT, dimensions(4)),
)

NNAPI = Provider(
    name="nnapi",
    title="NNAPI",
    source=(
        "onnxruntime's docs/execution-providers/NNAPI-ExecutionProvider.md (its 1.32 ships the "
        "list as tools/mobile_helpers/nnapi_supported_ops.md) and "
        "core/providers/nnapi/nnapi_builtin/builders/impl"
    ),
    newest_opset=21,
    operators={
        **_PLAIN,
        **_POOLS,
        "Cast": (_FLOAT, output_type("float32", "int32")),
        "Clip": (_FLOAT, clips_to((0, 6), (-1, 1))),
        "Conv": (_FLOAT, dimensions(4), constant(1, 2)),
        "DepthToSpace": (_FLOAT, dimensions(4)),
        "DequantizeLinear": (first_input(*_BYTES), constant(1, 2)),
        "Gather": (_FLOAT, _indices),
        "Gemm": (_FLOAT, dimensions(2), plain_gemm, _gemm),
        "MatMul": (_FLOAT, _product),
        "Pad": (_FLOAT, constant(1, 2)),
        "QuantizeLinear": (_FLOAT, output_type(*_BYTES), constant(1, 2)),
        "ReduceMean": (_FLOAT, constant(1)),
        "Reshape": (_FLOAT, constant(1)),
        "Slice": (_FLOAT, constant(1, 2, 3, 4)),
        "Split": (_FLOAT, constant(1), _even_split),
        "Squeeze": (_FLOAT, constant(1)),
        "Unsqueeze": (_FLOAT, constant(1)),
    },
    rules=(static_shapes, rank_up_to(4)),
    checker="nnapi",
)
