"""The clip of the fixture of Qwen2.5-VL."""

from __future__ import annotations

from conftest import Fixture

from mobilevlm.media.clip import Sampled, prepare_clip
from mobilevlm.prompt import Prepared


def clip_of(video: Fixture) -> Prepared:
    """Return the frames of the clip, as they are given to the model."""
    metadata = video.expected["video"]["video_metadata"]
    places, total = tuple(metadata["frames_indices"]), metadata["total_num_frames"]
    frames = [video.folder / f"frame{number}.png" for number in range(1, 5)]
    sampled = Sampled(places, total, metadata["fps"])
    [clip] = prepare_clip(frames, sampled, video.model.spec.image).parts
    assert isinstance(clip, Prepared)
    return clip


def video_text(video: Fixture) -> str:
    """Return the official text of the clip, with the mark of images in place of that of videos."""
    text = str(video.expected["video"]["templated_prompt"])
    return text.replace("<|video_pad|>", video.model.spec.conversation.image_mark)
