"""Beeps and simple scenes: what the model that hears and draws is trained on."""

from __future__ import annotations

import numpy as np
import pytest

from mobilevlm.media.sound_image import sound_image
from mobilevlm.nano import beeps
from mobilevlm.nano.scenes import TRAINING_SEEDS
from mobilevlm.nano.simple import (
    EDGE,
    GRID,
    NUM_CODES,
    codes_of,
    draw_exactly,
    draw_varied,
    in_patches,
    patches,
    simple_caption,
    simple_scene,
)


def test_each_letter_sounds_in_its_own_column_and_rows() -> None:
    clip = beeps.Clip(5, "ag", 1.0, 0.0, 0.12, 0.5, 0.0)
    image = sound_image(beeps.sound(clip), EDGE)
    loud = image[:, :, 0].reshape(6, 8, 6, 8).max((1, 3)) > 200
    rows = {column: sorted(5 - row for row in np.flatnonzero(loud[:, column])) for column in (0, 1)}
    assert rows == {0: [0], 1: [0, 1]}  # a: the lowest tone; g: the two lowest
    assert not loud[:, 2:].any() and len(set(beeps.CHORDS)) == len(beeps.LETTERS)


def test_silence_is_black_and_loudness_does_not_count() -> None:
    assert not sound_image(np.zeros(1000, np.float32), EDGE).any()
    quiet, loud = (
        sound_image(beeps.sound(beeps.Clip(5, "cb", 1.0, 0.0, 0.12, level, 0.0)), EDGE)
        for level in (0.05, 0.8)
    )
    assert np.abs(quiet.astype(int) - loud).max() <= 1


def test_codes_give_back_nearly_all_drawn_scenes() -> None:
    assert patches().shape[0] == NUM_CODES == len(np.unique(patches(), axis=0))
    wrong = 0.0
    for seed in range(50):
        image = draw_exactly(simple_scene(seed))
        codes = codes_of(image)
        assert codes.shape == (GRID * GRID,)
        wrong = max(wrong, float(np.abs(patches()[codes] - in_patches(image)).mean()))
    assert wrong <= 0.1  # of 255; one of 257 patches has another's code


def test_seeds_settle_scenes_images_and_clips_and_splits_are_apart() -> None:
    scene = simple_scene(7)
    assert scene == simple_scene(7) != simple_scene(8)
    assert (draw_varied(scene, 7) == draw_varied(scene, 7)).all()
    assert (beeps.sound(beeps.sample_clip(7)) == beeps.sound(beeps.sample_clip(7))).all()
    assert all(item.name in simple_caption(scene) for item in scene.items)
    for make in (simple_scene, beeps.sample_clip):
        with pytest.raises(ValueError, match="split"):
            make(TRAINING_SEEDS)
        with pytest.raises(ValueError, match="split"):
            make(0, "evaluation")
