"""Images near their own size, and larger ones as tiles with the whole made small behind them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import fixture_named
from PIL import Image

from mobilevlm.errors import ImageError
from mobilevlm.image import read_resized
from mobilevlm.input_spec import DynamicTiles, InputSpec
from mobilevlm.preparation import (
    fewest_pieces,
    most_pieces,
    most_runs,
    pieces_of,
    prepare,
    with_max_tiles,
)
from mobilevlm.prompt import Run, count_positions, count_rows

ONE_TILE = 4
"""Visual tokens of a tile of the reference data: 64 × 64 pixels."""


@pytest.fixture(scope="module")
def spec() -> InputSpec:
    return fixture_named("lfm2_vl").model.spec.image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def tiles_of(spec: InputSpec) -> DynamicTiles:
    assert isinstance(spec.preparation, DynamicTiles)
    return spec.preparation


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((400, 267), (192, 128)),
        ((64, 64), (64, 64)),
        ((31, 57), (96, 64)),
        ((1000, 3), (128, 32)),
        ((640, 1500), (32, 128)),
        ((200, 100), (512, 512)),
    ],
)
def test_pixels_are_resized_as_by_torch(before: tuple[int, int], after: tuple[int, int]) -> None:
    """Images of noise, and of black and white, whose sums are the largest."""
    for seed, image in enumerate((picture(*before), picture(*before, 1).point(lambda v: v & 255))):
        pixels = np.asarray(image)
        if seed:
            pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
        given = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(
            given, after[::-1], mode="bilinear", antialias=True
        )
        found = read_resized(Image.fromarray(pixels), lambda _: after, "torch_bilinear")
        assert np.array_equal(np.asarray(found), expected[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("size", "grid", "whole"),
    [
        # By the official code: split above 2.0 × 8 × 32² = 16384 pixels in multiples of 32.
        ((10, 10), None, (64, 64)),
        ((128, 128), None, (64, 64)),  # 16384: not above
        ((160, 128), (3, 3), (96, 64)),
        ((400, 267), (2, 3), (96, 64)),
        ((267, 400), (3, 2), (64, 96)),
        ((2000, 100), (1, 10), (384, 32)),
        ((100, 100), None, (64, 64)),
    ],
)
def test_layouts_are_the_official_ones(
    size: tuple[int, int], grid: tuple[int, int] | None, whole: tuple[int, int], spec: InputSpec
) -> None:
    image = prepare(picture(*size), spec)
    shapes = [arrays["pixels"].shape for arrays in image.arrays]
    assert shapes[-1] == (whole[1], whole[0], 3)
    rows = whole[0] * whole[1] // 32**2
    begin, end = spec.layout.begin_ids, spec.layout.end_ids
    if grid is None:
        assert shapes[:-1] == []
        assert image.pieces == (*begin, Run(rows), *end)
        return
    assert shapes[:-1] == [(64, 64, 3)] * (grid[0] * grid[1])
    marks = [
        spec.layout.tile_ids[row][column] for row in range(grid[0]) for column in range(grid[1])
    ]
    parts = [piece for mark in marks for piece in (*mark, Run(ONE_TILE))]
    assert image.pieces == (*begin, *parts, *spec.layout.thumbnail_ids, Run(rows), *end)


@pytest.mark.parametrize("limit", [10, 4, 1])
def test_every_image_is_between_the_fewest_and_the_most_positions(
    limit: int, spec: InputSpec
) -> None:
    limited = with_max_tiles(spec, limit)
    least, most = (count_positions(end(limited)) for end in (fewest_pieces, most_pieces))
    random = np.random.default_rng(5)
    for edges in random.integers(1, 900, (60, 2)):
        size = (int(edges[0]), int(edges[1]))
        if max(size) > 200 * min(size):
            continue
        image = prepare(picture(*size), limited)
        assert least <= count_positions(image.pieces) <= most, size
        assert len(image.arrays) <= most_runs(limited)
        pixels = sum(arrays["pixels"][..., 0].size for arrays in image.arrays)
        assert count_rows(image.pieces) == pixels // 32**2
        assert pieces_of(picture(*size), limited) == image.pieces
        assert prepare(image, limited) is image


def test_no_small_whole_where_the_checkpoint_has_none(spec: InputSpec) -> None:
    without = replace(spec, preparation=replace(tiles_of(spec), thumbnail=False))
    assert len(prepare(picture(400, 267), without).arrays) == 6
    assert len(prepare(picture(40, 26), without).arrays) == 1  # not split: itself


def test_an_image_too_long_or_prepared_for_another_model_is_refused(spec: InputSpec) -> None:
    with pytest.raises(ImageError, match="up to 200 times as long as wide"):
        prepare(picture(2010, 10), spec)
    whole = tiles_of(spec).whole
    other = replace(tiles_of(spec), whole=replace(whole, patch_size=14), size=56)
    image = prepare(picture(40, 26), replace(spec, preparation=other))
    with pytest.raises(ImageError, match="prepared for another model"):
        prepare(image, spec)
