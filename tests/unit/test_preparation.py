"""Images of any size, and sound, as arrays and pieces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import fixture_named
from numpy.typing import NDArray
from PIL import Image

from mobilevlm.audio import log_mel, mel_filters, prepare_sound
from mobilevlm.audio_encoder import WhisperEncoder
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.errors import AudioError, AudioWarning, ImageError, MobileVLMError
from mobilevlm.image import Room
from mobilevlm.input_spec import AspectTiles, DynamicImage, InputSpec, LayoutSpec, Mel, Tiles
from mobilevlm.media.aspect_tiles import aspect_pieces
from mobilevlm.media.dynamic_image import resized
from mobilevlm.media.tiles import tile_pieces
from mobilevlm.plain_types import from_dict, to_dict
from mobilevlm.preparation import (
    fewest_pieces,
    most_pieces,
    pieces_of,
    prepare,
    with_max_tiles,
)
from mobilevlm.prompt import Run, count_positions, count_rows

HALF = (0.5, 0.5, 0.5)
TILES = Tiles(size=32, longest_edge=128, mean=HALF, std=HALF)
DYNAMIC = DynamicImage(14, 2, 4 * 28 * 28, 64 * 28 * 28, HALF, HALF)
MARKS = LayoutSpec(
    end_ids=(9,),
    tile_ids=tuple(tuple((100 + 10 * row + column,) for column in range(4)) for row in range(4)),
    row_end_ids=(5,),
    between_ids=(6,),
    thumbnail_ids=(7, 8),
)


def image_input(preparation: Any, layout: LayoutSpec = MARKS) -> InputSpec:
    image = fixture_named("mobilevlm_v2").model.spec.image
    return replace(image, preparation=preparation, layout=layout)


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def test_tiles_stand_row_by_row_between_their_marks_and_the_small_image_last() -> None:
    spec = image_input(TILES)
    run = Run(spec.connector.num_tokens)
    image = prepare(picture(256, 100), spec)
    assert image.pieces == (
        100, run, 101, run, 102, run, 103, run, 5,
        110, run, 111, run, 112, run, 113, run, 6, 7, 8, run, 9,
    )  # fmt: skip
    assert [arrays["pixels"].shape for arrays in image.arrays] == [(32, 32, 3)] * 9
    first = prepare(picture(256, 100), image_input(replace(TILES, thumbnail="first")))
    assert first.pieces[:4] == (7, 8, run, 6)
    assert np.array_equal(first.arrays[0]["pixels"], image.arrays[-1]["pixels"])
    assert np.array_equal(first.arrays[1]["pixels"], image.arrays[0]["pixels"])
    none = prepare(picture(256, 100), image_input(replace(TILES, thumbnail="none")))
    assert none.pieces == (*image.pieces[:17], 9)


def test_tiles_are_those_of_the_official_three_resizes() -> None:
    """Idefics3ImageProcessor of transformers, spelled out: each result is rounded to uint8."""
    whole = picture(256, 100)
    lanczos = Image.Resampling.LANCZOS
    once = whole.resize((128, 50), lanczos)
    twice = once.resize((128, 64), lanczos)
    found = prepare(whole, image_input(TILES)).arrays
    for index, arrays in enumerate(found[:-1]):
        row, column = divmod(index, 4)
        part = twice.crop((column * 32, row * 32, column * 32 + 32, row * 32 + 32))
        assert np.array_equal(arrays["pixels"], np.asarray(part)), index
    assert np.array_equal(found[-1]["pixels"], np.asarray(twice.resize((32, 32), lanczos)))


def test_an_image_that_is_one_tile_is_the_small_image_alone() -> None:
    spec = image_input(replace(TILES, longest_edge=32))
    image = prepare(picture(32, 32), spec)
    assert len(image.arrays) == 1
    assert image.pieces == (7, 8, Run(spec.connector.num_tokens), 9)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (31, 33), (129, 127), (640, 480)])
def test_images_of_any_shape_become_whole_tiles_and_as_many_rows_as_said_before(
    size: tuple[int, int],
) -> None:
    spec = image_input(TILES, LayoutSpec())
    image = prepare(picture(*size), spec)
    assert all(arrays["pixels"].shape == (32, 32, 3) for arrays in image.arrays)
    assert count_rows(image.pieces) == len(image.arrays) * spec.connector.num_tokens
    assert image.pieces == tile_pieces(size, TILES, spec) == pieces_of(picture(*size), spec)
    least, most = (count_positions(end(spec)) for end in (fewest_pieces, most_pieces))
    assert least <= count_positions(image.pieces) <= most
    assert most == 17 * spec.connector.num_tokens


@pytest.mark.parametrize(
    ("most", "size", "tiles"),
    [
        (1, (256, 100), 1),
        (4, (256, 100), 2),  # 128 × 50 is 8 tiles, 96 × 38 is 6, 64 × 26 is 2
        (6, (256, 100), 6),
        (8, (256, 100), 8),
        (100, (256, 100), 8),
        (3, (100, 100), 1),  # 2 × 2 would be one too many
        (4, (100, 100), 4),
        (2, (10, 900), 2),
    ],
)
def test_no_more_tiles_than_asked_for(most: int, size: tuple[int, int], tiles: int) -> None:
    spec = with_max_tiles(image_input(TILES), most)
    image = prepare(picture(*size), spec)
    assert len(image.arrays) == tiles + (tiles > 1)
    assert isinstance(spec.preparation, Tiles)
    assert image.pieces == tile_pieces(size, spec.preparation, spec)


def test_an_image_that_is_not_split_is_resized_to_the_longest_edge_first() -> None:
    """``do_image_splitting`` off in the official processor."""
    lanczos = Image.Resampling.LANCZOS
    once = picture(256, 100).resize((128, 50), lanczos)
    (found,) = prepare(picture(256, 100), with_max_tiles(image_input(TILES), 1)).arrays
    assert np.array_equal(found["pixels"], np.asarray(once.resize((32, 32), lanczos)))


def test_fewer_tiles_are_those_of_a_smaller_longest_edge() -> None:
    fewer = prepare(picture(256, 100), with_max_tiles(image_input(TILES), 7))
    smaller = prepare(picture(256, 100), image_input(replace(TILES, longest_edge=96)))
    assert fewer.digest == smaller.digest and fewer.pieces == smaller.pieces


@pytest.mark.parametrize("most", range(1, 18))
@pytest.mark.parametrize("tile", [27, 32])
def test_the_fewest_and_the_most_pieces_are_those_of_some_image(most: int, tile: int) -> None:
    tiles = replace(TILES, size=tile, longest_edge=4 * tile)
    spec = with_max_tiles(image_input(tiles), most)
    limited = spec.preparation
    assert isinstance(limited, Tiles)
    sizes = [(width, height) for width in range(1, 42, 2) for height in range(1, 42)]
    found = {count_positions(tile_pieces(size, limited, spec)) for size in sizes}
    assert count_positions(fewest_pieces(spec)) == min(found)
    assert count_positions(most_pieces(spec)) == max(found)


def test_fewer_tiles_than_a_checkpoint_has_may_be_asked_for_but_not_more() -> None:
    own = image_input(replace(TILES, max_tiles=4))
    asked = [with_max_tiles(own, most).preparation for most in (2, 9)]
    assert asked == [replace(TILES, max_tiles=2), own.preparation]
    aspect = image_input(replace(ASPECT, min_tiles=3))
    assert with_max_tiles(aspect, 2).preparation == replace(ASPECT, min_tiles=2, max_tiles=2)
    assert len(prepare(picture(300, 100), with_max_tiles(aspect, 1)).arrays) == 1
    with pytest.raises(MobileVLMError, match=r"max_tiles is 2, but .* not split.*dynamic_image"):
        with_max_tiles(image_input(DYNAMIC), 2)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((280, 140), (280, 140)),
        ((1, 1), (56, 56)),  # the least: four tokens
        ((100, 45), (112, 56)),  # 3.6 and 1.6 factors round to 4 and 2
        ((70, 98), (56, 112)),  # 2.5 to 2, 3.5 to 4: half to even
        ((4000, 3000), (252, 168)),
        ((1, 200), (28, 812)),
    ],
)
def test_a_dynamic_image_has_the_official_size(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    """``smart_resize`` of Qwen2-VL's image processor, worked out by hand."""
    assert resized(size, DYNAMIC) == expected
    image = prepare(picture(*size), image_input(DYNAMIC))
    assert image.arrays[0]["pixels"].shape == (expected[1], expected[0], 3)
    rows, columns = expected[1] // 28, expected[0] // 28
    assert image.pieces == (Run(rows * columns, (1, rows, columns)), 9)


