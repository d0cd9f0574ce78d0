"""Videos of models that were trained on some: frames, sizes, times, and the way into a prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FLOAT32, BundleOf, Fixture, fixture_named, refusal, relative_error
from test_video import write_video

import mobilevlm
from mobilevlm.cli import main
from mobilevlm.conversation import read_text
from mobilevlm.errors import PromptError
from mobilevlm.input_spec import ClipSpec, DynamicImage
from mobilevlm.media.clip import Sampled, clip_of, clip_places, frame_size
from mobilevlm.messages import Message
from mobilevlm.prompt import Prepared, expand, grid_positions, visual_positions
from mobilevlm.reference import load_reference
from mobilevlm.runtime import VLM

PARTS = ClipSpec(3136, 602112, sampling="parts", positions_per_second=2.0)
ENDS = ClipSpec(4096, 768 * 32**2, 25165824, tells_times=True)
IMAGE = DynamicImage(16, 2, 65536, 16777216, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("total", "rate", "count", "parts", "ends"),
    [
        (30, 10.0, None, [0, 5, 10, 15, 20, 25], [0, 6, 12, 17, 23, 29]),
        (10, 30.0, None, [0, 2, 5, 7], [0, 3, 6, 9]),
        (3, 1.0, None, [0, 1], [0, 1, 2]),
        (1, 1.0, None, [0], [0]),
        (100, 25.0, 4, [0, 25, 50, 75], [0, 33, 66, 99]),
        (2, 25.0, 8, [0, 1], [0, 1]),
    ],
)
def test_frames_are_those_of_the_official_samplers(
    total: int, rate: float, count: int | None, parts: list[int], ends: list[int]
) -> None:
    """Computed with ``sample_frames`` of Qwen2VLVideoProcessor and Qwen3VLVideoProcessor; the
    former takes no video of one frame."""
    assert list(clip_places(total, rate, PARTS, 2, count)) == parts
    assert list(clip_places(total, rate, ENDS, 2, count)) == ends


def test_a_long_video_has_no_more_frames_than_the_model_takes() -> None:
    for clip in (PARTS, ENDS):
        assert len(clip_places(10**6, 25.0, clip, 2)) == 768


@pytest.mark.parametrize(
    ("size", "frames", "expected"),
    [
        ((640, 360), 8, (640, 352)),
        ((1920, 1080), 8, (1152, 640)),  # 768 visual tokens a frame
        ((1920, 1080), 768, (224, 128)),  # 25165824 pixels in all
        ((20, 30), 2, (32, 64)),  # an edge of less than a visual token
        ((8, 20), 4, (32, 64)),
        ((33, 34), 2, (64, 64)),  # the least of all frames
    ],
)
def test_frames_have_the_size_of_the_official_video_processor(
    size: tuple[int, int], frames: int, expected: tuple[int, int]
) -> None:
    """Qwen3VLVideoProcessor with ``cap_pixels_per_frame``, the default from transformers 5.22."""
    assert frame_size(size, frames, IMAGE, ENDS) == expected


def test_the_time_of_a_step_is_the_middle_of_its_frames() -> None:
    assert Sampled((0, 6, 12, 17, 23), 30, 10.0).seconds(2) == pytest.approx([0.3, 1.45, 2.3])


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


@pytest.fixture(scope="module")
def vlm(fixture: Fixture, bundle_of: BundleOf) -> Iterator[VLM]:
    with mobilevlm.load(bundle_of(fixture.name, "fp32")) as vlm:
        yield vlm


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", 30)


QUESTION = "What happens?"
TURN = "<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n"
SHOWN = "<|vision_start|><|image_pad|><|vision_end|>"


def test_a_video_has_the_official_text_positions_and_the_logits_of_the_reference(
    fixture: Fixture, vlm: VLM, video: Path
) -> None:
    """Qwen2.5-VL: one clip; Qwen3-VL: ``<t seconds>`` before each pair of frames, which is an image
    of its own (``replace_video_token`` of Qwen3VLProcessor)."""
    clip = vlm.prepare_video(video)
    images: list[Prepared] = clip.images
    if fixture.name == "qwen3_vl":
        seconds = ("0.3", "1.4", "2.6")
        text = TURN.format("".join(f"<{time} seconds>{SHOWN}" for time in seconds), QUESTION)
        starts = []
    else:
        system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        text = system + TURN.format(SHOWN, QUESTION)
        starts = [0, 2, 4]  # two positions a second, and the three steps take 3 seconds
    model, conversation = fixture.model, vlm.spec.conversation
    tokens = read_text(vlm.tokenizer, conversation, text, len(images), vlm.spec.decoder.vocab_size)
    pieces = expand(tokens, [image.pieces for image in images])
    ids, of_video = np.array(vlm.prompt_ids(QUESTION, [clip])), fixture.expected["video_token_id"]
    visual = visual_positions(pieces)
    assert (ids[visual] == of_video).all()
    assert ids[~visual].tolist() == [piece for piece in pieces if isinstance(piece, int)]
    times = grid_positions(pieces, 3)[0][visual].reshape(3, -1)
    assert (times == times[:, :1]).all()
    if starts:
        assert (times[:, 0] - times[0, 0]).tolist() == starts
    with torch.no_grad():
        reference = load_reference(model)
        seen = [reference.see(image) for image in images]
        expected = reference.logits(reference.prompt(pieces, seen)).numpy()
    assert relative_error(vlm.prompt_logits(QUESTION, [clip]), expected) <= FLOAT32


def test_run_the_api_and_a_message_take_a_video_alike(
    vlm: VLM, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["run", str(vlm.bundle.folder), "--prompt", QUESTION, "-n", "4", "--json"]
    main([*asked, "--video", str(video)])
    token_ids = json.loads(capsys.readouterr().out)["token_ids"]
    part = {"type": "video", "video": str(video)}
    messages: list[Message] = [
        {"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}
    ]
    assert vlm.generate(messages, max_new_tokens=4).token_ids == token_ids
    clip = vlm.prepare_video(video)
    assert vlm.generate(QUESTION, [clip], max_new_tokens=4).token_ids == token_ids
    turn = vlm.chat([clip]).ask(QUESTION, max_new_tokens=4)
    assert turn.finish().token_ids == token_ids


def test_a_mark_places_a_video_beside_images(vlm: VLM, video: Path) -> None:
    clip, image = vlm.prepare_video(video, 2), np.zeros((64, 64, 3), np.uint8)
    marked = "Is <image> in <image>?"
    texts = {"type": "text", "text": "Is "}, {"type": "text", "text": " in "}
    shown = {"type": "image", "image": image}, {"type": "video", "video": clip}
    parts: list[dict[str, Any]] = [
        texts[0],
        shown[0],
        texts[1],
        shown[1],
        {"type": "text", "text": "?"},
    ]
    found = vlm.prompt_logits(marked, [image, clip], count=1)
    assert np.array_equal(found, vlm.prompt_logits([{"role": "user", "content": parts}], count=1))
    with pytest.raises(PromptError, match="has 2 <image> marks, but one"):
        vlm.generate(marked, [clip])


def test_frames_and_visual_tokens_are_as_many_as_are_asked_for(vlm: VLM, video: Path) -> None:
    for frames, steps in ((2, 1), (4, 2)):
        clip = vlm.prepare_video(video, frames)
        assert sum(len(image.arrays) for image in clip.images) == steps
    with mobilevlm.load(vlm.bundle.folder, max_image_tokens=2) as small:
        arrays = [run for image in small.prepare_video(video).images for run in image.arrays]
    known = clip_of(vlm.spec.image)
    assert known is not None
    assert all(np.prod(run["pixels"].shape[:2]) <= 2 * known[0].factor ** 2 for run in arrays)


def test_raw_text_has_the_times_of_a_clip_itself(fixture: Fixture, vlm: VLM, video: Path) -> None:
    clip = vlm.prepare_video(video, 2)
    text = TURN.format(SHOWN, QUESTION)
    if fixture.name == "qwen2_5_vl":
        vlm.prompt_logits(text, [clip], raw=True, count=1)
        return
    with pytest.raises(PromptError, match="raw: this model reads the times"):
        vlm.generate(text, [clip], raw=True)
    vlm.prompt_logits(text, clip.images, raw=True, count=1)


def test_frames_without_a_video_are_refused(vlm: VLM, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "run", vlm.bundle.folder, "--prompt", "Who?", "--frames", "3")
    assert "--frames is of a video" in message
