"""Rotation of a decoder's residual stream (QuaRot, Ashkboos et al. 2024, without the rotations that
it makes while running): all channels of the stream share what a few of them carry, so that scales
of weights and activations have no outliers to cover. The same function in floats.

A root-mean-square norm without weights does not see a rotation. So its weights go into the linear
layers that read it, these take the rotation back, and those that add to the stream add a rotated
sum. Values are rotated within each head too, which the layer after attention takes back, unless
gates multiply their channels. The graph rotates what comes in (export/graph/rotation.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from mobilevlm.checkpoint import Change, Rescaling, Weights
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.export.quantize.folding import find_folds
from mobilevlm.export.quantize.hadamard import factor_matrices
from mobilevlm.spec import ModelSpec

CODE_HEAD = "image_head.mlp.0"
"""The layer that reads the decoder's states where images are drawn."""


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix ``diag(signs) · (left ⊗ right)`` of a size; it multiplies vectors from
    the right."""

    signs: Float32
    """±1 ``(size,)``"""
    left: Float32
    """``(size / n, size / n)``"""
    right: Float32
    """``(n, n)``"""

    @property
    def size(self) -> int:
        return len(self.signs)

    def of_inputs(self, array: Float32, *, back: bool = False) -> Float32:
        """Return ``array (…, vectors · size)`` with each vector along the last axis rotated.
        ``back``: by the inverse."""
        left, right = (self.left, self.right.T) if back else (self.left.T, self.right)
        rows = array.reshape(-1, self.size)
        rows = rows if back else rows * self.signs
        parts = (rows.reshape(-1, len(right)) @ right).reshape(-1, len(left), len(right))
        turned: Float32 = np.matmul(left, parts).reshape(-1, self.size)
        return (turned * self.signs if back else turned).reshape(array.shape)

    def of_outputs(self, array: Float32, *, back: bool = False) -> Float32:
        """Return ``array (vectors · size, …)`` with each vector along the first axis rotated.
        ``back``: by the inverse."""
        columns = np.ascontiguousarray(array.reshape(len(array), -1).T)
        turned = self.of_inputs(columns, back=back)
        return np.ascontiguousarray(turned.T).reshape(array.shape)


@cache
def rotation(size: int) -> Rotation:
    """Return the rotation of vectors of this size, the same one every time."""
    signs = np.random.RandomState(size).randint(0, 2, size) * 2 - 1
    left, right = (matrix.astype(np.float32) for matrix in factor_matrices(size))
    return Rotation(signs.astype(np.float32), left, right)


@dataclass(frozen=True)
class _Rotated:
    """Rotations of a linear layer's weight ``(out_size, in_size)``, or of its bias, which has
    outputs only."""

    inputs: Rotation | None = None
    outputs: Rotation | None = None
    back: bool = False
    """By their inverses"""

    def apply(self, array: Float32) -> Float32:
        if self.inputs is not None and array.ndim > 1:
            array = self.inputs.of_inputs(array, back=self.back)
        return array if self.outputs is None else self.outputs.of_outputs(array, back=self.back)


class _Ones:
    """A norm whose weights are in the layers that read it."""

    def apply(self, array: Float32) -> Float32:
        return np.ones_like(array)


def rotation_obstacle(spec: DecoderSpec) -> str | None:
    """Return what keeps a decoder's stream from being rotated."""
    obstacles = {
        "norms that subtract the mean": spec.norm != "rms",
        "norms between linear layers and the residual stream": spec.post_norms,
        "an encoder": spec.encoder_layers > 0,
        "inputs of layers": spec.layer_input_size > 0,
    }
    return next((obstacle for obstacle, there in obstacles.items() if there), None)


def rotated(weights: Weights, spec: ModelSpec) -> Weights:
    """Return a decoder's weights for a rotated stream; each is rotated when it is read. It must
    have no :func:`rotation_obstacle`."""
    return _turned(gains_folded(weights, spec), spec, list(weights), back=False)


def rotated_back(weights: Weights, spec: ModelSpec, names: Iterable[str]) -> Weights:
    """Return weights of which these are as of :func:`rotated` and the others as of
    :func:`gains_folded`, all as of the latter."""
    return _turned(weights, spec, names, back=True)


def gains_folded(weights: Weights, spec: ModelSpec) -> Weights:
    """Return a decoder's weights with those of the stream's norms in the layers that read them."""
    changes: dict[str, Change] = {}
    for norm, readers in _readers(spec):
        gains = weights.read(f"{norm}.weight", (spec.decoder.hidden_size,))
        changes[f"{norm}.weight"] = _Ones()
        changes |= {f"{name}.weight": Rescaling(columns=gains) for name in readers}
    return weights.changed(changes)


def _turned(weights: Weights, spec: ModelSpec, names: Iterable[str], *, back: bool) -> Weights:
    """The weights with those of these names rotated; norms are ones."""
    among = set(names)
    decoder = spec.decoder
    stream = rotation(decoder.hidden_size)
    heads = None if decoder.attention_gate else rotation(decoder.head_dim)
    rotations: dict[str, tuple[Rotation | None, Rotation | None]] = {}
    for _, readers in _readers(spec):
        for name in readers:
            rotations[name] = stream, heads if name.endswith(".attn.v_proj") else None
    for name in _writers(decoder):
        rotations[name] = heads if name.endswith(".attn.o_proj") else None, stream
    rotations["decoder.position_embedding"] = stream, None
    if decoder.sound_rank:
        for index in range(decoder.num_hidden_layers):
            rotations[f"decoder.layers.{index}.attn.v_up"] = None, heads
    changes = {
        f"{name}.{kind}": _Rotated(inputs, outputs, back)
        for name, (inputs, outputs) in rotations.items()
        for kind in ("weight", "bias")
        if f"{name}.{kind}" in among
    }
    return weights.changed(changes)


def _readers(spec: ModelSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the norms of the stream, each with the layers that read it."""
    for place in find_folds(spec):
        if place.producer.startswith("decoder.") and place.producer.endswith("norm"):
            is_read = spec.draws and place.producer == "decoder.norm"
            yield place.producer, (*place.consumers, *([CODE_HEAD] if is_read else []))


def _writers(spec: DecoderSpec) -> Iterator[str]:
    """Yield the layers that add to the stream."""
    for index in range(spec.num_hidden_layers):
        name = f"decoder.layers.{index}"
        mixer = spec.mixer(index)
        yield f"{name}.{mixer}.{'o_proj' if mixer == 'attn' else 'out_proj'}"
        for mlp in spec.mlp_names(index):
            yield f"{mlp}.{spec.mlp_linears[1]}"
