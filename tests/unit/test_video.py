"""Frames of a video: which ones, and how a model gets them."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import BundleOf, fixture_named, refusal
from fuzz.mutations import mutate_bytes
from PIL import Image

import mobilevlm
from mobilevlm.cli import main
from mobilevlm.errors import ImageError, MissingExtraError
from mobilevlm.image import Room
from mobilevlm.preparation import prepare, with_max_tiles
from mobilevlm.runtime.answer.video import decode_frames, frame_tiles, open_video, sample_frames

av = pytest.importorskip("av", reason="PyAV is not installed ([video] extra)")

GREY = 8
"""Frame i has this times i in all channels."""


def write_video(path: Path, frames: int, kind: str = "mpeg4") -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream(kind, rate=10)
        colors = "yuvj420p" if kind == "mjpeg" else "yuv420p"
        stream.width, stream.height, stream.pix_fmt = 64, 48, colors
        stream.bit_rate = 2_000_000
        for index in range(frames):
            picture = np.full((48, 64, 3), GREY * index % 256, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


def frames_of(path: Path, count: int | None = None) -> list[Image.Image]:
    """Return the frames that a model without clips takes."""
    video = open_video(path)
    return list(decode_frames(video, sample_frames(video, None, count).places))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
@pytest.mark.parametrize(
    ("frames", "count", "places"),
    [(30, 4, [0, 10, 19, 29]), (30, 1, [0]), (5, 8, [0, 1, 2, 3, 4]), (1, 8, [0])],
)
def test_frames_are_the_first_the_last_and_those_between_at_equal_distances(
    name: str, frames: int, count: int, places: list[int], tmp_path: Path
) -> None:
    found = frames_of(write_video(tmp_path / name, frames), count)
    assert [round(np.asarray(image).mean() / GREY) for image in found] == places
    assert {(image.mode, image.size) for image in found} == {("RGB", (64, 48))}


@pytest.mark.parametrize("content", [b"", b"not a video", b"\0" * 5000])
def test_a_file_that_is_no_video_is_named_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(ImageError, match="no such video"):
        open_video(path)
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"not a video|no frames") as caught:
        open_video(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_extra_its_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"'mobilevlm-edge\[video\]'"):
        open_video(tmp_path / "a.mp4")


def test_run_gives_the_model_a_videos_frames_as_pictures(
    bundle_of: BundleOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundle_of("vila", "fp32")
    video = write_video(tmp_path / "a.mp4", 30)
    given = ["run", str(bundle), "--prompt", "What happens?", "--max-new-tokens", "4", "--json"]
    main([*given, "--video", str(video), "--frames", "3"])
    frames = json.loads(capsys.readouterr().out)
    paths = []
    for index, image in enumerate(frames_of(video, 3)):
        image.save(tmp_path / f"{index}.png")
        paths += ["--image", str(tmp_path / f"{index}.png")]
    main([*given, *paths])
    pictures = json.loads(capsys.readouterr().out)
    assert frames["token_ids"] == pictures["token_ids"]
    assert frames["visual_tokens"] == 3 * 9
    message = refusal(capsys, *given, "--video", tmp_path / "none.mp4")
    assert "no such video file" in message


@pytest.mark.parametrize("name", ["smolvlm2", "internvl3", "llava_onevision"])
def test_a_frame_is_one_tile_where_the_model_splits_images(
    name: str, bundle_of: BundleOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SmolVLMVideoProcessor and InternVLVideoProcessor have it; an image of the same size is
    split."""
    bundle, video = bundle_of(name, "fp32"), write_video(tmp_path / "a.mp4", 30)
    given = ["run", str(bundle), "--prompt", "What happens?", "--max-new-tokens", "4", "--json"]
    main([*given, "--video", str(video), "--frames", "2"])
    answer = json.loads(capsys.readouterr().out)
    with mobilevlm.load(bundle) as vlm:
        frames = frames_of(video, 2)
        tiles = [vlm.prepare_image(frame, max_tiles=1, images=2) for frame in frames]
        assert [len(tile.arrays) for tile in tiles] == [1, 1]
        assert answer["visual_tokens"] == 2 * vlm.spec.image.connector.num_rows
        assert (
            answer["token_ids"] == vlm.generate("What happens?", tiles, max_new_tokens=4).token_ids
        )
        assert len(vlm.prepare_image(frames[0]).arrays) > 1


def test_a_frame_is_resized_as_the_official_video_processors_do() -> None:
    """SmolVLM: to the longest edge, then to the square of a tile; InternVL: straight to it."""
    random = np.random.default_rng(0)
    frame = Image.fromarray(random.integers(0, 256, (90, 160, 3), np.uint8))
    lanczos, bicubic = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC
    expected = {
        "smolvlm2": frame.resize((256, 144), lanczos).resize((64, 64), lanczos),
        "internvl3": frame.resize((56, 56), bicubic),
    }
    for name, square in expected.items():
        spec = fixture_named(name).model.spec
        one = with_max_tiles(spec.image, frame_tiles(spec) or 0)
        [arrays] = prepare(frame, one).arrays
        np.testing.assert_array_equal(arrays["pixels"], np.asarray(square), name)


def test_a_video_with_more_frames_than_fit_says_how_many_would(
    bundle_of: BundleOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundle_of("vila", "fp32")
    video = write_video(tmp_path / "a.mp4", 256)
    prompt = "a" + " a" * 1500
    given = ["run", bundle, "--prompt", prompt, "--max-new-tokens", "1", "--video", video]
    message = refusal(capsys, *given, "--frames", 256)
    found = re.search(r"(\d+) of the 256 images or frames would fit \(--frames", message)
    assert found is not None, message
    most = int(found[1])
    with mobilevlm.load(bundle) as vlm:
        vlm.check_fits(prompt, most)


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    write_video(tmp_path / "secret.ts", 5, "mpeg2video")
    lists = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/secret.ts\n"
        "#EXT-X-ENDLIST\n",
        "a.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n",
        "a.txt": f"ffconcat version 1.0\nfile {tmp_path}/secret.ts\n",
        "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    }
    for name, text in lists.items():
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ImageError, match="not a video") as caught:
            frames_of(path)
        assert str(path) in str(caught.value)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(ImageError, match="not a regular file"):
        open_video(tmp_path / "a.mp4")


def test_frames_beyond_the_memory_that_is_left_are_refused_before_they_are_decoded(
    tmp_path: Path,
) -> None:
    video = open_video(write_video(tmp_path / "a.mp4", 3))
    with pytest.raises(ImageError, match=r"frames of 64 × 48 pixels takes .* are left \(a test\)"):
        next(decode_frames(video, (0,), lambda needed: Room(50e3, "a test")))


def test_damaged_videos_give_frames_or_one_line(tmp_path: Path) -> None:
    generator = random.Random(0)
    for name, kind in (("a.mp4", "mpeg4"), ("a.mkv", "mpeg4"), ("a.avi", "mjpeg")):
        whole = write_video(tmp_path / name, 12, kind).read_bytes()
        for _ in range(60):
            (tmp_path / name).write_bytes(mutate_bytes(generator, whole))
            try:
                found = frames_of(tmp_path / name)
            except ImageError as error:
                assert len(str(error).splitlines()) == 1
            else:
                assert 0 < len(found) <= 8
