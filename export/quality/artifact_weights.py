"""The weights that a bundle's artifacts stand for, as another checkpoint: integers become floats
again, factors that AWQ or SmoothQuant moved between layers go back to where they were, and rotated
layers are rotated back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mobilevlm.bundle import Bundle
from mobilevlm.checkpoint import TensorRef, TensorSource, Weights
from mobilevlm.export.graph.reading import OnnxTensors
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.export.quantize.folding import Fold, fold, free_folds
from mobilevlm.export.quantize.rotation import gains_folded, rotated_back
from mobilevlm.model import Model
from mobilevlm.plan import stage_formats
from mobilevlm.recipe import Recipe


def exact_weights(model: Model, bundle: Bundle, engine: str) -> Weights:
    """The checkpoint's weights in the form of :func:`artifact_weights`: of a rotated decoder, norms
    of ones, and their weights in the layers that read them."""
    if not _is_rotated(bundle, engine):
        return model.weights
    return gains_folded(model.weights, model.spec)


def artifact_weights(model: Model, bundle: Bundle, engine: str) -> Weights:
    """The model's weights, with those of a bundle's artifacts instead of the checkpoint's: linear
    layers and norms of ONNX files, all tensors of GGUF files. What activations lose is not in it.
    To be compared with :func:`exact_weights`.

    Raises:
        BundleError: an artifact cannot be read.
        CheckpointError: a GGUF file lacks a tensor.
    """
    refs: dict[str, TensorRef] = {}
    formats = stage_formats(bundle, engine)
    for stage in [stage for stage in ("vision", "audio", "decoder") if stage in formats]:
        form = formats[stage]
        path = bundle.path(bundle.artifact(stage, form).path)
        source, names = _open(model, stage, form, path)
        refs |= {name: TensorRef(source, name) for name in names}
    exact = exact_weights(model, bundle, engine)
    weights = exact.replaced(refs)
    if _is_rotated(bundle, engine):
        weights = rotated_back(weights, model.spec, refs)
    scaled = [place for place in _scaled(model, bundle.manifest.recipe) if _is_onnx(refs, place)]
    one = np.float32(1)
    inverse = {place: one / _factors(exact, weights, place) for place in scaled}
    return fold(weights, inverse)


def _is_rotated(bundle: Bundle, engine: str) -> bool:
    is_onnx = stage_formats(bundle, engine)["decoder"] == "onnx"
    return is_onnx and bundle.manifest.recipe.is_rotated


def _open(model: Model, stage: str, form: str, path: Path) -> tuple[TensorSource, list[str]]:
    """An artifact's tensors, and their names."""
    if form != "gguf":
        onnx = OnnxTensors(path, model.spec, model.weights)
        return onnx, onnx.names
    from mobilevlm.export.gguf.source import GgufTensors, vision_entries
    from mobilevlm.gguf.file import read_gguf
    from mobilevlm.gguf.names import decoder_entries

    spec = model.spec
    entries = list(decoder_entries(spec.decoder)) if stage == "decoder" else vision_entries(spec)
    names = [name for entry in entries for name in entry.parts]
    return GgufTensors(read_gguf(path), entries), names


def _scaled(model: Model, recipe: Recipe) -> Iterator[Fold]:
    return (
        place
        for place in free_folds(model.spec, rotated=recipe.is_rotated)
        if recipe.format_of(place.consumers[0]).has_factors
    )


def _is_onnx(refs: dict[str, TensorRef], place: Fold) -> bool:
    first = refs.get(f"{place.consumers[0]}.weight")
    return first is not None and isinstance(first.files, OnnxTensors)


def _factors(exact: Weights, stored: Weights, place: Fold) -> Float32:
    """Return the factors that the inputs of a fold's consumers were multiplied by ``(in_size,)``:
    of a norm exactly; of a linear layer, which was rounded, by least squares over the columns of
    its consumers."""
    norm, shape = f"{place.producer}.weight", (place.in_size,)
    if "norm" in place.producer:
        return exact.read(norm, shape) / stored.read(norm, shape)
    products = squares = np.zeros(place.in_size)
    for name, out_size in zip(place.consumers, place.out_sizes, strict=True):
        consumer = f"{name}.weight", (out_size, place.in_size)
        ours, theirs = exact.read(*consumer), stored.read(*consumer)
        products = products + (ours * theirs).sum(axis=0, dtype=np.float64)
        squares = squares + np.square(ours).sum(axis=0, dtype=np.float64)
    factors = np.divide(products, squares, out=np.ones_like(squares), where=products > 0)
    return place.tie(factors.astype(np.float32), np.mean)
