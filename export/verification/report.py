"""The report of a verification: one HTML file with its plots and images inside, nothing to load.

Places of marks in the plots are computed here; export/verification/report.html.jinja draws them.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.quality.layer_effects import LayerEffect
from mobilevlm.export.verification.verify import Verification, WorstSample
from mobilevlm.image import open_image
from mobilevlm.page import Fact, file_link, page_facts, write_page
from mobilevlm.prompt import Sound
from mobilevlm.runtime.machine import describe_machine, machine_line

TEMPLATE = "verification/report.html.jinja"
WIDTH, HEIGHT = 900.0, 150.0
"""Size of a plot's area."""
SMALLEST_KL = 1e-9
"""Nats; less is shown as this much."""
IMAGE_EDGE = 224
"""Longest edge of a sample's image."""


@dataclass(frozen=True)
class Mark:
    """A bar, from the bottom of the plot up, and what it says when pointed at."""

    x: float
    width: float
    height: float
    part: str
    """``vision``, ``projector`` or ``decoder``: its colour"""
    text: str


@dataclass(frozen=True)
class Tick:
    """A line of the grid."""

    at: float
    """Above the bottom, or right of the left edge"""
    label: str


@dataclass(frozen=True)
class Plot:
    """Bars beside each other on one scale."""

    title: str
    marks: tuple[Mark, ...]
    ticks: tuple[Tick, ...]
    labels: tuple[Tick, ...] = ()
    """Below the plot"""


def write_report(found: Verification, path: Path) -> None:
    """Write the HTML file, whole or not at all."""
    template = files("mobilevlm.export") / TEMPLATE
    write_page(
        path,
        template.read_text(encoding="utf-8"),
        facts=list(_facts(found, path)),
        found=found,
        checks={(check.stage, check.figure): check for check in found.checks},
        plots=_layer_plots(found),
        kl=_kl_plot(found.kl),
        kl_mean=float(found.kl.mean()),
        layers=_most_harmful(found.layers),
        worst=[(item, _images(item.figures.sample)) for item in found.worst],
        differs=_differs,
        width=WIDTH,
        height=HEIGHT,
    )


def _facts(found: Verification, path: Path) -> Iterator[Fact]:
    """Yield what was compared with what, where and when."""
    measured = str(found.bundle.folder), found.checkpoint, found.recipe.name, found.engine
    for fact in page_facts(path, machine_line(describe_machine()), [measured]):
        if fact.name == "checkpoint" and found.checkpoint:
            config = Path(found.checkpoint) / "config.json"
            yield Fact(fact.name, fact.text, file_link(path, config))
        else:
            yield fact
    yield Fact("samples", f"{found.num_samples} of {found.data}, beside the float32 reference")


def _layer_plots(found: Verification) -> list[Plot]:
    """Weight error, effect alone and error of the states, layer by layer."""
    layers = [(item.label, 100 * item.weight_error) for item in found.layers]
    tried = [(item.label, item.effect.kl) for item in found.layers if item.effect is not None]
    visual = [
        (item.label, 100 * item.effect.visual_error)
        for item in found.layers
        if item.effect is not None and item.effect.visual_error is not None
    ]
    states = [(item.layer, 100 * item.error) for item in found.states]
    plots = [
        _linear_plot("Rounding: relative error of each layer's weights, in %", layers),
        _log_plot(
            "Sensitivity: KL when only this layer has the artifact's weights, in nats", tried
        ),
        _linear_plot("The same on the visual tokens: relative error, in %", visual),
        _linear_plot("Build-up: relative error of the states after each layer, in %", states),
    ]
    return [plot for plot in plots if plot.marks]


def _linear_plot(title: str, values: Sequence[tuple[str, float]]) -> Plot:
    top = max((value for _, value in values), default=0.0) or 1.0
    step = 10 ** math.floor(math.log10(top))
    step = next(size for size in (step / 4, step / 2, step, 2 * step) if top / size <= 5)
    grid = [index * step for index in range(int(top / step) + 1)]
    ticks = tuple(Tick(HEIGHT * value / top, f"{value:.4g}") for value in grid)
    return Plot(title, _bars(values, lambda value: value / top, "{:.3g}"), ticks)


def _log_plot(title: str, values: Sequence[tuple[str, float]]) -> Plot:
    logs = [math.log10(max(value, SMALLEST_KL)) for _, value in values] or [0.0]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    high += high == low
    decades = range(low, high + 1, max(1, (high - low) // 5))
    ticks = tuple(Tick(HEIGHT * (at - low) / (high - low), f"1e{at}") for at in decades)

    def share(value: float) -> float:
        return (math.log10(max(value, SMALLEST_KL)) - low) / (high - low)

    return Plot(title, _bars(values, share, "{:.3g}"), ticks)


def _bars(values: Sequence[tuple[str, float]], share: Any, form: str) -> tuple[Mark, ...]:
    width = WIDTH / max(len(values), 1)
    return tuple(
        Mark(
            index * width,
            max(0.82 * width, 0.6),
            max(HEIGHT * share(value), 0.8),
            label.partition(".")[0],
            f"{label}: {form.format(value)}",
        )
        for index, (label, value) in enumerate(values)
    )


def _kl_plot(kl: Any) -> Plot:
    """How many tokens have which divergence, by half decades."""
    logs = np.log10(np.maximum(kl, SMALLEST_KL))
    low, high = math.floor(logs.min()), math.ceil(logs.max())
    high += high == low
    counts, edges = np.histogram(logs, bins=2 * (high - low), range=(low, high))
    values = [
        (f"{10**left:.1e} to {10**right:.1e} nats", float(count))
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    plot = _linear_plot("Tokens by their KL, in nats", values)
    step = WIDTH / (high - low)
    labels = tuple(Tick((at - low) * step, f"1e{at}") for at in range(low, high + 1))
    marks = tuple(Mark(m.x, m.width, m.height, "decoder", f"{m.text} tokens") for m in plot.marks)
    return Plot(plot.title, marks, plot.ticks, labels)


def _most_harmful(layers: Sequence[LayerEffect]) -> list[LayerEffect]:
    tried = [item for item in layers if item.effect is not None]
    return sorted(tried, key=lambda item: -item.effect.kl if item.effect else 0.0)[:10]


def _differs(item: WorstSample) -> bool:
    return item.found != item.expected


def _images(sample: Sample) -> list[str]:
    """As data URIs."""
    uris = []
    for image in sample.images:
        if isinstance(image, Sound):
            continue
        opened = open_image(image)
        opened.thumbnail((IMAGE_EDGE, IMAGE_EDGE), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        opened.save(data, "PNG")
        uris.append(f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}")
    return uris
