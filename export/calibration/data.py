"""Calibration data by its name."""

from __future__ import annotations

from pathlib import Path

from mobilevlm.export.calibration.own import own_samples
from mobilevlm.export.calibration.samples import Sample, read_samples, scene_samples
from mobilevlm.model import Model
from mobilevlm.recipe import OWN, SCENES


def find_samples(name: str, model: Model) -> list[Sample]:
    """Return calibration samples: ``own`` answers of the model, ``scenes``, or the content of a
    JSONL file.

    Raises:
        MobileVLMError: no such file, or a line of it is wrong.
        ImageError: an image file is missing.
    """
    if name == OWN:
        return own_samples(model)
    return scene_samples() if name == SCENES else read_samples(Path(name))
