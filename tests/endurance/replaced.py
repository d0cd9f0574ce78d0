"""Exports that replace a bundle again and again while other processes load it: no load fails, and
each gives the logits of one of the two bundles as a whole."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from endurance.processes import finish, start

LOADERS = 3
"""Processes that load at the same time"""


@dataclass(frozen=True)
class Figures:
    """Counts of a run."""

    exports: int
    loads: int
    seconds: float


def run(folder: Path, exports: int, loads: int, one_step: bool = True) -> Figures:
    """Replace a bundle ``exports`` times at least, and load it ``loads`` times. ``one_step``: else
    the system is one that cannot exchange folders.

    Raises:
        AssertionError: a load failed, or gave something else.
    """
    from mobilevlm.synth.checkpoints import write_checkpoint

    checkpoints = [folder / "first", folder / "second"]
    for seed, checkpoint in enumerate(checkpoints):
        write_checkpoint("tiny", checkpoint, seed=seed)
        assert finish(start(_export, checkpoint, folder / f"{seed}")) == 0
        assert finish(start(_note, folder / f"{seed}")) == 0
    target, over, begun = folder / "bundle", folder / "over", time.monotonic()

    def replace_on() -> None:
        from mobilevlm.export.workspace import workspace

        if not one_step:
            mock.patch.object(workspace, "exchange", return_value=False).start()
        count = 0
        while count < exports or not over.exists():
            _export(checkpoints[count % 2], target)
            count += 1
            (folder / "count").write_text(str(count))

    def load_on(number: int) -> None:
        for _ in range(number):
            _check(target, folder)

    assert finish(start(_export, checkpoints[0], target)) == 0
    exporter = start(replace_on)
    shares = [loads // LOADERS + (index < loads % LOADERS) for index in range(LOADERS)]
    loaders = [start(load_on, share) for share in shares]
    codes = [finish(loader) for loader in loaders]
    over.touch()
    assert finish(exporter) == 0 and codes == [0] * LOADERS, codes
    assert not list(folder.glob("bundle.partial-*"))
    return Figures(int((folder / "count").read_text()), loads, time.monotonic() - begun)


def _export(checkpoint: Path, target: Path) -> None:
    from mobilevlm.export.pipeline import export

    export(checkpoint, target, measure=False)


def _logits(folder: Path) -> tuple[str, np.ndarray]:
    import mobilevlm

    with mobilevlm.load(folder, threads=1) as vlm:
        image = np.full((32, 32, 3), 99, np.uint8)
        return vlm.bundle.digest, vlm.prompt_logits("Who?", [image])


def _note(folder: Path) -> None:
    digest, logits = _logits(folder)
    np.save(folder.parent / f"{digest}.npy", logits)


def _check(target: Path, folder: Path) -> None:
    digest, logits = _logits(target)
    expected = np.load(folder / f"{digest}.npy")
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max(), "a mix"
