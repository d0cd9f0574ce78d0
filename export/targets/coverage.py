"""How much of a graph an accelerator takes: by our tables (export/targets/providers), and by the
usability checker that comes with onnxruntime, which knows the operators' names only."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm.export.targets.providers.table import Node, Provider, Tensor, obstacle


@dataclass(frozen=True)
class GraphCoverage:
    """Share of a graph that a provider runs."""

    nodes: int
    """Operators, after what onnxruntime simplifies before it asks providers"""
    taken: int
    parts: int
    """Pieces of the graph that go to it; between them tensors change hands"""
    left: dict[str, int]
    """Operators that it leaves to the processor, with the reason, and how many"""
    multiplications: float
    """Share of those of all products (MatMul, Gemm, Conv) that are in the nodes taken"""
    checked: int | None
    """Operators that onnxruntime's checker would give to it; None where it knows no such
    provider"""


def cover(path: Path, provider: Provider) -> GraphCoverage:
    """Goes through the graph of an ONNX file."""
    from onnxruntime.tools.mobile_helpers.usability_checker import check_partitioning

    model = _as_providers_see_it(path)
    nodes = _nodes(model)
    reasons = {name: obstacle(provider, node) for name, node in nodes}
    work = {name: multiplications(node) for name, node in nodes}
    done = sum(count for name, count in work.items() if reasons[name] is None)
    found = check_partitioning(model.graph, _Table(reasons), False)
    left = Counter(reason for reason in reasons.values() if reason is not None)
    return GraphCoverage(
        nodes=len(reasons),
        taken=found.num_supported_nodes,
        parts=found.num_partitions,
        left=dict(sorted(left.items())),
        multiplications=round(done / max(sum(work.values()), 1), 4),
        checked=_checked(model, provider),
    )


def multiplications(node: Node) -> int:
    """Return the multiplications of a product whose shapes are known; 0 for everything else."""
    weight, made = node.input(1), node.outputs[0]
    if node.operator not in ("MatMul", "Gemm", "Conv") or weight is None or made is None:
        return 0
    if weight.shape is None or made.shape is None or None in (*weight.shape, *made.shape):
        return 0
    if node.operator == "Conv":
        inner = weight.shape[1:]
    else:
        inner = weight.shape[-1 if node.attributes.get("transB") else -2 :][:1]
    return math.prod(size or 0 for size in (*made.shape, *inner))


class _Table:
    """Our answers in the place of the checker's list."""

    def __init__(self, reasons: dict[str, str | None]) -> None:
        self._reasons = reasons

    def is_op_supported(self, node: Any) -> bool:
        return self._reasons[_key(node)] is None


def _checked(model: Any, provider: Provider) -> int | None:
    from onnxruntime.tools.mobile_helpers import usability_checker

    if not provider.checker:
        return None
    found = usability_checker.check_coreml_partitions(model, True, provider.checker)
    return int(found.num_supported_nodes)


def _as_providers_see_it(path: Path) -> Any:
    """The graph with the shapes of all tensors, simplified as onnxruntime does it first."""
    import onnx
    import onnxruntime as ort
    from onnxruntime.tools.onnx_model_utils import optimize_model

    basic = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        simple = Path(folder) / "simple.onnx"
        optimize_model(path, simple, basic, use_external_initializers=True)
        return onnx.shape_inference.infer_shapes(onnx.load(simple, load_external_data=False))


def _key(node: Any) -> str:
    """Return the name that tells a node from all others: its first output."""
    name: str = next(name for name in node.output if name)
    return name


def _nodes(model: Any) -> list[tuple[str, Node]]:
    """Every node of the graph with what is known of it."""
    import onnx

    opsets = {item.domain: item.version for item in model.opset_import}
    tensors = _tensors(model.graph)
    found = []
    for node in model.graph.node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        try:
            schema = onnx.defs.get_schema(node.op_type, opsets[domain], domain)
            version = schema.since_version
        except onnx.defs.SchemaError:  # one of onnxruntime's own
            version = opsets.get(domain, 1)
        known = Node(
            operator=f"{domain}.{node.op_type}" if domain else node.op_type,
            version=version,
            inputs=tuple(tensors.get(name) for name in node.input),
            outputs=tuple(tensors.get(name) for name in node.output),
            attributes={
                item.name: onnx.helper.get_attribute_value(item) for item in node.attribute
            },
        )
        found.append((_key(node), known))
    return found


def _tensors(graph: Any) -> dict[str, Tensor]:
    found = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        shape = None
        if kind.HasField("shape"):
            sizes = kind.shape.dim
            shape = tuple(size.dim_value if size.HasField("dim_value") else None for size in sizes)
        found[value.name] = Tensor(_name(kind.elem_type), shape)
    for tensor in graph.initializer:
        found[tensor.name] = Tensor(_name(tensor.data_type), tuple(tensor.dims), True)
    return found


def _name(elem_type: int) -> str:
    """numpy's name of a type."""
    import onnx

    return str(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
