"""GGUF files made elsewhere as a model to export: what :func:`open_checkpoint` is for folders."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from mobilevlm.checkpoint import Rescaling, TensorRef, Weights
from mobilevlm.errors import CheckpointError
from mobilevlm.export.gguf.decoder import half_split
from mobilevlm.export.gguf.mmproj import LINEAR_SCALE, signed_difference
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.gguf.encoder import Encoder, read_encoder
from mobilevlm.gguf.file import TENSOR_TYPES, GgufFile, read_gguf
from mobilevlm.gguf.model import model_spec
from mobilevlm.gguf.names import (
    Entry,
    decoder_entries,
    projector_entries,
    projector_name,
    scale_entries,
    tower_entries,
)
from mobilevlm.gguf.tokenizer import gguf_tokenizer
from mobilevlm.input_spec import ConnectorSpec
from mobilevlm.model import Model
from mobilevlm.spec import ModelSpec, with_image
from mobilevlm.whole_file import file_sha256

_READABLE = {label for label, *_ in TENSOR_TYPES.values()} - {"I8", "I16", "I32", "I64", "F64"}
"""Types that become float32; to a Weights they are as good as floats."""


class GgufTensors:
    """The tensors of one file under canonical names, dequantized one at a time. See
    :class:`mobilevlm.checkpoint.TensorSource`."""

    def __init__(self, file: GgufFile, entries: list[Entry]) -> None:
        self.folder = file.path
        self.files = list(file.parts)
        self._file = file
        self._entries = {
            name: (entry, index) for entry in entries for index, name in enumerate(entry.parts)
        }
        for entry in entries:
            if entry.theirs not in file.tensors:
                raise CheckpointError(f"{file.path}: tensor {entry.theirs!r} is missing")

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Ours where the file's is what it must be, else the file's."""
        entry, _ = self._entries[name]
        found = self._file.tensors[entry.theirs].shape
        return entry.shape if entry.fits(found) else found

    def dtype(self, name: str) -> str:
        kind = self._file.tensors[self._entries[name][0].theirs].type
        return "f32" if kind in _READABLE else kind

    def read(self, name: str) -> Float32:
        entry, index = self._entries[name]
        kind = gguf.GGMLQuantizationType[self._file.tensors[entry.theirs].type]
        values: Float32 = gguf.quants.dequantize(self._rows(entry, index), kind).astype(np.float32)
        if entry.stored[0] == 2 * entry.shape[0]:  # see _projector_entries
            values = values.reshape(2, -1)[0] / np.float32(LINEAR_SCALE)
        values = values.reshape(entry.shape)
        return np.roll(values, 1, axis=0) if entry.first_last else values

    def q4_0(self, name: str) -> NDArray[np.uint8] | None:
        entry, index = self._entries[name]
        whole = entry.stored == entry.shape or entry.stack > 0
        plain = whole and self._file.tensors[entry.theirs].type == "Q4_0"
        return self._rows(entry, index) if plain else None

    def _rows(self, entry: Entry, index: int) -> NDArray[np.uint8]:
        """The stored bytes ``(rows, bytes of a row)`` of the entry's part with this number, rows in
        our order."""
        tensor = self._file.tensors[entry.theirs]
        rows = tensor.size // tensor.row_size // len(entry.parts)
        start = tensor.offset + index * rows * tensor.row_size
        data = np.memmap(tensor.path, np.uint8, "r", start, (rows, tensor.row_size))
        return half_split(np.array(data), entry.heads) if entry.heads else np.array(data)

    @property
    def sha256(self) -> str:
        digests = [file_sha256(path) for path in self.files]
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def open_gguf(path: Path, mmproj: Path) -> Model:
    """Read a language model and its ``clip`` image encoder, of families whose tensors are all known
    here (mobilevlm/gguf/architectures.py, encoder.py).

    Raises:
        BundleError: a file is damaged, or of a kind that the spec cannot say.
        CheckpointError: a tensor is missing.
    """
    decoder, vision = read_gguf(path), read_gguf(mmproj)
    spec = model_spec(decoder, vision)
    if _is_one_linear(vision, spec.image.connector):
        spec = with_image(spec, connector=dataclasses.replace(spec.image.connector, depth=1))
    language = list(decoder_entries(spec.decoder))
    encoder = read_encoder(vision, spec.image.connector.out_size)
    picture = vision_entries(spec, encoder.swapped, encoder.class_last)
    refs = {
        name: TensorRef(source, name)
        for source, entries in (
            (GgufTensors(decoder, language), language),
            (GgufTensors(vision, picture), picture),
        )
        for entry in entries
        for name in entry.parts
    }
    if spec.decoder.tie_word_embeddings:
        refs["decoder.lm_head.weight"] = refs["decoder.embed_tokens.weight"]
    weights = Weights(refs, _layer_scale(vision, encoder))
    return Model(path.parent, spec, weights, gguf_tokenizer(decoder))


def _layer_scale(file: GgufFile, encoder: Encoder) -> dict[str, tuple[Rescaling, ...]]:
    """Return the factors of the linear layers whose outputs layer scale multiplies."""
    if not encoder.layer_scale:
        return {}
    entries = list(scale_entries(encoder.vision))
    scales = GgufTensors(file, entries)
    return {
        f"{entry.ours.removesuffix('.scale')}.{part}": (Rescaling(rows=scales.read(entry.ours)),)
        for entry in entries
        for part in ("weight", "bias")
    }


def _is_one_linear(file: GgufFile, spec: ConnectorSpec) -> bool:
    """Whether the MLP is the one that our export writes for a single Linear."""
    size, name = spec.out_size, "mm.2.weight"
    if spec.kind != "mlp" or name not in file.tensors:
        return False
    shape = (size, 2 * size)
    second = GgufTensors(file, [Entry(name, name, shape, shape, "matrix")])
    return second.shape(name) == shape == file.tensors[name].shape and np.allclose(
        second.read(name), signed_difference(size), rtol=1e-2, atol=1e-4 / LINEAR_SCALE
    )


def vision_entries(
    spec: ModelSpec, swapped: bool = False, class_last: bool | None = None
) -> list[Entry]:
    """All tensors of an mmproj file that a canonical tensor can be read from. ``swapped`` and
    ``class_last``: see :class:`mobilevlm.gguf.encoder.Encoder`; as our own files have them without.
    """
    if class_last is None:
        class_last = projector_name(spec.image.connector) == "internvl"
    return [
        *tower_entries(spec.image.transformer, swapped, class_last),
        *_projector_entries(spec.image.connector),
    ]


def _projector_entries(spec: ConnectorSpec) -> list[Entry]:
    """Of a single Linear: the first half of the first layer, scaled down."""
    if spec.kind != "mlp" or spec.depth > 1:
        return list(projector_entries(spec))
    size, ours = spec.out_size, "projector.mlp.0"
    shape, stored = (size, spec.in_size), (2 * size, spec.in_size)
    return [
        Entry("mm.0.weight", f"{ours}.weight", shape, stored, "matrix"),
        Entry("mm.0.bias", f"{ours}.bias", shape[:1], stored[:1], "float"),
    ]
