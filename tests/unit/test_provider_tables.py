"""Tables of accelerators: operators, their restrictions, and the lists that onnxruntime ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, save

from mobilevlm.export.targets import find_target, target_names
from mobilevlm.export.targets.coverage import GraphCoverage, cover
from mobilevlm.export.targets.ort_format import _operators
from mobilevlm.export.targets.providers import ONNXRUNTIME, find_provider

Constants = dict[str, NDArray[np.generic]]


def version_of(text: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(part) for part in text.split(".")[:2])


LISTS = {
    "coreml": "coreml_supported_mlprogram_ops.md",
    "coreml-neuralnetwork": "coreml_supported_neuralnetwork_ops.md",
}


def covered(
    folder: Path,
    nodes: list[object],
    provider: str,
    shape: tuple[int | str, ...] = (1, 4, 8),
    kind: int = TensorProto.FLOAT,
    constants: Constants | None = None,
) -> GraphCoverage:
    """Coverage of a graph from ``x`` to ``y``."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / "graph.onnx")
    return cover(folder / "graph.onnx", find_provider(provider))


@pytest.mark.parametrize("provider", ["coreml", "coreml-neuralnetwork"])
def test_a_planted_operator_that_no_accelerator_has_is_named_and_parts_the_graph(
    provider: str, tmp_path: Path
) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Cosh", ["a"], ["b"]),
        helper.make_node("Tanh", ["b"], ["y"]),
    ]
    found = covered(tmp_path, nodes, provider)
    assert (found.nodes, found.taken, found.parts) == (3, 2, 2)
    assert found.left == {"Cosh": 1} and found.checked == 2


def test_xnnpack_takes_products_of_rows_and_softmax_and_all_multiplications(
    tmp_path: Path,
) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["a"]),
        helper.make_node("Tanh", ["a"], ["c"]),
        helper.make_node("Softmax", ["c"], ["y"], axis=-1),
    ]
    ones = np.ones((8, 6), np.float32)
    found = covered(tmp_path, nodes, "xnnpack", (4, 8), constants={"w": ones, "b": ones[0]})
    assert (found.taken, found.left, found.checked) == (2, {"Tanh": 1}, None)
    assert found.multiplications == 1


ONES = np.ones((8, 6), np.float32)


@pytest.mark.parametrize(
    ("provider", "operator", "inputs", "attributes", "constants", "reason"),
    [
        ("xnnpack", "MatMul", "xw", {}, {"w": ONES}, "MatMul: more than two dimensions"),
        ("xnnpack", "LayerNormalization", "xs", {}, {"s": ONES[:, 0]}, "LayerNormalization"),
        ("coreml", "Gather", "xi", {}, {"i": np.zeros(1, np.int32)}, "Gather"),
        ("coreml-neuralnetwork", "MatMul", "xt", {}, {"w": ONES}, "MatMul: input 1 is no constant"),
        ("xnnpack", "Softmax", "x", {"axis": 1}, {}, "Softmax: axis 1"),
    ],
)  # fmt: skip
def test_what_restricts_an_operator_is_named(
    provider: str,
    operator: str,
    inputs: str,
    attributes: dict[str, int],
    constants: Constants,
    reason: str,
    tmp_path: Path,
) -> None:
    turned = helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1])
    node = helper.make_node(operator, list(inputs), ["y"], **attributes)
    nodes = [turned, node] if "t" in inputs else [node]
    found = covered(tmp_path, nodes, provider, constants=constants)
    assert reason in found.left


def test_uneven_pieces_go_to_core_ml(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Split", ["x", "s"], ["a", "b"], axis=2),
        helper.make_node("Relu", ["a"], ["c"]),
        helper.make_node("ReduceMean", ["b", "r"], ["d"]),
        helper.make_node("Add", ["c", "d"], ["y"]),
    ]
    sizes: Constants = {"s": np.array([6, 2]), "r": np.array([2])}
    assert covered(tmp_path, nodes, "coreml", constants=sizes).left == {}


def test_types_sizes_and_shapes_that_are_not_taken_are_named(tmp_path: Path) -> None:
    cast = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)]
    found = covered(tmp_path, cast, "coreml", kind=TensorProto.UINT8)
    assert found.left == {"Cast: input uint8": 1}
    relu = [helper.make_node("Relu", ["x"], ["y"])]
    assert covered(tmp_path, relu, "coreml", (1, 20000)).left == {"Relu: a dimension of 20000": 1}
    assert covered(tmp_path, relu, "coreml", (1, "length")).left == {"Relu: its shape varies": 1}
    assert covered(tmp_path, relu, "coreml", (1, 1, 1, 1, 1, 2)).left == {"Relu: 6 dimensions": 1}


@pytest.mark.skipif(
    version_of(onnxruntime.__version__) < version_of(ONNXRUNTIME),
    reason=f"the tables are those of onnxruntime {ONNXRUNTIME}",
)
@pytest.mark.parametrize("name", LISTS)
def test_tables_have_the_operators_of_onnxruntimes_own_lists(name: str) -> None:
    from onnxruntime.tools import mobile_helpers

    folder = Path(next(iter(mobile_helpers.__path__)))
    lines = (folder / LISTS[name]).read_text(encoding="utf-8").splitlines()
    named = {line.split("|")[1].strip() for line in lines if line.startswith("|")}
    spelled = {"Argmax": "ArgMax"}
    listed = set()
    for operator in named - {"Operator", "--------"}:
        domain, _, kind = operator.replace("ai.onnx.R", "ai.onnx:R").rpartition(":")
        kind = spelled.get(kind, kind)
        listed.add(f"{domain}.{kind}" if domain == "com.microsoft" else kind)
    assert set(find_provider(name).operators) == listed


def test_each_target_with_an_accelerator_names_a_table_and_shares() -> None:
    goals = {name: find_target(name).provider for name in target_names()}
    found = {name: goal.name for name, goal in goals.items() if goal is not None}
    assert found == {
        "android-xnnpack": "xnnpack",
        "ios-coreml": "coreml",
    }
    for goal in goals.values():
        if goal is not None:
            assert find_provider(goal.name).name == goal.name
            assert all(0 < share <= 1 for share in goal.least.values())


def test_operators_of_a_reduced_build_are_counted_past_their_types() -> None:
    line = 'ai.onnx;13;Cast{"inputs": {"0": ["uint8_t", "float"]}},Erf,Slice{"inputs": {}}'
    assert _operators(line) == ["Cast", "Erf", "Slice"]
