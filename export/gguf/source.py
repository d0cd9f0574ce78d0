"""GGUF files made elsewhere as a model to export: what :func:`open_checkpoint` is for folders."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from mobilevlm.checkpoint import Rescaling, TensorRef, Weights
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.export.gguf.decoder import by_member, half_split
from mobilevlm.export.gguf.mmproj import LINEAR_SCALE, signed_difference
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.gguf.encoder import Encoder, read_encoder
from mobilevlm.gguf.file import TENSOR_TYPES, GgufFile, read_gguf
from mobilevlm.gguf.mmproj import EXACT, mmproj_entries, projector_name
from mobilevlm.gguf.model import model_spec
from mobilevlm.gguf.names import (
    Entry,
    decoder_entries,
    projector_entries,
    scale_entries,
    tower_entries,
)
from mobilevlm.gguf.tokenizer import gguf_tokenizer
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
        frames = [entry for entry in entries if entry.frame is not None]
        self._frames = {entry.ours: [one for one in frames if one.ours == entry.ours]
                        for entry in frames}  # fmt: skip
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
        if name in self._frames:
            return np.stack([self._values(entry, 0) for entry in self._frames[name]], axis=2)
        return self._values(*self._entries[name])

    def _values(self, entry: Entry, index: int) -> Float32:
        kind = gguf.GGMLQuantizationType[self._file.tensors[entry.theirs].type]
        in_one_row = len(entry.labels) > 0 and len(entry.stored) == 1
        part = (0, 1) if in_one_row else (index, len(entry.parts))
        rows = self._rows(entry, *part)
        values: Float32 = gguf.quants.dequantize(rows, kind).astype(np.float32)
        if in_one_row:
            values = values.reshape(len(entry.parts), -1)[index]
        if entry.stored[0] == 2 * entry.shape[0] and not entry.transposed:  # see _projector_entries
            values = values.reshape(2, -1)[0] / np.float32(LINEAR_SCALE)
        if entry.transposed or entry.frame is not None:
            values = values.reshape(entry.stored)
            return values.T if entry.transposed else values
        values = values.reshape(entry.shape)
        if entry.groups is not None:
            values = by_member(values, entry.groups, back=True)
        if entry.negative_exponent:
            values = np.log(-values)
        return np.roll(values, 1, axis=0) if entry.first_last else values

    def q4_0(self, name: str) -> NDArray[np.uint8] | None:
        entry, index = self._entries[name]
        whole = entry.stored == entry.shape or entry.stack > 0
        whole = whole and entry.groups is None
        plain = whole and self._file.tensors[entry.theirs].type == "Q4_0"
        return self._rows(entry, index, len(entry.parts)) if plain else None

    def _rows(self, entry: Entry, index: int, parts: int) -> NDArray[np.uint8]:
        """The stored bytes ``(rows, bytes of a row)`` of the entry's part with this number of so
        many, rows in our order."""
        tensor = self._file.tensors[entry.theirs]
        rows = tensor.size // tensor.row_size // parts
        start = tensor.offset + index * rows * tensor.row_size
        data = np.memmap(tensor.path, np.uint8, "r", start, (rows, tensor.row_size))
        return half_split(np.array(data), entry.heads) if entry.heads else np.array(data)

    @property
    def sha256(self) -> str:
        digests = [file_sha256(path) for path in self.files]
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def open_gguf(path: Path, mmproj: Path | None) -> Model:
    """Read a language model, and its ``clip`` image encoder where it has one, of families whose
    tensors are all known here (mobilevlm/gguf/architectures.py, encoder.py).

    Raises:
        BundleError: a file is damaged, or of a kind that the spec cannot say.
        CheckpointError: a tensor is missing.
    """
    decoder = read_gguf(path)
    if mmproj is None:
        spec = model_spec(decoder, None)
        return Model(path.parent, spec, _weights(spec, decoder, []), gguf_tokenizer(decoder))
    vision = read_gguf(mmproj)
    spec = model_spec(decoder, vision)
    if _is_one_linear(vision, spec.image.connector):
        spec = with_image(spec, connector=dataclasses.replace(spec.image.connector, depth=1))
    encoder = read_encoder(vision, spec.image.connector.out_size)
    entries = _vision_entries(spec, encoder.swapped, encoder.class_last)
    scales = _layer_scale(vision, encoder)
    weights = _weights(spec, decoder, [(GgufTensors(vision, entries), entries)], scales)
    return Model(path.parent, spec, weights, gguf_tokenizer(decoder))


def _weights(
    spec: ModelSpec,
    decoder: GgufFile,
    further: list[tuple[GgufTensors, list[Entry]]],
    scales: dict[str, tuple[Rescaling, ...]] | None = None,
) -> Weights:
    """Return the weights of a language model, and ``further`` ones."""
    language = list(decoder_entries(spec.decoder))
    refs = {
        name: TensorRef(source, name)
        for source, entries in ((GgufTensors(decoder, language), language), *further)
        for entry in entries
        for name in entry.parts
    }
    if spec.decoder.tie_word_embeddings:
        refs["decoder.lm_head.weight"] = refs["decoder.embed_tokens.weight"]
    return Weights(refs, scales or {})


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
    """Return whether the MLP is the one that our export writes for a single Linear."""
    size, name = spec.out_size, "mm.2.weight"
    if spec.kind != "mlp" or name not in file.tensors:
        return False
    shape = (size, 2 * size)
    second = GgufTensors(file, [Entry(name, name, shape, shape, "matrix")])
    return second.shape(name) == shape == file.tensors[name].shape and np.allclose(
        second.read(name), signed_difference(size), rtol=1e-2, atol=1e-4 / LINEAR_SCALE
    )


def vision_entries(spec: ModelSpec) -> list[Entry]:
    """Return all tensors of an mmproj file of ours that a canonical tensor can be read from."""
    if projector_name(spec.image) in EXACT:
        return list(mmproj_entries(spec.image))
    return _vision_entries(spec, False, projector_name(spec.image) == "internvl")


def _vision_entries(spec: ModelSpec, swapped: bool, class_last: bool) -> list[Entry]:
    """Return the same of files with images in squares. ``swapped`` and ``class_last``: see
    :class:`mobilevlm.gguf.encoder.Encoder`."""
    return [
        *tower_entries(spec.image.transformer, swapped, class_last),
        *_projector_entries(spec.image.connector),
    ]


def _projector_entries(spec: ConnectorSpec) -> list[Entry]:
    """Return the projector's entries; for a single Linear, the first half of the first layer,
    scaled down."""
    if spec.kind != "mlp" or spec.depth > 1:
        return list(projector_entries(spec))
    size, ours = spec.out_size, "projector.mlp.0"
    shape, stored = (size, spec.in_size), (2 * size, spec.in_size)
    return [
        Entry("mm.0.weight", f"{ours}.weight", shape, stored, "matrix"),
        Entry("mm.0.bias", f"{ours}.bias", shape[:1], stored[:1], "float"),
    ]
