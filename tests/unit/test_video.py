"""Frames of a video: which ones, and how a model gets them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import BundleOf, refusal

from mobilevlm.cli import main
from mobilevlm.errors import ImageError, MissingExtraError
from mobilevlm.runtime.video import sample_frames

av = pytest.importorskip("av", reason="PyAV is not installed ([video] extra)")

GREY = 8
"""Frame i has this times i in all channels."""


def write_video(path: Path, frames: int, kind: str = "mpeg4") -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream(kind, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.bit_rate = 2_000_000
        for index in range(frames):
            picture = np.full((48, 64, 3), GREY * index, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
@pytest.mark.parametrize(
    ("frames", "count", "places"),
    [(30, 4, [0, 10, 19, 29]), (30, 1, [0]), (5, 8, [0, 1, 2, 3, 4]), (1, 8, [0])],
)
def test_frames_are_the_first_the_last_and_those_between_at_equal_distances(
    name: str, frames: int, count: int, places: list[int], tmp_path: Path
) -> None:
    found = sample_frames(write_video(tmp_path / name, frames), count)
    assert [round(np.asarray(image).mean() / GREY) for image in found] == places
    assert {(image.mode, image.size) for image in found} == {("RGB", (64, 48))}


@pytest.mark.parametrize("content", [b"", b"not a video", b"\0" * 5000])
def test_a_file_that_is_no_video_is_named_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(ImageError, match="no such video"):
        sample_frames(path)
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"not a video|no frames") as caught:
        sample_frames(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_extra_its_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"'mobilevlm-edge\[video\]'"):
        sample_frames(tmp_path / "a.mp4")


def test_run_gives_the_model_a_videos_frames_as_pictures(
    bundle_of: BundleOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundle_of("vila", "fp32")
    video = write_video(tmp_path / "a.mp4", 30)
    given = ["run", str(bundle), "--prompt", "What happens?", "--max-new-tokens", "4", "--json"]
    main([*given, "--video", str(video), "--frames", "3"])
    frames = json.loads(capsys.readouterr().out)
    paths = []
    for index, image in enumerate(sample_frames(video, 3)):
        image.save(tmp_path / f"{index}.png")
        paths += ["--image", str(tmp_path / f"{index}.png")]
    main([*given, *paths])
    pictures = json.loads(capsys.readouterr().out)
    assert frames["token_ids"] == pictures["token_ids"]
    assert frames["visual_tokens"] == 3 * 9
    message = refusal(capsys, *given, "--video", tmp_path / "none.mp4")
    assert "no such video file" in message
