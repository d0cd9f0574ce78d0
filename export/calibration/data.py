"""Calibration data by its name."""

from __future__ import annotations

from mobilevlm.console import progress
from mobilevlm.export.calibration.own import own_samples
from mobilevlm.export.calibration.samples import Sample, scene_samples, scenes_or_file
from mobilevlm.model import Model
from mobilevlm.recipe import OWN, SCENES, Recipe

SCENES_OF_TOWER = 16


def find_samples(name: str, model: Model) -> list[Sample]:
    """Return calibration samples: ``own`` answers of the model, ``scenes``, or the content of a
    JSONL file.

    Raises:
        MobileVLMError: no such file, or a line of it is wrong.
        ImageError: an image file is missing.
    """
    if name == OWN:
        return own_samples(model)
    return scenes_or_file(name, 0, model.spec.inputs)


def find_shown(recipe: Recipe, model: Model) -> list[Sample]:
    """Return samples for the vision or audio stage: the images or sounds of the recipe's JSONL
    file, else drawn scenes and made sounds.

    Raises:
        MobileVLMError: no such file, or a line of it is wrong.
        ImageError, AudioError: a file is missing.
    """
    made = scene_samples(SCENES_OF_TOWER, inputs=model.spec.inputs)
    made = [sample for sample in made if sample.images]
    if recipe.calibration in (OWN, SCENES):
        return made
    given = scenes_or_file(recipe.calibration, 0, model.spec.inputs)
    found = [sample for sample in given if sample.images]
    if not found:
        progress.say(
            f"calibration of the tower on made samples: {recipe.calibration} shows it nothing"
        )
    return found or made
