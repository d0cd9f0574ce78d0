"""Data of a recipe's calibrated methods for one stage: weights with factors moved between layers
(AWQ, SmoothQuant), and Hessians (GPTQ)."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from mobilevlm.checkpoint import Weights
from mobilevlm.export.calibration.samples import Sample, samples_digest, tokenizer_digests
from mobilevlm.export.quantize import awq, smoothquant
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.export.quantize.folding import Fold, fold, free_folds
from mobilevlm.export.quantize.gptq import HessianOf
from mobilevlm.export.quantize.rotation import rotated, rotation
from mobilevlm.linear_groups import linear_groups
from mobilevlm.model import Model
from mobilevlm.plain_types import to_dict
from mobilevlm.recipe import LinearFormat, Recipe

if TYPE_CHECKING:
    from mobilevlm.export.calibration.statistics import Block, InputStatistics, Wanted

CalibratedStage: TypeAlias = Literal["vision", "audio", "decoder"]


@dataclass(frozen=True)
class Calibrated:
    """A stage's weights, ready to be rotated where the recipe says so, and quantized."""

    weights: Weights
    hessian: HessianOf
    """Hessians of the inputs as they are then, to be asked in the order of use"""


def calibration_key(model: Model, samples: Sequence[Sample]) -> list[object]:
    """All that statistics of activations depend on beside the weights that they are for."""
    spec = model.spec
    return [
        samples_digest(samples),
        [
            model.weights.sha256(prefix)
            for prefix in ("vision.", "audio.", "projector.", "decoder.")
        ],
        [to_dict(part) for part in (*spec.inputs.values(), spec.decoder, spec.conversation)],
        tokenizer_digests(model),
        importlib.metadata.version("onnxruntime"),
    ]


def calibrate(
    model: Model, recipe: Recipe, samples: Sequence[Sample], stage: CalibratedStage
) -> Calibrated:
    """Runs the samples as far as the recipe's methods need it: for scaling now, for Hessians layer
    by layer as they are asked for.

    Raises:
        MobileVLMError, PromptError, ImageError: a sample is wrong.
    """
    folds = [
        place
        for place in free_folds(model.spec, rotated=recipe.is_rotated)
        if place.consumers[0].startswith(f"{stage}.")
        and recipe.format_of(place.consumers[0]).has_factors
    ]
    weights = model.weights
    if folds:
        weights = fold(weights, _factors(model, recipe, samples, stage, folds))
    scaled = dataclasses.replace(model, weights=weights)

    def wanted(name: str) -> bool:
        return recipe.format_of(name).quantizer == "gptq"

    is_rotated = recipe.is_rotated and stage == "decoder"
    return Calibrated(weights, hessians(scaled, samples, stage, wanted, is_rotated))


def hessians(
    model: Model,
    samples: Sequence[Sample],
    stage: CalibratedStage,
    wanted: Wanted,
    is_rotated: bool = False,
) -> HessianOf:
    """Hessians of the wanted layers, to be asked in the order of use: the samples run as far as the
    layer that is asked for. ``is_rotated``: of the decoder with a rotated stream."""
    quantized = {name for group in linear_groups(model.spec) for name in group.names}

    def watched(name: str) -> bool:
        return name in quantized and wanted(name)

    if not is_rotated:
        return _Hessians(_watch(model, samples, stage, watched, True)).find
    from mobilevlm.export.calibration.decoder_layers import watch_decoder

    turned = dataclasses.replace(model, weights=rotated(model.weights, model.spec))
    stream = rotation(model.spec.decoder.hidden_size)
    return _Hessians(watch_decoder(turned, samples, watched, True, stream)).find


class _Hessians:
    """Hands out Hessians block by block; the ones before are forgotten."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks = blocks
        self._block: Block = {}

    def find(self, name: str) -> Float32 | None:
        while name not in self._block:
            self._block = {}  # before the next is made
            self._block = next(self._blocks)
        return self._block[name].hessian


def _watch(
    model: Model, samples: Sequence[Sample], stage: CalibratedStage, wanted: Wanted, hessian: bool
) -> Iterator[Block]:
    if stage != "decoder":
        from mobilevlm.export.calibration.encoder_layers import watch_encoder

        return watch_encoder(model, samples, wanted, hessian)
    from mobilevlm.export.calibration.decoder_layers import watch_decoder

    return watch_decoder(model, samples, wanted, hessian)


def _factors(
    model: Model,
    recipe: Recipe,
    samples: Sequence[Sample],
    stage: CalibratedStage,
    folds: Sequence[Fold],
) -> Mapping[Fold, Float32]:
    places = {place.consumers[0]: place for place in folds}
    found = {}
    hessian = any(recipe.format_of(name).scaling == "awq" for name in places)
    for block in _watch(model, samples, stage, lambda name: name in places, hessian):
        for name, statistics in block.items():
            layers = recipe.format_of(name)
            found[places[name]] = _fold_factors(model.weights, places[name], layers, statistics)
    if missing := [place.producer for place in folds if place not in found]:
        raise RuntimeError(f"no statistics for the factors behind {', '.join(missing)}")
    return found


def _fold_factors(
    weights: Weights, place: Fold, layers: LinearFormat, statistics: InputStatistics
) -> Float32:
    """``(in_size,)``, equal where the fold needs them to be; ones where no token came by."""
    if not statistics.count:
        return np.ones(place.in_size, np.float32)
    sizes = zip(place.consumers, place.out_sizes, strict=True)
    consumers = [weights.read(f"{name}.weight", (size, place.in_size)) for name, size in sizes]
    if layers.scaling == "smoothquant":
        maximum = place.tie(statistics.maximum, np.max)
        return place.tie(smoothquant.factors(consumers, maximum), np.mean)
    assert layers.scheme is not None and statistics.hessian is not None
    mean_square = place.tie(statistics.mean_square, np.mean)
    return awq.factors(consumers, mean_square, statistics.hessian, layers.scheme)
