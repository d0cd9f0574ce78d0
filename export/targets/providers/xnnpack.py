"""XNNPACK (Android, iOS): kernels of the processor for products, convolutions and pooling in float.
What it leaves is computed beside it by ONNX Runtime's own kernels, without copies."""

from __future__ import annotations

from mobilevlm.export.targets.providers.table import (
    Node,
    Provider,
    Rule,
    constant,
    dimensions,
    first_input,
    last_axis,
    plain_gemm,
)

_FLOAT = first_input("float32")


def _two_dimensions(node: Node) -> str | None:
    for tensor in (node.input(0), node.input(1)):
        if tensor is None or tensor.shape is None or len(tensor.shape) > 2:
            return "more than two dimensions"
    return None


def _known_last(node: Node) -> str | None:
    first = node.input(0)
    known = first is not None and first.shape and first.shape[-1] is not None
    return None if known else "its shape varies"


_IMAGE: tuple[Rule, ...] = (_FLOAT, dimensions(4))

XNNPACK = Provider(
    name="xnnpack",
    title="XNNPACK",
    source=(
        "onnxruntime's docs/execution-providers/Xnnpack-ExecutionProvider.md and "
        "core/providers/xnnpack/{math,nn,tensor}"
    ),
    newest_opset=19,
    operators={
        "AveragePool": _IMAGE,
        "Conv": (*_IMAGE, constant(1, 2)),
        "ConvTranspose": (*_IMAGE, constant(1, 2)),
        "Gemm": (_FLOAT, _two_dimensions, plain_gemm, constant(1, 2)),
        "MatMul": (_FLOAT, _two_dimensions, constant(1)),
        "MaxPool": _IMAGE,
        "Resize": (*_IMAGE, constant(1, 2, 3)),
        "Softmax": (_FLOAT, last_axis, _known_last),
    },
    rules=(),
)