def test_a_dynamic_image_that_is_a_needle_is_refused_in_one_line() -> None:
    with pytest.raises(ImageError, match=r"image of 1 × 201 pixels.*200 times as long as wide"):
        prepare(picture(1, 201), image_input(DYNAMIC))


def test_the_fewest_and_the_most_positions_of_dynamic_images() -> None:
    spec = image_input(DYNAMIC, LayoutSpec())
    assert [count_rows(end(spec)) for end in (fewest_pieces, most_pieces)] == [4, 64]


@pytest.mark.parametrize("preparation", [TILES, DYNAMIC])
def test_an_image_that_memory_cannot_hold_is_refused_before_it_is_decoded(
    preparation: Any, tmp_path: Any
) -> None:
    picture(2000, 1500).save(tmp_path / "large.png")
    with pytest.raises(ImageError, match="memory"):
        prepare(tmp_path / "large.png", image_input(preparation), lambda _: Room(1e6, "a test"))


def test_an_image_that_was_prepared_for_another_model_is_refused() -> None:
    spec, image = image_input(TILES), picture(256, 100)
    ready = prepare(image, spec)
    assert prepare(ready, spec) is ready
    fewer = replace(spec.connector, out_grid=2)
    for other in (image_input(replace(TILES, size=16)), replace(spec, connector=fewer)):
        with pytest.raises(ImageError, match="prepared for another model"):
            prepare(ready, other)
    sound = prepare_sound((tone(440, 1), 16_000), sound_input())
    with pytest.raises(ImageError, match="prepared for another model"):
        prepare(sound, spec)


