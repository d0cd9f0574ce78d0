"""Weights that a session is lent: tensors as onnx reads them, pages that go and come again."""

from __future__ import annotations

import mmap
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data

from mobilevlm.bundle import data_path
from mobilevlm.errors import BundleError
from mobilevlm.runtime.engines.onnx.engine import LONGEST_REASON, load_reason, open_session
from mobilevlm.runtime.engines.onnx.mapped_pages import keep_apart
from mobilevlm.runtime.engines.onnx.mapped_weights import MappedWeights, external_tensors

SIZE = 512


def resident(name: str) -> int:
    """Bytes of a file's mappings that this process holds."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(name)
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two products and a sum, of which the sum's number lies in the graph."""
    random = np.random.default_rng(0)
    weights = {
        "first": random.standard_normal((SIZE, SIZE)).astype(np.float32),
        "second": random.standard_normal((SIZE, SIZE)).astype(np.float16),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"]),
        helper.make_node("Cast", ["second"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["a", "wide"], ["b"]),
        helper.make_node("Add", ["b", "small"], ["y"]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, SIZE]) for name in ("x", "y")
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    tensors.append(numpy_helper.from_array(np.float32(3), "small"))
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    found = tmp_path / "model.onnx"
    convert_model_to_external_data(model, location=data_path(found).name, size_threshold=1024)
    onnx.save(model, found)
    return found


def output(session: ort.InferenceSession) -> Any:
    return session.run(["y"], {"x": np.ones((1, SIZE), np.float32)})[0]


def test_tensors_are_those_that_onnx_reads(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    expected = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            place = entries["location"], int(entries["offset"]), int(entries["length"])
            expected[tensor.name] = (tensor.data_type, tuple(tensor.dims), *place)
    found = {
        tensor.name: (tensor.type, tensor.shape, tensor.location, tensor.offset, tensor.length)
        for tensor in external_tensors(path)
    }
    assert found == expected and set(found) == {"first", "second"}


@pytest.mark.parametrize("packed", [True, False])
def test_a_session_computes_what_it_does_with_weights_that_it_maps(
    path: Path, packed: bool
) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", str(int(not packed)))
    own = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(output(open_session(path, 1, packed=packed)), output(own))


@pytest.mark.skipif(platform.system() != "Linux", reason="/proc")
def test_pages_are_given_back_and_come_again(path: Path) -> None:
    session = open_session(path, 1, packed=False)
    before = output(session)
    assert resident(data_path(path).name) >= SIZE * SIZE * 4
    session.weights.give_back()
    assert resident(data_path(path).name) == 0
    np.testing.assert_array_equal(output(session), before)


@pytest.mark.skipif(platform.system() != "Linux", reason="/proc")
def test_nothing_of_the_file_stays_where_weights_are_copied(path: Path) -> None:
    session = open_session(path, 1)
    assert resident(data_path(path).name) < SIZE * SIZE * 4
    output(session)


@pytest.mark.skipif(platform.system() != "Linux", reason="/proc")
def test_a_mapping_is_divided_where_tensors_end(tmp_path: Path) -> None:
    """And nowhere else: pages of one kind of advice are one mapping of the system."""
    path, page = tmp_path / "weights.onnx_data", mmap.PAGESIZE
    path.write_bytes(bytes(16 * page))
    mapped = np.memmap(path, np.uint8, "r")
    keep_apart(mapped, [0, 4 * page, 4 * page, 9 * page + 5])
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(path.name)]
    sizes = [(int(end, 16) - int(start, 16)) // page for start, end in spans]
    assert sizes == [4, 5, 7]


def test_weights_that_are_cut_off_are_left_to_onnxruntime_which_says_so(path: Path) -> None:
    with data_path(path).open("r+b") as file:
        file.truncate(SIZE * SIZE * 4 + 10)
    with pytest.raises(BundleError, match=r"model\.onnx: onnxruntime cannot load it: "):
        open_session(path, 1)


@pytest.mark.parametrize(
    "content", [b"", b"\x3a\xff\xff", b"\xff" * 40, b"GGUF" * 9, b"\x3a\x05ab"]
)
def test_what_is_no_onnx_file_has_no_tensors(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    data_path(path).write_bytes(b"1234")
    assert external_tensors(path) == []
    options = ort.SessionOptions()
    MappedWeights(path).lend(options)
    with pytest.raises(BundleError):
        open_session(path, 1)


def test_the_end_of_a_long_reason_is_shown_since_it_says_what_to_do() -> None:
    remedy = "Ensure /proc is mounted in the sandbox or chroot. Error: No such file or directory"
    reason = f"FAIL : Exception during initialization: {'initializer.cc ' * 30} {remedy}"
    assert load_reason(RuntimeError(reason)).endswith(remedy)
    assert len(load_reason(RuntimeError(reason))) < LONGEST_REASON + 5
    assert load_reason(RuntimeError("first line\nshort")) == "short"
