"""Core ML (iOS, macOS) in both of its formats: ML Program (``ModelFormat=MLProgram``, Core ML 5 and
later), and the older Neural Network. Neither has QuantizeLinear: a graph for it is in float."""

from __future__ import annotations

from mobilevlm.export.targets.providers.table import (
    Node,
    Provider,
    Rule,
    constant,
    dimensions,
    first_input,
    output_type,
    plain_gemm,
    rank_up_to,
    static_shapes,
)

_LONGEST = 16384
"""Core ML does not load a model with an input that is longer in one dimension."""
_FLOATS = first_input("float32", "float16")
_NUMBERS = first_input("float32", "float16", "int32", "int64")


def _short(node: Node) -> str | None:
    sizes = [size for tensor in node.inputs if tensor for size in tensor.shape or () if size]
    longest = max(sizes, default=0)
    return f"a dimension of {longest}" if longest > _LONGEST else None


def _single_indices(node: Node) -> str | None:
    second = node.input(1)
    return "a scalar index" if second is None or second.shape == () else None


_SHARED: dict[str, tuple[Rule, ...]] = {
    "AveragePool": (_FLOATS, dimensions(4)),
    "Conv": (_FLOATS, dimensions(3, 4), constant(2)),
    "Gemm": (_FLOATS, plain_gemm, constant(1)),
    "GlobalAveragePool": (_FLOATS, dimensions(4)),
    "GlobalMaxPool": (_FLOATS, dimensions(4)),
    "MaxPool": (_FLOATS, dimensions(4)),
    "ReduceSum": (_FLOATS, constant(1)),
    "Reshape": (_FLOATS, constant(1)),
    "Shape": (_NUMBERS,),
    "Slice": (_NUMBERS, constant(1, 2, 3, 4)),
    "Split": (_FLOATS, constant(1)),
    "Squeeze": (_NUMBERS, constant(1)),
    "Clip": (_FLOATS, constant(1, 2)),
    **dict.fromkeys(
        (
            "Add",
            "Concat",
            "DepthToSpace",
            "Div",
            "LeakyRelu",
            "Mul",
            "Pow",
            "PRelu",
            "Reciprocal",
            "Relu",
            "Resize",
            "Sigmoid",
            "Softmax",
            "Sqrt",
            "Sub",
            "Tanh",
            "Transpose",
        ),
        (_FLOATS,),
    ),
}
_RULES: tuple[Rule, ...] = (static_shapes, rank_up_to(5), _short)
_SOURCE = (
    "onnxruntime's docs/execution-providers/CoreML-ExecutionProvider.md (its 1.32 ships the lists "
    "as tools/mobile_helpers/coreml_supported_*_ops.md) and core/providers/coreml/builders"
)

ML_PROGRAM = Provider(
    name="coreml",
    title="Core ML, ML Program",
    source=_SOURCE,
    newest_opset=20,
    operators={
        **_SHARED,
        "And": (first_input("bool"),),
        "Cast": (
            first_input("float32", "float16", "int32", "int64", "bool"),
            output_type("float32", "float16", "int32"),
        ),
        "ConvTranspose": (_FLOATS, constant(1, 2)),
        "GatherND": (_FLOATS,),
        "MatMul": (_FLOATS,),
        "ReduceMax": (_FLOATS, constant(1)),
        "ReduceMean": (_FLOATS, constant(1)),
        "Tile": (_FLOATS,),
        "Unsqueeze": (_NUMBERS, constant(1)),
        "Where": (first_input("bool"), output_type("float32", "float16")),
        "com.microsoft.QuickGelu": (_FLOATS,),
        "com.microsoft.FusedConv": (_FLOATS, dimensions(3, 4), constant(1, 2)),
        **dict.fromkeys(
            (
                "ArgMax",
                "Ceil",
                "Cos",
                "Elu",
                "Erf",
                "Exp",
                "Gelu",
                "GridSample",
                "GroupNormalization",
                "HardSigmoid",
                "Identity",
                "InstanceNormalization",
                "LayerNormalization",
                "Max",
                "Round",
                "Sin",
                "Softplus",
            ),
            (_FLOATS,),
        ),
    },
    rules=_RULES,
    checker="coreml_supported_mlprogram_ops.md",
)

NEURAL_NETWORK = Provider(
    name="coreml-neuralnetwork",
    title="Core ML, Neural Network",
    source=_SOURCE,
    newest_opset=20,
    operators={
        **_SHARED,
        "ArgMax": (_FLOATS,),
        "BatchNormalization": (_FLOATS,),
        "Cast": (first_input("int64"), output_type("int32")),
        "Conv": (_FLOATS, dimensions(3, 4), constant(1, 2)),
        "Flatten": (_FLOATS,),
        "Gather": (first_input("float32", "int64"), _single_indices),
        "LRN": (_FLOATS,),
        "MatMul": (_FLOATS, constant(1)),
        "Pad": (_FLOATS, constant(1, 2)),
    },
    rules=_RULES,
    checker="coreml_supported_neuralnetwork_ops.md",
)
