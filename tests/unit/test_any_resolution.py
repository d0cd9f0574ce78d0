"""Images as tiles of the best of several grids, their visual tokens as one grid (LLaVA-NeXT)."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from mobilevlm.assembly import assemble, resize_bilinear
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.errors import ImageError
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import AnyResolution, FixedImage, InputSpec
from mobilevlm.media.any_resolution import best_grid, image_assembly
from mobilevlm.plain_types import from_dict, to_dict
from mobilevlm.preparation import (
    fewest_pieces,
    most_pieces,
    most_runs,
    pieces_of,
    prepare,
    with_max_tiles,
)
from mobilevlm.prompt import Assembly, Rows, count_rows
from mobilevlm.reference.assembly import assemble_rows
from mobilevlm.runtime.memory.estimate import image_bytes

MEAN, STD = (0.5, 0.25, 0.1), (0.5, 0.5, 0.5)
NEXT = AnyResolution(28, ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)), MEAN, STD)
SIDES = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))
ONEVISION = AnyResolution(28, SIDES, MEAN, STD, most_tiles=9, several="square")


def image_input(preparation: AnyResolution, side: int = 4) -> InputSpec:
    tower = TransformerEncoder(8, 16, 1, 2, 28, 28 // side, "quick_gelu", 1e-5)
    connector = ConnectorSpec("mlp", 8, 12, 2, side, side, newline=True)
    return InputSpec(preparation, tower, connector)


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def tile_rows(assembly: Assembly, hidden: int = 12) -> list[Rows]:
    random = np.random.default_rng(3)
    shape = (assembly.side**2 + 1, hidden)
    parts = [random.standard_normal(shape, np.float32) for _ in range(assembly.runs)]
    for part in parts:
        part[-1] = parts[0][-1]
    return [Rows(part) for part in parts]


def test_the_grid_keeps_most_of_the_image_then_wastes_least_then_is_the_first() -> None:
    assert best_grid((100, 50), NEXT) == (1, 2)
    assert best_grid((50, 100), NEXT) == (2, 1)
    assert best_grid((60, 60), NEXT) == (2, 2)
    assert best_grid((300, 20), NEXT) == (1, 3)
    # 28 × 28 pixels fit into all whole: the smallest canvas, of equal ones the first.
    assert best_grid((28, 28), NEXT) == (1, 2)
    assert best_grid((28, 28), replace(NEXT, grids=NEXT.grids[::-1])) == (2, 1)


def test_the_whole_comes_first_then_tiles_of_a_canvas_with_black_around_the_image() -> None:
    whole = picture(50, 41)
    image = prepare(whole, image_input(NEXT))
    bicubic = Image.Resampling.BICUBIC
    first, *tiles = [arrays["pixels"] for arrays in image.arrays]
    assert np.array_equal(first, np.asarray(whole.resize((28, 28), bicubic)))
    canvas = np.zeros((56, 56, 3), np.uint8)
    height = 46  # ceil(41 · 56 / 50)
    canvas[5 : 5 + height] = np.asarray(whole.resize((56, height), bicubic))
    found = np.block([[[tiles[0]], [tiles[1]]], [[tiles[2]], [tiles[3]]]])
    rows = [np.concatenate(tiles[:2], axis=1), np.concatenate(tiles[2:], axis=1)]
    assert found.size == canvas.size
    assert np.array_equal(np.concatenate(rows), canvas)


def test_rows_that_only_padding_made_are_left_out_by_the_images_own_size() -> None:
    assembly = image_assembly((50, 41), NEXT, 4)
    assert assembly == Assembly(4, (2, 2), (1, 0), (6, 8))  # 41 · 8 / 50 = 6.56: 6 of 8 rows
    assert image_assembly((41, 50), NEXT, 4) == Assembly(4, (2, 2), (0, 1), (8, 6))
    assert assembly.rows == 16 + 6 * (8 + 1)
    assert count_rows(pieces_of(picture(50, 41), image_input(NEXT))) == assembly.rows


def test_a_side_that_is_whole_but_for_rounding_is_cut_as_each_code_cuts_it() -> None:
    """55 · (48 / 176) is 15 in exact numbers and a little less in floating point: the hub rounds
    to 7 digits first, LLaVA's own code does not."""
    assert 14.999999 < 55 * (48 / 176) < 15
    hub = replace(NEXT, size=336)
    assert image_assembly((176, 55), hub, 24) == Assembly(24, (1, 2), (4, 0), (16, 48))
    own = replace(hub, rounding=False)
    assert image_assembly((176, 55), own, 24) == Assembly(24, (1, 2), (5, 0), (14, 48))


@pytest.mark.parametrize("most_tiles", [0, 9])
@pytest.mark.parametrize("size", [(400, 267), (100, 900), (31, 30), (2000, 3), (7, 7)])
def test_both_implementations_put_tiles_together_alike(
    size: tuple[int, int], most_tiles: int
) -> None:
    anyres = replace(ONEVISION, most_tiles=most_tiles)
    assembly = image_assembly(size, anyres, 5)
    parts = tile_rows(assembly)
    found = assemble(parts, assembly).embeds
    exact = assemble_rows([torch.from_numpy(part.embeds) for part in parts], assembly)
    assert found.shape == (assembly.rows, 12)
    assert np.abs(found - exact.numpy()).max() <= 1e-6


def test_grids_of_many_tokens_shrink_as_torch_interpolates() -> None:
    grid: NDArray[np.float32] = np.random.default_rng(1).standard_normal((21, 17, 3), np.float32)
    for height, width in ((13, 11), (21, 5), (40, 17), (1, 1)):
        found = resize_bilinear(grid, height, width)
        tensor = torch.from_numpy(grid).permute(2, 0, 1)[None]
        exact = F.interpolate(tensor, (height, width), mode="bilinear")[0].permute(1, 2, 0)
        assert np.abs(found - exact.numpy()).max() <= 1e-6


