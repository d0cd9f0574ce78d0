"""Draw results/quality.png and results/speed.png from the tables in results/*.md (matplotlib).

python benchmarks/results_figures.py            # after a table has changed
python benchmarks/results_figures.py --shrink   # make all images of results/ small as well
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
OURS, LLAMA = "#1b6ca8", "#d95f02"
LARGEST = 60_000
"""Bytes of an image."""
COLORS = (256, 128, 64, 32, 16)
"""Palettes that are tried, until the file is small enough."""


def main() -> None:
    """Draw both images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shrink", action="store_true", help="reduce colors of all images")
    options = parser.parse_args()
    write(FOLDER / "quality.png", draw_quality, (7, 4))
    write(FOLDER / "speed.png", draw_speed, (8, 5.6))
    if options.shrink:
        for path in sorted(FOLDER.rglob("*.png")):
            shrink(path)


def read_table(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading of a page, its titles first.

    Raises:
        ValueError: no such heading or table.
    """
    text = (FOLDER / page).read_text(encoding="utf-8")
    found = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL
    )
    if found is None:
        raise ValueError(f"{page}: no heading {heading!r}")
    table = re.search(r"^\|.*\n(?:\|.*\n?)+", found[1], re.MULTILINE)
    if table is None:
        raise ValueError(f"{page}: no table below {heading!r}")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()]
    return [rows[0], *rows[2:]]


def quality_points() -> list[tuple[str, float, float]]:
    """Return name, MB and KL of each row that has both."""
    _, *rows = read_table("quality.md", "Quality on a real decoder")
    return [(name.replace("`", ""), float(size), float(kl)) for name, kl, *_, size in rows if size]


def speed_ratios() -> dict[str, list[tuple[str, float]]]:
    """Return, for each model, stages and our time over that of llama.cpp."""
    found = {}
    for model, day in (("MobileVLM V2 1.7B", "2026-12-01"), ("SmolVLM-500M", "2026-11-30")):
        _, *rows = read_table("speed.md", f"{model}: `fast` beside Q4_K_M, equal quality")
        found[f"{model}, {day}, AVX2"] = [
            (
                re.sub(r", (s|ms|tokens/s)$", "", stage),
                1 / float(ratio)
                if stage.startswith("decode")
                else float(ratio.removeprefix("time ")),
            )
            for stage, _, _, ratio in rows
            if not stage.endswith("MB")
        ]
    return found


def draw_quality(figure: Any) -> None:
    """Draw KL against bytes; lower left is better."""
    panel = figure.subplots()
    for name, size, kl in quality_points():
        color = LLAMA if name.startswith("llama.cpp") else OURS
        panel.plot(size, kl, "o", color=color)
        below = name.startswith("llama.cpp") and not name.endswith("Q4_K_M")
        at = (-6, 6) if name.endswith("int4, fast") else (6, -12 if below else 6)
        panel.annotate(name, (size, kl), at, textcoords="offset points", color=color, fontsize=9,
                       ha="right" if at[0] < 0 else "left")  # fmt: skip
    panel.set_yscale("log")
    panel.set_xlim(60, 175)
    panel.set_ylim(0.006, 0.9)
    panel.set_yticks(
        [0.01, 0.02, 0.05, 0.1, 0.2, 0.5], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]
    )
    panel.minorticks_off()
    panel.set(xlabel="decoder and head, MB (less is better)",
              ylabel="KL from float32, nats (less is better)",
              title="SmolLM2-135M's decoder, 2026-11-30")  # fmt: skip
    panel.grid(alpha=0.3)


def draw_speed(figure: Any) -> None:
    """Draw the ratios as bars from 1, a group for each model."""
    panel = figure.subplots()
    places, labels, place = [], [], 0.0
    for model, ratios in speed_ratios().items():
        panel.text(0.31, place, model, fontsize=9, weight="bold", va="center")
        place += 1
        for stage, ratio in ratios:
            panel.barh(place, ratio - 1, left=1, color=OURS if ratio < 1 else LLAMA, height=0.7)
            panel.text(ratio * (0.985 if ratio < 1 else 1.015), place, f"{ratio:.2f}", fontsize=8,
                       va="center", ha="right" if ratio < 1 else "left")  # fmt: skip
            places.append(place)
            labels.append(stage)
            place += 1
        place += 0.4
    panel.axvline(1, color="black", lw=1)
    panel.set_xscale("log")
    panel.set_xlim(0.3, 1.25)
    panel.set_xticks([0.3, 0.4, 0.5, 0.6, 0.8, 1], ["0.3", "0.4", "0.5", "0.6", "0.8", "1"])
    panel.minorticks_off()
    panel.set_yticks(places, labels, fontsize=8)
    panel.set_ylim(place, -0.8)
    panel.set(xlabel="our time / time of llama.cpp (less is better)",
              title="Time beside llama.cpp, two threads")  # fmt: skip
    panel.spines[["top", "right"]].set_visible(False)


def write(path: Path, draw: Any, size: tuple[float, float]) -> None:
    """Save a figure as a small PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    shrink(path)


def shrink(path: Path) -> None:
    """Reduce the colors of an image until its file has at most ``LARGEST`` bytes."""
    from PIL import Image

    for colors in COLORS:
        if path.stat().st_size <= LARGEST:
            return
        with Image.open(path) as image:
            small = image.convert("RGB").quantize(colors, dither=Image.Dither.NONE)
        small.save(path, optimize=True)


if __name__ == "__main__":
    main()
