"""Fewer visual tokens: fewer tiles first, then rows of the grid; the number is known before an
image is encoded, and what cannot be made fewer is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import BundleOf, fixture_named
from test_session import picture

import mobilevlm
from mobilevlm.errors import ImageError, MobileVLMError
from mobilevlm.input_spec import Tiled
from mobilevlm.preparation import prepare, with_image_tokens
from mobilevlm.prompt import Prepared, Reduction, Rows, Run, count_rows
from mobilevlm.reduction import pooled_size, reduced, with_fewer_rows


def rows_of(count: int, channels: int = 8, seed: int = 0) -> Rows:
    drawn = np.random.default_rng(seed).standard_normal((count, channels))
    return Rows(drawn.astype(np.float32))


def test_rows_become_means_of_neighbours_in_the_grid() -> None:
    grid = np.arange(16, dtype=np.float32).reshape(16, 1)
    found = reduced(Rows(grid), Reduction((4, 4), (2, 2)))
    assert found.embeds.ravel().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert found.embeds.dtype == np.float32
    found = reduced(Rows(grid), Reduction((4, 4), (1, 3)))  # cells of two columns, one shared
    assert found.embeds.ravel().tolist() == [6.5, 7.5, 8.5]
    rows = rows_of(4 * 6 + 1)
    found = reduced(rows, Reduction((4, 6), (2, 3), behind=1))
    assert found.embeds.shape == (7, 8)
    assert np.array_equal(found.embeds[-1], rows.embeds[-1])  # the newline stays


def test_the_coarser_grid_is_about_as_long_and_wide() -> None:
    assert [pooled_size((12, 12), most) for most in (144, 100, 72, 3, 1)] == [
        (12, 12), (10, 10), (9, 8), (3, 1), (1, 1),
    ]  # fmt: skip
    assert pooled_size((4, 16), 16) == (2, 8)


@pytest.mark.parametrize(
    ("name", "most", "tiles", "rows"),
    [
        ("mobilevlm_v2", 20, None, 20),  # 5 × 4
        ("mobilevlm_v2", 63, None, 63),
        ("mobilevlm_v2", 144, None, 144),
        ("smolvlm2", 20, 5, 20),  # four tiles and the whole: nothing is left to do
        ("smolvlm2", 5, 1, 4),
        ("smolvlm2", 3, 1, 2),
        ("internvl3", 20, 4, 20),
        ("llava_next", 5, 1, 5),  # its newline is one of them
        ("lfm2_vl", 5, 1, 4),
        ("gemma3", 5, None, 4),
    ],
)
def test_tiles_become_fewer_before_rows_do(
    name: str, most: int, tiles: int | None, rows: int
) -> None:
    fixture = fixture_named(name)
    spec = with_image_tokens(fixture.model.spec.image, most)
    if tiles is not None:
        assert isinstance(spec.preparation, Tiled) and spec.preparation.max_tiles == tiles
    whole = prepare(fixture.image, spec)
    image = with_fewer_rows(whole, most)
    assert count_rows(image.pieces) == rows
    assert (image.reduction is None) == (count_rows(whole.pieces) <= most)
    assert (image.digest == whole.digest) == (image.reduction is None)
    marks = [[piece for piece in one.pieces if isinstance(piece, int)] for one in (whole, image)]
    assert marks[0] == marks[1]


@pytest.mark.parametrize(
    ("name", "most", "message"),
    [
        ("qwen3_vl", 64, "encodes images near their own size: use max_image_tokens"),
        ("qwen3_5", 64, "encodes images near their own size: use max_image_tokens"),
        ("blip2", 4, "has 8 queries in place of a grid: leave it out"),
        ("llava_next", 1, "expected 2 or more"),
    ],
)
def test_what_cannot_be_made_fewer_is_one_line(name: str, most: int, message: str) -> None:
    with pytest.raises(MobileVLMError, match=f"image_tokens is {most},.* {message}"):
        with_image_tokens(fixture_named(name).model.spec.image, most)


def test_an_image_without_a_grid_or_made_fewer_already_is_refused() -> None:
    image = Prepared("image", ({"pixels": np.zeros((8, 8, 3), np.uint8)},), (1, Run(7), 2))
    with pytest.raises(ImageError, match="7 visual tokens, which cannot be made 3"):
        with_fewer_rows(image, 3)
    four = with_fewer_rows(Prepared("image", image.arrays, (Run(16),)), 4)
    assert with_fewer_rows(four, 4) is four
    with pytest.raises(ImageError, match="4 visual tokens, which cannot be made 2"):
        with_fewer_rows(four, 2)


@pytest.mark.parametrize(
    ("name", "most"), [("tiny", 9), ("smolvlm2", 3), ("llava_next", 5), ("gemma3", 4)]
)
def test_a_model_answers_from_so_many_visual_tokens(
    name: str, most: int, bundle_of: BundleOf, tmp_path: Path
) -> None:
    bundle = bundle_of(name, "fp32")
    with mobilevlm.load(bundle) as vlm:
        given = [picture(1, vlm)] if name == "tiny" else fixture_named(name).images[:1]
        whole = vlm.generate("What is it?", given, max_new_tokens=3)
        rows = vlm.encode_image(given[0])
        if name != "tiny":
            rows = vlm.encode_image(vlm.prepare_image(given[0], max_tiles=1) if name != "gemma3"
                                    else given[0])  # fmt: skip
        many = vlm.prepare_image(given[0])
    answers = []
    for _ in range(2):
        with mobilevlm.load(bundle, image_tokens=most, cache_dir=tmp_path) as vlm:
            answers.append(vlm.generate("What is it?", given, max_new_tokens=3, logprobs=True))
            made = vlm.prepare_image(given[0])
            assert made.reduction is not None
            expected = reduced(Rows(rows), made.reduction).embeds
            assert np.array_equal(vlm.encode_image(given[0]), expected)
            assert np.array_equal(vlm.encode_image(made), expected)
            vlm.check_fits("What is it?", [given[0]] * 2)
            if len(many.arrays) == 1:
                assert vlm.prepare_image(many).digest == made.digest
    assert [answer.visual_tokens for answer in answers] == [len(expected)] * 2
    assert len(expected) <= most < whole.visual_tokens
    assert answers[0].logprobs == answers[1].logprobs
    assert [answer.reused.images for answer in answers] == [0, 1]


def test_a_number_that_keeps_all_tokens_changes_nothing(bundle_of: BundleOf) -> None:
    bundle, answers = bundle_of("tiny", "int8"), []
    for most in (None, 144, 10**6):
        with mobilevlm.load(bundle, image_tokens=most) as vlm:
            answers.append(
                vlm.generate("What is it?", [picture(1, vlm)], max_new_tokens=3, logprobs=True)
            )
    assert answers[0].logprobs == answers[1].logprobs == answers[2].logprobs