def test_the_digest_tells_images_tiles_and_arrays_apart() -> None:
    one, other = picture(256, 100), picture(100, 256)
    spec = image_input(TILES)
    digests = {prepare(image, spec).digest for image in (one, other, one.rotate(180))}
    assert len(digests) == 3
    assert prepare(one, spec).digest in digests


@pytest.mark.parametrize("preparation", [TILES, DYNAMIC, Mel(bins=128)])
def test_a_preparation_is_read_back_by_its_kind(preparation: Any) -> None:
    spec = image_input(preparation)
    assert from_dict(InputSpec, to_dict(spec), "spec") == spec


@pytest.mark.parametrize("kind", ["mosaic", None, 3, ["tiles"]])
def test_an_unknown_kind_of_preparation_is_named_in_one_line(kind: Any) -> None:
    data = to_dict(image_input(TILES))
    data["preparation"]["kind"] = kind
    with pytest.raises(MobileVLMError) as caught:
        from_dict(InputSpec, data, "spec")
    squares = ("fixed_image", "tiles", "aspect_tiles", "any_resolution")
    kinds = (*squares, "dynamic_image", "dynamic_tiles")
    expected = f"expected the kind {' or '.join(map(repr, (*kinds, 'llama.cpp', 'mel')))}"
    assert str(caught.value) == f"spec.preparation: {expected}, found {kind!r}"


# Sound

MEL = Mel(bins=80)


def tone(hertz: float, seconds: float) -> NDArray[np.float32]:
    places = np.arange(int(seconds * MEL.sampling_rate)) / MEL.sampling_rate
    return (0.5 * np.sin(2 * np.pi * hertz * places)).astype(np.float32)


@pytest.mark.parametrize("hertz", [220.0, 700.0, 1600.0, 5000.0])
def test_a_tone_is_loudest_in_the_bin_of_its_pitch_and_silence_is_the_floor(hertz: float) -> None:
    found = log_mel(np.concatenate([tone(hertz, 15), np.zeros(15 * 16_000, np.float32)]), MEL)
    assert found.shape == (80, 3000) and found.dtype == np.float32
    # Slaney's scale: 15 mels up to 1000 Hz, then 27 for each factor of 6.4; 82 edges up to 8 kHz.
    mel = hertz * 3 / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)
    top = 15 + 27 * np.log(8) / np.log(6.4)
    assert abs(found[:, 700].argmax() + 1 - mel / top * 81) <= 1
    assert found[:, 2000:].max() == found.min() == pytest.approx(found.max() - 2)


def test_mel_filters_have_equal_area() -> None:
    fine = replace(MEL, fft=MEL.sampling_rate)  # a frequency for each hertz
    assert np.allclose(mel_filters(fine).sum(axis=1), np.ones(80), atol=1e-3)


def test_the_spectrum_is_that_of_a_sum_of_cosines_spelled_out() -> None:
    short = Mel(bins=4, sampling_rate=80, window=8, hop=4, frames=5, fft=8)
    samples = np.random.default_rng(0).uniform(-1, 1, 20).astype(np.float32)
    padded = [float(samples[abs(n) if n < 20 else 38 - n]) for n in range(-4, 24)]
    expected = np.zeros((4, 5))
    for frame in range(5):
        for k in range(5):
            terms = [
                padded[4 * frame + n] * np.sin(np.pi * n / 8) ** 2 * np.exp(-2j * np.pi * k * n / 8)
                for n in range(8)
            ]
            expected[:, frame] += mel_filters(short)[:, k] * abs(sum(terms)) ** 2
    decades = np.log10(np.maximum(expected, 1e-10))
    expected = (np.maximum(decades, decades.max() - 8) + 4) / 4
    assert np.allclose(log_mel(samples, short), expected, atol=1e-5)


