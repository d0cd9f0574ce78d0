"""Exports to one place that are killed (SIGKILL) at random moments, with changing recipes.

Every bundle that is ever seen there, and every final one, has the bytes of an undisturbed export.
The files of others around it stay, and nothing is left behind.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endurance.processes import finish, start

CUSTOM = """\
tower = "int8"
projector = "int8"
embeddings = "fp16"
decoder = {{ precision = "q4", block_size = {block} }}
lm_head = {{ precision = "q4", block_size = {block} }}
limits = {{ vision_relative_error = 1.0, decoder_kl = 9.0 }}
"""
"""The decoders of such recipes have the same file names."""
MOST_KILLS = 4
"""Kills before an export may finish"""


@dataclass
class Figures:
    """Counts of a run."""

    kills: int = 0
    finished: int = 0
    resumed: int = 0
    """Kills after which a work folder was there"""
    replaced: int = 0
    """Kills of an export that had an older bundle to replace"""


def run(folder: Path, count: int, seed: int) -> Figures:
    """Kill ``count`` exports in ``folder``.

    Raises:
        AssertionError: something is not as it should be.
    """
    from mobilevlm.synth.checkpoints import write_checkpoint

    choose, figures = random.Random(seed), Figures()
    write_checkpoint("tiny", folder / "checkpoint")
    recipes = ["fp16-weights", "int8", "fp32"]
    for block in (16, 32):
        path = folder / f"custom{block}.toml"
        path.write_text(CUSTOM.format(block=block))
        recipes.append(str(path))
    expected, seconds = {}, 0.0
    for recipe in recipes:
        begun = time.monotonic()
        assert finish(start(_export, folder, recipe, folder / "undisturbed")) == 0
        seconds = max(seconds, time.monotonic() - begun)
        expected[recipe] = _content(folder / "undisturbed")
        shutil.rmtree(folder / "undisturbed")
    place = folder / "place"
    _make_neighbours(place)
    target, others = place / "bundle", _content(place)
    while figures.kills < count:
        for _ in range(choose.randint(1, MOST_KILLS)):
            recipe, moment = choose.choice(recipes), choose.uniform(0, 1.05 * seconds)
            figures.replaced += target.exists()
            child = start(_export, folder, recipe, target)
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            code = finish(child)
            assert code in (0, -signal.SIGKILL), code
            figures.kills += code != 0
            figures.resumed += len(list(place.glob("bundle.partial-*"))) > 3
            if target.exists():
                assert _content(target) in expected.values(), f"mixed after {figures}"
        recipe = choose.choice(recipes)
        begun = time.monotonic()
        assert finish(start(_export, folder, recipe, target)) == 0
        seconds = 0.9 * seconds + 0.1 * max(time.monotonic() - begun, seconds / 2)
        figures.finished += 1
        assert _content(target) == expected[recipe], f"{recipe}: other bytes after {figures}"
        left = {name: entry for name, entry in _content(place).items() if not _is_in(name)}
        print(figures, file=sys.stderr)
        assert left == others, f"around the bundle after {figures}: {left.keys() ^ others.keys()}"
    return figures


def _export(folder: Path, recipe: str, target: Path) -> None:
    from mobilevlm.export.pipeline import export

    export(folder / "checkpoint", target, recipe=recipe, measure=False)


def _make_neighbours(place: Path) -> None:
    """Files of others under the names that exports use, or used."""
    for name in ("elsewhere", "bundle.partial", "bundle.partial.old", "bundle.partial-abcdefgh"):
        (place / name).mkdir(parents=True)
        (place / name / "thesis.txt").write_text(name)
    (place / "bundle.partial-12345678").symlink_to(place / "elsewhere")
    (place / "bundle.partial-file5678").write_text("mine")


def _is_in(name: str) -> bool:
    return name == "bundle" or name.startswith("bundle/")


def _content(folder: Path) -> dict[str, Any]:
    return {
        path.relative_to(folder).as_posix(): (
            str(path.readlink())
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else None
        )
        for path in sorted(folder.rglob("*"))
    }
