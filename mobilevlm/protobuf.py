"""Fields of protobuf messages, and what ONNX files say about other files, read without the onnx
package. Field numbers are those of onnx.proto."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_TENSOR, _GRAPH, _NODE, _ATTRIBUTE, _SPARSE, _FUNCTION, _TRAINING = (
    "TensorProto", "GraphProto", "NodeProto", "AttributeProto", "SparseTensorProto",
    "FunctionProto", "TrainingInfoProto",
)  # fmt: skip
_PARTS = {
    "ModelProto": {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
}
"""For each message the fields that a tensor can be in"""
_MODEL_GRAPH = 7
"""Field of a ModelProto"""
_EXTERNAL_DATA = 13
"""Field of a TensorProto: an entry about the location of its data"""
_DEPTH = 64
"""Graphs within graphs"""


def external_files(path: Path) -> set[str]:
    """Return the files that the tensors of an ONNX file lie in, as it names them.

    Raises:
        ValueError: it is no ONNX file.
        OSError: it cannot be read.
    """
    found: set[str] = set()
    encoded = memoryview(path.read_bytes())
    try:
        if all(field != _MODEL_GRAPH for field, _ in fields(encoded)):
            raise ValueError("no graph")
        _collect(encoded, "ModelProto", found, _DEPTH)
    except IndexError:
        raise ValueError("truncated") from None
    return found


def _collect(encoded: memoryview, message: str, found: set[str], depth: int) -> None:
    if depth == 0:
        raise ValueError(f"graphs within graphs, more than {_DEPTH} deep")
    parts = _PARTS.get(message, {})
    for field, value in fields(encoded):
        if isinstance(value, int):
            continue
        if message == _TENSOR and field == _EXTERNAL_DATA:
            pairs = list(fields(value))
            if any(key == 1 and text(part) == "location" for key, part in pairs):
                found.update(text(part) for key, part in pairs if key == 2)
        elif field in parts:
            _collect(value, parts[field], found, depth - 1)


def text(value: int | memoryview) -> str:
    """Return a field of text; empty where it is a number."""
    return "" if isinstance(value, int) else str(value, "utf-8")


def fields(encoded: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field of a message: a number, or bytes.

    Raises:
        ValueError, IndexError: it is none.
    """
    at = 0
    while at < len(encoded):
        key, at = _varint(encoded, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(encoded, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(encoded, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(encoded):
            raise ValueError("truncated")
        yield key >> 3, encoded[at : at + size]
        at += size


def varints(encoded: memoryview) -> Iterator[int]:
    """Yield the numbers of a packed field."""
    at = 0
    while at < len(encoded):
        value, at = _varint(encoded, at)
        yield value


def _varint(encoded: memoryview, at: int) -> tuple[int, int]:
    """Return a number of at most 64 bits in pieces of seven, and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        byte = encoded[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number without an end")
