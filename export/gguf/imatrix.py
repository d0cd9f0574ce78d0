"""Importance matrices in llama.cpp's GGUF files: how strong each input of a decoder matrix is.

For a matrix NAME the file holds ``NAME.in_sum2``, the sum over tokens of the squared inputs, and
``NAME.counts``, the number of tokens (ggml-org/llama.cpp, tools/imatrix and tools/quantize). The
squared error that rounding makes in a matrix's products is, over the calibration data, that of the
weights with each column counted as often as its mean square says; quantizers that know these
numbers round the columns that matter better.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError
from mobilevlm.export.gguf.tensors import Tensor, write_file
from mobilevlm.gguf.file import GgufFile, GgufTensor, read_gguf
from mobilevlm.gguf.names import decoder_entries
from mobilevlm.whole_file import written_whole

Float32 = NDArray[np.float32]

SQUARES, COUNTS = ".in_sum2", ".counts"

OPTIONAL = ("token_embd.weight", "output.weight")
"""llama.cpp's own tool leaves the head out; the embeddings are multiplied only as a tied head."""

LEAST = 1e-4
"""See :attr:`InputStatistics.importance`."""


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the inputs that one matrix ``(out_size, in_size)`` was multiplied with."""

    squares: Float32
    """``(in_size,)``: sum over tokens of the squared inputs."""
    count: int
    """Tokens."""

    @property
    def importance(self) -> Float32:
        """``(in_size,)``: mean square of each input. None is less than LEAST of their average: a
        column that the calibration data never used must not be rounded to nothing."""
        mean = self.squares / np.float32(self.count)
        average = np.float32(mean.mean(dtype=np.float64))
        if not average:
            return np.ones_like(mean)
        raised: Float32 = np.maximum(mean, np.float32(LEAST) * average)
        return raised


@dataclass(frozen=True)
class ImportanceMatrix:
    """The statistics of a decoder's matrices by llama.cpp's names of them."""

    entries: dict[str, InputStatistics]
    datasets: tuple[str, ...]
    """Names of the calibration data."""
    chunk_count: int
    """Samples that they hold."""
    chunk_size: int
    """Tokens of a sample (their mean)."""


def matrix_columns(spec: DecoderSpec) -> dict[str, int]:
    """Every matrix of a decoder with its ``in_size``."""
    entries = decoder_entries(spec)
    return {entry.theirs: entry.shape[1] for entry in entries if entry.store == "matrix"}


def write_imatrix(matrix: ImportanceMatrix, path: Path) -> None:
    """Writes a file that llama.cpp's tools read, in one step at the end."""

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type("imatrix")
        writer.add_array(gguf.Keys.IMatrix.DATASETS, list(matrix.datasets))
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, matrix.chunk_count)
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, matrix.chunk_size)

    def tensor(name: str, values: Float32) -> Tensor:
        return Tensor(name, values.shape, "f32", [lambda: values])

    tensors = []
    for name, entry in matrix.entries.items():
        tensors.append(tensor(f"{name}{SQUARES}", entry.squares))
        tensors.append(tensor(f"{name}{COUNTS}", np.array([entry.count], np.float32)))
    with written_whole(path) as draft:
        write_file(draft, "imatrix", describe, tensors)


def check_imatrix_target(path: Path) -> None:
    """Refuses to write over anything but an importance matrix.

    Raises:
        BundleError: something else is in the way, or there is no such folder.
    """
    if not path.parent.is_dir():
        raise BundleError(f"{path.parent}: no such folder: make it first")
    try:
        replaceable = not path.exists() or _is_imatrix(read_gguf(path))
    except BundleError:
        replaceable = False
    if not replaceable:
        raise BundleError(f"{path}: not an importance matrix, and in the way: choose another name")


def read_imatrix(path: Path, spec: DecoderSpec) -> ImportanceMatrix:
    """Reads the file of a decoder, ours or llama.cpp's.

    Raises:
        BundleError: damaged, of another kind or for another model, or with numbers that no
            importance can have.
    """
    file = read_gguf(path)
    if not _is_imatrix(file):
        kind = file.metadata.get("general.type", "unknown")
        raise BundleError(
            f"{path}: not an importance matrix: its general.type is {kind!r:.60}, expected "
            f"'imatrix'"
        )
    columns = matrix_columns(spec)
    for name in file.tensors:
        owner = name.removesuffix(SQUARES)
        if owner != name and owner.startswith("blk.") and owner not in columns:
            raise BundleError(f"{path}: made for another model: this one has no {owner[:60]!r}")
    entries = {
        name: _read_entry(file, name, size)
        for name, size in columns.items()
        if name not in OPTIONAL or f"{name}{SQUARES}" in file.tensors
    }
    metadata = file.metadata
    return ImportanceMatrix(
        entries,
        tuple(map(str, _typed(metadata.get(gguf.Keys.IMatrix.DATASETS), list, []))),
        _typed(metadata.get(gguf.Keys.IMatrix.CHUNK_COUNT), int, 0),
        _typed(metadata.get(gguf.Keys.IMatrix.CHUNK_SIZE), int, 0),
    )


def _is_imatrix(file: GgufFile) -> bool:
    return file.metadata.get("general.type") == "imatrix"


def _read_entry(file: GgufFile, name: str, size: int) -> InputStatistics:
    squares = _read_floats(file, f"{name}{SQUARES}", size)
    count = float(_read_floats(file, f"{name}{COUNTS}", 1)[0])
    # A NaN fails each comparison.
    if not (squares >= 0).all() or not np.isfinite(squares).all() or not 1 <= count < 2**53:
        raise BundleError(
            f"{file.path}: tensor {name!r} has sums or a count that are negative, infinite or no "
            f"numbers: make the file again"
        )
    return InputStatistics(squares, round(count))


def _read_floats(file: GgufFile, name: str, size: int) -> Float32:
    tensor: GgufTensor | None = file.tensors.get(name)
    if tensor is None:
        raise BundleError(f"{file.path}: tensor {name!r} is missing: made for another model?")
    if tensor.type != "F32" or tensor.size != 4 * size:
        raise BundleError(
            f"{file.path}: tensor {name!r}: type {tensor.type}, shape {tensor.shape}, expected "
            f"{size} of F32: made for another model?"
        )
    return np.fromfile(tensor.path, "<f4", size, offset=tensor.offset).astype(np.float32)


def _typed(value: Any, kind: type, default: Any) -> Any:
    return value if type(value) is kind else default