def test_rows_without_an_assembly_stand_one_behind_the_other() -> None:
    parts = [
        Rows(np.full((2, 3), value, np.float32), (np.ones((2, 3), np.float32),)) for value in (1, 2)
    ]
    rows = assemble(parts)
    assert rows.embeds[:, 0].tolist() == [1, 1, 2, 2]
    assert rows.deep[0].shape == (4, 3)
    assert assemble(parts[:1]) is parts[0]


def test_images_of_a_prompt_with_several_are_one_padded_tile_each_where_the_model_says_so() -> None:
    spec = image_input(ONEVISION)
    image = prepare(picture(28, 14), spec, images=2)
    assert image.assembly == Assembly(4, (0, 0)) and count_rows(image.pieces) == 17
    (arrays,) = image.arrays
    assert (arrays["pixels"][:7] == (127, 63, 25)).all()  # int(255 · mean)
    assert np.array_equal(arrays["pixels"][7:21], np.asarray(picture(28, 14)))
    rows = tile_rows(Assembly(4, (0, 0)))
    assert np.array_equal(assemble(rows, image.assembly).embeds, rows[0].embeds)
    assert len(prepare(picture(28, 14), image_input(NEXT), images=2).arrays) > 1


def test_fewer_tiles_leave_smaller_grids_and_one_leaves_a_padded_square() -> None:
    whole, spec = picture(170, 90), image_input(ONEVISION)
    assert prepare(whole, spec).assembly == image_assembly((170, 90), ONEVISION, 4)
    few = prepare(whole, with_max_tiles(spec, 4))
    assert few.assembly is not None and few.assembly.tiles == (2, 2)
    assert count_rows(most_pieces(with_max_tiles(spec, 4))) < count_rows(most_pieces(spec))
    for limited in (with_max_tiles(spec, 1), with_max_tiles(image_input(NEXT), 1)):
        one = prepare(whole, limited)
        assert one.assembly == Assembly(4, (0, 0))
        assert one.pieces == pieces_of(whole, limited) == most_pieces(limited)
        square = prepare(whole, spec, images=2).arrays[0]["pixels"]
        assert np.array_equal(one.arrays[0]["pixels"], square)
        assert prepare(one, limited) is one


def test_an_image_in_tiles_is_refused_where_several_are_squares() -> None:
    spec = image_input(ONEVISION)
    alone = prepare(picture(28, 14), spec)
    assert prepare(alone, spec) is alone
    with pytest.raises(ImageError, match="prepare it with images=2"):
        prepare(alone, spec, images=2)


def test_an_image_prepared_for_another_model_is_refused() -> None:
    alone = prepare(picture(28, 14), image_input(ONEVISION))
    for other in (image_input(NEXT), image_input(ONEVISION, side=2)):
        with pytest.raises(ImageError, match="another model"):
            prepare(alone, other)
    with pytest.raises(ImageError, match="another model"):
        prepare(replace(alone, assembly=None), image_input(ONEVISION))


def test_equal_tiles_that_are_put_together_otherwise_have_other_digests() -> None:
    spec = image_input(NEXT)
    black = [prepare(Image.new("RGB", size), spec) for size in ((100, 99), (100, 60))]
    assert [len(image.arrays) for image in black] == [5, 5]
    assert black[0].digest != black[1].digest


@pytest.mark.parametrize("anyres", [NEXT, ONEVISION])
@pytest.mark.parametrize("side", [3, 4, 9])
def test_the_fewest_and_most_pieces_bound_those_of_all_images(
    anyres: AnyResolution, side: int
) -> None:
    spec = image_input(anyres, side)
    sizes = [(width, height) for width in range(1, 400, 7) for height in range(1, 400, 9)]
    sizes += [(1 << 20, 1), (1, 1 << 20)]
    sizes += [(columns * 28, rows * 28) for rows, columns in anyres.grids]
    counts = [image_assembly(size, anyres, side).rows for size in sizes]
    assert count_rows(fewest_pieces(spec)) <= min(counts)
    assert max(counts) <= count_rows(most_pieces(spec)) <= 1.1 * max(counts)


def test_the_spec_of_any_resolution_is_stored_and_read() -> None:
    assert from_dict(AnyResolution, to_dict(ONEVISION), "manifest") == ONEVISION


def test_memory_estimates_count_the_tiles_that_are_held_at_once() -> None:
    spec = image_input(ONEVISION)
    most = count_rows(most_pieces(spec))
    assert most_runs(spec) == 37
    assert image_bytes(spec) == 4 * 12 * (37 * 16 + most) + 8 * 37 * 28 * 28
    assert image_bytes(with_max_tiles(spec, 4)) < image_bytes(spec)
    assert image_bytes(with_max_tiles(spec, 1)) == 2 * 4 * 12 * 17 + 3 * 28 * 28
    plain = FixedImage(28, 28, "pad", MEAN, STD)
    assert image_bytes(replace(spec, preparation=plain)) == 2 * 4 * 12 * 16 + 3 * 28 * 28


def test_runs_are_asked_for_one_by_one() -> None:
    assembly = image_assembly((400, 267), ONEVISION, 4)
    parts = tile_rows(assembly)
    held: list[weakref.ref[Rows]] = []

    def runs() -> Iterator[Rows]:
        for part in parts:
            rows = Rows(part.embeds.copy())
            assert sum(there() is not None for there in held) <= 2
            held.append(weakref.ref(rows))
            yield rows

    assert np.array_equal(assemble(runs(), assembly).embeds, assemble(parts, assembly).embeds)
