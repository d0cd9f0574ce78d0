"""Rotation of the residual stream: its matrices, and what recipes may ask for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mobilevlm.errors import MobileVLMError
from mobilevlm.export.quantize.hadamard import factor_matrices
from mobilevlm.export.quantize.rotation import rotation
from mobilevlm.export.recipes.file import find_recipe

pytestmark = pytest.mark.pure

HADAMARD = [16, 24, 64, 80, 96, 128, 256, 576, 640, 896, 960, 1024, 1152, 1280, 1536, 2048, 2304]
HADAMARD += [2560, 3072]
OTHERS = (1, 7, 18, 92, 500)
"""Sizes that these constructions have no matrix for, or a matrix of one row."""


@pytest.mark.parametrize("size", [*HADAMARD, *OTHERS])
def test_the_matrix_of_a_size_is_orthogonal_and_spreads_every_channel(size: int) -> None:
    matrix = np.kron(*factor_matrices(size))
    assert matrix.shape == (size, size)
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-13
    spread = np.abs(matrix) * np.sqrt(size)
    if size in HADAMARD:
        assert np.abs(spread - 1).max() < 1e-12
    assert spread.max() <= np.sqrt(2) + 1e-12


@pytest.mark.parametrize("size", [24, 92, 576])
def test_inputs_and_outputs_are_rotated_by_one_matrix_and_back(size: int) -> None:
    turn, random = rotation(size), np.random.default_rng(0)
    matrix = turn.signs[:, None] * np.kron(turn.left, turn.right)
    heads = np.kron(np.eye(3), matrix)
    weight = random.standard_normal((3 * size, 3 * size), np.float32)
    np.testing.assert_allclose(turn.of_inputs(weight), weight @ heads, atol=1e-4)
    np.testing.assert_allclose(turn.of_outputs(weight), heads.T @ weight, atol=1e-4)
    np.testing.assert_allclose(turn.of_outputs(weight[:, 0]), heads.T @ weight[:, 0], atol=1e-4)
    for there in (turn.of_inputs, turn.of_outputs):
        np.testing.assert_allclose(there(there(weight), back=True), weight, atol=1e-5)


def test_half_of_the_channels_change_their_sign() -> None:
    """Else the mean of all channels would be one channel."""
    assert 0.4 < (rotation(2048).signs > 0).mean() < 0.6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('lm_head = {precision = "q8", scaling = "rotation"}', "lm_head.scaling: rotation is of"),
        ('tower = {precision = "int8", scaling = "rotation"}', "tower.scaling: rotation is of"),
        ('prefill = {precision = "int8", scaling = "rotation"}', "prefill.scaling: rotation is of"),
        (
            '[layers]\n"decoder.layers.*" = {precision = "q8", scaling = "rotation"}',
            "layers.decoder.layers.*.scaling: rotation is of the decoder as a whole",
        ),
        (
            'decoder = {precision = "qdq8", scaling = "rotation"}',
            "decoder.scaling: rotation goes with fp32, fp16, int8, q8, q4, q2, not with qdq8",
        ),
        (
            'decoder = {precision = "q4", scaling = "rotation"}\n'
            'lm_head = {precision = "q8", scaling = "awq"}',
            "lm_head.scaling: awq has no place beside the decoder's rotation",
        ),
        (
            'decoder = {precision = "q4", scaling = "rotation"}\n'
            'prefill = {precision = "int8", scaling = "smoothquant"}',
            "prefill.scaling: smoothquant has no place beside the decoder's rotation",
        ),
    ],
)
def test_rotation_is_of_the_whole_decoder(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "int8"\n{text}\n')
    with pytest.raises(MobileVLMError) as error:
        find_recipe(str(path))
    assert said in str(error.value) and len(str(error.value)) < 500


def test_the_prefill_graph_of_a_rotated_recipe_is_rotated_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "fast"\n')
    recipe = find_recipe(str(path))
    assert recipe.is_rotated and recipe.for_prefill().is_rotated
    assert recipe.for_prefill().format_of("decoder.lm_head").scaling == "none"
    assert not recipe.without_rotation().for_prefill().is_rotated