def sound_input(mel: Mel = MEL, factor: int = 4, **traits: Any) -> InputSpec:
    """Input with Whisper's encoder."""
    encoder = WhisperEncoder(mel.bins, 8, 16, 1, 2, mel.frames // 2, **traits)
    connector = ConnectorSpec("stack", 8, 16, 2, 0, 0, factor=factor)
    return InputSpec(mel, encoder, connector, MARKS)


CUT = sound_input(replace(MEL, windows="first"), 1, pooling=2, cut=True)


def test_a_sound_takes_a_run_for_each_window_and_the_last_is_filled_with_silence() -> None:
    spec, run = sound_input(), Run(375)
    sound = prepare_sound((tone(440, 61), 16_000), spec)
    assert sound.pieces == (run, run, run, 9)
    assert [arrays["mel"].shape for arrays in sound.arrays] == [(80, 3000)] * 3
    whole = log_mel(np.pad(tone(440, 61), (0, 29 * 16_000)), MEL)
    assert np.array_equal(np.concatenate([arrays["mel"] for arrays in sound.arrays], 1), whole)
    assert sound.digest != prepare_sound((tone(441, 61), 16_000), spec).digest
    assert prepare_sound(sound, spec) is sound


@pytest.mark.parametrize("samples", [640, 641, 1600, 37_920, 479_840, 479_841, 480_000])
def test_a_cut_sound_has_the_frames_that_its_positions_read_and_one_more(samples: int) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
    sound = prepare_sound((noise, 16_000), CUT)
    frames = -(-samples // 160)
    positions = (frames - 1) // 2 + 1
    assert sound.pieces == (Run((positions - 2) // 2 + 1), 9)
    [mel] = (arrays["mel"] for arrays in sound.arrays)
    assert mel.shape == (80, 2 * positions + 1)
    whole = np.pad(log_mel(np.pad(noise, (0, 480_000 - samples)), MEL), ((0, 0), (0, 1)))
    assert np.array_equal(mel, whole[:, : mel.shape[1]])


def test_of_a_sound_longer_than_the_one_window_the_rest_is_named_in_a_warning() -> None:
    with pytest.warns(AudioWarning, match="31.0 s, of which this model hears the first 30 s"):
        sound = prepare_sound((tone(440, 31), 16_000), CUT)
    assert np.array_equal(
        sound.arrays[0]["mel"],
        prepare_sound((tone(440, 31)[:480_000], 16_000), CUT).arrays[0]["mel"],
    )


def test_silence_is_a_sound() -> None:
    [mel] = (
        run["mel"] for run in prepare_sound((np.zeros(16_000, np.float32), 16_000), CUT).arrays
    )
    assert (mel == -1.5).all()


def test_a_sound_at_another_rate_has_the_features_of_its_own_pitch() -> None:
    places = np.arange(44_100) / 44_100
    other = (0.5 * np.sin(2 * np.pi * 440 * places)).astype(np.float32)
    found = prepare_sound((other, 44_100), CUT).arrays[0]["mel"]
    expected = prepare_sound((tone(440, 1), 16_000), CUT).arrays[0]["mel"]
    loud = expected > expected.max() - 1  # the four loudest decades
    assert np.abs(found - expected)[loud].max() <= 0.01


@pytest.mark.parametrize(
    ("samples", "rate", "told"),
    [
        (np.zeros(0, np.float32), 16_000, "without samples"),
        (np.zeros((2, 100, 2), np.float32), 16_000, r"shape \(2, 100, 2\)"),
        (np.array([0.0, np.nan] * 1000, np.float32), 16_000, "infinite or no numbers"),
        (np.zeros(300, np.float32), 16_000, "0.019 s is too short"),
        (np.zeros(300, np.float32), 10, "10 samples in a second"),
    ],
)
def test_a_sound_that_is_none_is_refused_in_one_line(
    samples: NDArray[np.float32], rate: int, told: str
) -> None:
    with pytest.raises(AudioError, match=told) as caught:
        prepare_sound((samples, rate), CUT)
    assert "\n" not in str(caught.value)


def test_an_hour_of_sound_is_refused_by_the_context_before_it_is_read() -> None:
    hour = np.broadcast_to(np.zeros(1, np.int16), 3600 * 16_000)
    told = (
        r"a sound of 3600.0 s takes 45001 positions, and the context has room for 8000 beside the "
        r"rest of the prompt, 630.0 s of it"
    )
    with pytest.raises(AudioError, match=told):
        prepare_sound((hour, 16_000), sound_input(), positions=8000)
    with pytest.raises(AudioError, match=r"room for 10 beside .*, none of it"):
        prepare_sound((hour, 16_000), sound_input(), positions=10)


def test_a_sound_that_memory_cannot_hold_is_refused_before_it_is_read() -> None:
    with pytest.raises(AudioError, match=r"60.0 s takes 38 MB of memory, a test leaves 1 MB"):
        source = (np.broadcast_to(np.zeros(1, np.int16), 960_000), 16_000)
        prepare_sound(source, sound_input(), room_for=lambda _: Room(1e6, "a test"))


def test_a_sound_that_was_prepared_for_another_model_is_refused() -> None:
    sound = prepare_sound((tone(440, 1), 16_000), CUT)
    for other in (sound_input(), sound_input(Mel(bins=128))):
        with pytest.raises(AudioError, match="prepared for another model"):
            prepare_sound(sound, other)


def test_an_input_for_sound_takes_no_images() -> None:
    with pytest.raises(ImageError, match="'mel' takes no images"):
        prepare(picture(3, 3), image_input(MEL))


def test_an_encoder_for_squares_does_not_take_images_that_keep_their_shape() -> None:
    with pytest.raises(MobileVLMError, match="dynamic_image"):
        _ = image_input(DYNAMIC).square


ASPECT = AspectTiles(size=32, min_tiles=1, max_tiles=12, mean=HALF, std=HALF)
AROUND = LayoutSpec(begin_ids=(1,), end_ids=(2,))


@pytest.mark.parametrize(
    "size, grid",
    [
        ((32, 32), (1, 1)),
        ((300, 200), (2, 3)),
        ((200, 300), (3, 2)),
        ((1000, 20), (1, 12)),
        ((45, 45), (1, 1)),  # 2025 pixels, not more than half of 2 × 2 tiles
        ((46, 46), (2, 2)),  # 2116, more than half of 4096
        ((60, 30), (1, 2)),
        ((100, 50), (2, 4)),  # 5000, more than half of 8192
        ((96, 96), (3, 3)),
    ],
)
def test_the_grid_has_the_nearest_shape_and_the_larger_one_only_for_a_large_image(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    spec, (rows, columns) = image_input(ASPECT, AROUND), grid
    image = prepare(picture(*size), spec)
    count = rows * columns + (rows * columns > 1)
    assert len(image.arrays) == count
    assert image.pieces == (1, Run(count * spec.connector.num_tokens), 2)
    assert aspect_pieces(size, ASPECT, spec) == image.pieces
    canvas = picture(*size).resize((columns * 32, rows * 32), Image.Resampling.BICUBIC)
    last = canvas.crop((columns * 32 - 32, rows * 32 - 32, columns * 32, rows * 32))
    assert np.array_equal(image.arrays[rows * columns - 1]["pixels"], np.asarray(last))
    whole = picture(*size).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(image.arrays[-1]["pixels"], np.asarray(whole))


@pytest.mark.parametrize("tiles, fewest, most", [((1, 12), 1, 13), ((2, 6), 3, 7), ((5, 5), 6, 6)])
def test_fewest_and_most_tiles_of_the_images_own_shape_are_found(
    tiles: tuple[int, int], fewest: int, most: int
) -> None:
    spec = image_input(replace(ASPECT, min_tiles=tiles[0], max_tiles=tiles[1]), AROUND)
    assert count_rows(fewest_pieces(spec)) == fewest * spec.connector.num_tokens
    assert count_rows(most_pieces(spec)) == most * spec.connector.num_tokens
    counts = {
        count_rows(pieces_of(picture(width, height), spec)) // spec.connector.num_tokens
        for width in (1, 7, 50, 200)
        for height in (1, 7, 50, 200)
    }
    assert min(counts) >= fewest
    assert max(counts) <= most


def test_tiles_without_the_small_whole_are_the_grid_alone() -> None:
    spec = image_input(replace(ASPECT, thumbnail=False), AROUND)
    assert count_rows(prepare(picture(300, 200), spec).pieces) == 6 * spec.connector.num_tokens
