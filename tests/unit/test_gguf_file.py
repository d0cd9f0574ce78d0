"""The reader of GGUF headers: what it reads, and that no damage gets past it."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from mobilevlm.errors import BundleError
from mobilevlm.gguf.file import TENSOR_TYPES, read_gguf

pytestmark = pytest.mark.pure

MUTATIONS = 2000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of value, and two tensors."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.number", 7)
    writer.add_int64("a.large", -(1 << 40))
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_array("a.texts", ["one", "zwei ▁", ""])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("x.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    quantized = np.zeros((2, 4 * 18), np.uint8)
    writer.add_tensor("y.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors_are_what_was_written(small: Path) -> None:
    header = read_gguf(small)
    assert header.architecture == "llama" and header.version == 3
    assert header.metadata["a.number"] == 7
    assert header.metadata["a.large"] == -(1 << 40)
    assert header.metadata["a.float"] == 0.5
    assert header.metadata["a.bool"] is True
    assert header.metadata["a.texts"] == ["one", "zwei ▁", ""]
    assert header.metadata["a.numbers"] == [1, 2, 3]
    x, y = header.tensors["x.weight"], header.tensors["y.weight"]
    assert (x.type, x.shape, x.size, x.row_size) == ("F32", (2, 3), 24, 12)
    assert (y.type, y.shape, y.size, y.row_size) == ("Q4_0", (2, 128), 144, 72)
    values = np.memmap(small, np.float32, "r", x.offset, x.shape)
    assert values.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_sizes_of_types_are_those_of_the_gguf_library() -> None:
    for number, (name, per_block, size) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (per_block, size))


def test_every_cut_of_the_file_is_refused(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    header = read_gguf(small)
    end = max(tensor.offset + tensor.size for tensor in header.tensors.values())
    path = tmp_path / "cut.gguf"
    for length in range(end):
        path.write_bytes(whole[:length])
        with pytest.raises(BundleError):
            read_gguf(path)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"GGML", "does not begin with 'GGUF'"),
        (4, struct.pack("<I", 9), "GGUF version 9, newer than 2 and 3"),
        (4, struct.pack(">I", 3), "a big-endian GGUF file"),
        (8, struct.pack("<Q", 1 << 60), "it claims 1152921504606846976 tensors"),
        (16, struct.pack("<Q", 1 << 60), "and 1152921504606846976 keys"),
        (24, struct.pack("<Q", 1 << 62), "ends inside its header"),
    ],
)
def test_absurd_headers_are_refused_with_the_reason(
    offset: int, value: bytes, message: str, small: Path, tmp_path: Path
) -> None:
    content = bytearray(small.read_bytes())
    content[offset : offset + len(value)] = value
    path = tmp_path / "absurd.gguf"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=message) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)


def test_mutated_headers_are_read_or_refused_in_little_memory(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    length = min(tensor.offset for tensor in read_gguf(small).tensors.values())
    random = np.random.default_rng(0)
    path = tmp_path / "mutated.gguf"
    refused = 0
    tracemalloc.start()
    for _ in range(MUTATIONS):
        content = bytearray(whole)
        for _ in range(int(random.integers(1, 4))):
            place = int(random.integers(0, length))
            content[place] = int(random.choice([0, 1, 127, 128, 255, int(random.integers(256))]))
        path.write_bytes(content)
        try:
            read_gguf(path)
        except BundleError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 500
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert MUTATIONS / 10 < refused < MUTATIONS
    assert peak < 5e6


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    for name in ("missing.gguf", "empty.gguf", "."):
        with pytest.raises(BundleError):
            read_gguf(tmp_path / name)
