"""From a checkpoint to a recipe file with mixed precision, and a plot of the choices
(needs torch)."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Literal

from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError, require
from mobilevlm.export.calibration.data import find_samples
from mobilevlm.export.calibration.samples import measuring_samples
from mobilevlm.export.recipes.file import find_recipe, recipe_text
from mobilevlm.export.recipes.layer_formats import DECODER_ROLES, expand_layers
from mobilevlm.export.search.search import Data, Found, Goal, candidates, search
from mobilevlm.families import open_checkpoint
from mobilevlm.model import OpenOptions
from mobilevlm.recipe import QuantizerName
from mobilevlm.whole_file import written_whole

MARK = "# Mixed precision by sensitivity"
"""How the files of a search begin."""


def search_recipe(
    checkpoint: Path,
    path: Path,
    goal: Goal,
    *,
    recipe: str = "int4",
    quantizer: QuantizerName = "gptq",
    experts: Literal["fused", "plain"] = "plain",
    calibration: str | None = None,
    data: str = "scenes",
    options: OpenOptions = OpenOptions(),  # noqa: B008
    plot: Path | None = None,
) -> Found:
    """Searches formats for the decoder of a checkpoint folder and writes a recipe file; everything
    else is as in ``recipe``.

    ``calibration``: data for GPTQ instead of the recipe's: ``own``, ``scenes`` or a JSONL file
    (export/calibration/samples.py); ``data``: what to measure on: ``scenes``, others than for
    calibration, or a JSONL file. ``plot``: image file to draw divergence over size into.
    ``experts``: formats for each of the sparse experts (``plain``), or one for all of a layer
    (``fused``).

    Raises:
        CheckpointError: the checkpoint cannot be read.
        QualityError: no choice of formats stays within the divergence.
        MobileVLMError: the budget is too small, a sample is wrong, or the target is in the way.
    """
    start = time.perf_counter()
    check_target(path)
    if checkpoint.suffix == ".gguf":
        raise MobileVLMError(f"{checkpoint}: quantized already: a search needs a checkpoint folder")
    if plot is not None:
        check_matplotlib()
    base = find_recipe(recipe)
    if calibration is not None:
        base = dataclasses.replace(base, calibration=calibration)
    model = open_checkpoint(checkpoint, options)
    samples = Data(
        find_samples(base.calibration, model), measuring_samples(data, model.spec.inputs)
    )
    if base.is_rotated:
        progress.say("rotation    left out: a search measures the layers as they are")
        base = base.without_rotation()
    if roles := [key for key in base.layers if key in DECODER_ROLES]:
        progress.say(f"layers      left out: {', '.join(roles)}: the search chooses formats")
        named = {key: layers for key, layers in base.layers.items() if key not in DECODER_ROLES}
        base = dataclasses.replace(base, layers=named)
    base = expand_layers(base, model.spec)
    if any(name.startswith("decoder.") for name in base.layers):
        raise MobileVLMError(
            f"recipe {recipe!r} gives layers of the decoder a format, which is what the search "
            f"is for: leave these entries out"
        )
    found = search(model, goal, candidates(quantizer), samples, experts)
    common = Counter(found.layers.values()).most_common(1)[0][0]
    mixed = dataclasses.replace(
        base,
        name=path.stem,
        decoder=common,
        lm_head=found.layers["decoder.lm_head"],
        layers={**base.layers, **found.layers},
        experts=experts if model.spec.decoder.experts else base.experts,
    )
    arguments = [str(checkpoint), "-o", path.name, *str(goal).split(), "--recipe", recipe]
    arguments += ["--quantizer", quantizer, "--calibration", base.calibration, "--data", data]
    arguments += ["--experts", experts] if model.spec.decoder.experts else []
    command = shlex.join(["mobilevlm", "search", *arguments])
    _write(path, recipe_text(mixed, path.parent, _header(found, command, data), _comments(found)))
    if plot is not None:
        draw_front(found, plot, f"{model.spec.name}, {quantizer}")
    progress.say(
        f"recipe      {path}  {found.bits_per_weight:.2f} bits per weight, "
        f"{found.allocation.size / 1e6:.1f} MB, KL {found.effect.kl:.4g}, "
        f"{time.perf_counter() - start:.1f} s"
    )
    return found


def check_target(path: Path) -> None:
    """Refuses to write over anything but the recipe of an earlier search.

    Raises:
        MobileVLMError: something else is in the way, or there is no such folder.
    """
    if path.suffix != ".toml":
        raise MobileVLMError(f"{path}: a recipe file's name ends with .toml")
    if not path.parent.is_dir():
        raise MobileVLMError(f"{path.parent}: no such folder: make it first")
    if path.exists():
        is_ours = path.is_file() and path.read_bytes().startswith(MARK.encode())
        if not is_ours:
            raise MobileVLMError(f"{path}: not written by a search, and in the way: choose another")


def _header(found: Found, command: str, data: str) -> list[str]:
    weights = sum(unit.size for unit in found.units)
    effect, allocation = found.effect, found.allocation
    return [
        f"{MARK[2:]}: {command}",
        f"{found.bits_per_weight:.3f} bits per weight of the decoder's {weights / 1e6:.1f} M "
        f"(scales and zero points included), {allocation.size / 1e6:.2f} MB.",
        f"All layers together: KL {effect.kl:.4g} nats, top-1 agreement "
        f"{effect.top1_agreement:.1%}; the sum of the layers alone: {allocation.kl:.4g}.",
        f"Measured where the model answers, on {found.num_samples} samples of "
        f"{Path(data).name} ({found.num_positions} positions), with float activations.",
        "Behind each layer: its KL alone, bits per weight, kB"
        + (", share of the layer's choices that the expert gets." if found.usage else "."),
        "",
    ]


def _comments(found: Found) -> dict[str, str]:
    comments: dict[str, str] = {}
    for unit, option in zip(found.units, found.allocation.options, strict=True):
        text = f"{option.kl:.2g}, {8 * option.size / unit.size:.2f}, {option.size / 1e3:.1f}"
        if unit.name in found.usage:
            text += f", {found.usage[unit.name]:.1%}"
        comments[unit.name] = text
    return comments


def _write(path: Path, text: str) -> None:
    with written_whole(path) as draft:
        draft.write_text(text, encoding="utf-8")


def check_matplotlib() -> None:
    """Raises MissingExtraError: matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise require("matplotlib", "plots", "drawing divergence over size") from None


def draw_front(found: Found, path: Path, title: str) -> None:
    """Predicted divergence over bits per weight, and what was chosen and measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    bits = [found.bits_of(allocation) for allocation in found.front]
    axes.plot(bits, [point.kl for point in found.front], ".-", label="best choices, predicted")
    axes.plot([found.bits_per_weight], [found.effect.kl], "o", label="chosen, measured")
    axes.set(title=title, xlabel="bits per weight, scales included", ylabel="KL, nats")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
