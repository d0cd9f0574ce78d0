"""``mobilevlm run``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from mobilevlm.cli import show_json
from mobilevlm.cli.options import (
    ModelOptions,
    model_options,
    plain_text_option,
    sampling_options,
    show_timings,
)
from mobilevlm.console.terminal import plain_answer, typed

EXAMPLES = """\b
Examples:
  mobilevlm run bundle/ --image photo.jpg --prompt "What is in the picture?"
  mobilevlm run bundle/ --image a.jpg --image b.jpg --prompt "<image> or <image>: which is older?"
  mobilevlm run bundle/ --video clip.mp4 --frames 8 --prompt "What happens?"
  cat photo.jpg | mobilevlm run bundle/ --image - --prompt "Describe the picture." --json
  mobilevlm run bundle/ --image photo.jpg --prompt "What is this?" --max-memory 512MB
  mobilevlm run model.gguf --mmproj mmproj.gguf --image photo.jpg --prompt "What is this?"
"""


@click.command("run", epilog=EXAMPLES)
@model_options
@click.option(
    "--image",
    "images",
    multiple=True,
    metavar="FILE",
    help="A picture; repeat for more; - reads it from standard input.",
)
@click.option(
    "--video",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A video: some of its frames, as images after the others, each one tile where the model "
    "splits images ([video] extra).",
)
@click.option(
    "--frames", type=click.IntRange(1, 256), default=8, show_default=True, help="How many."
)
@click.option("--prompt", required=True, help="The question. <image> in it places a picture.")
@click.option("--raw", is_flag=True, help="The prompt is complete: no conversation around it.")
@plain_text_option
@sampling_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of the stream."
)
def command(
    model: ModelOptions,
    images: tuple[str, ...],
    video: Path | None,
    frames: int,
    prompt: str,
    raw: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Ask one question about pictures and stream the answer of the model in BUNDLE."""
    if raw and not sampling["special_tokens"]:
        raise click.UsageError("--plain-text does not go with --raw, whose text is all the prompt")
    pictures: list[Any] = [_from_stdin() if image == "-" else image for image in images]
    prompt, clip = typed(prompt), None
    if video is not None:
        from mobilevlm.runtime.answer.video import decode_frames, frame_tiles, open_video

        clip = open_video(video, frames)
    with model.open() as vlm:
        if clip is not None:
            asked = len(pictures) + len(clip.places)
            vlm.check_fits(prompt, asked, raw, sampling["special_tokens"])
            tiles = frame_tiles(vlm.spec)
            for frame in decode_frames(clip, vlm.room_for):
                pictures.append(vlm.prepare_image(frame, tiles, images=asked))
        stream = vlm.stream(prompt, pictures, raw=raw, **sampling)
        if not as_json:
            for piece in stream:
                print(plain_answer(piece, sys.stdout), end="", flush=True)
            print()
        answer = stream.finish()
        if as_json:
            show_json(dataclasses.asdict(answer))
        else:
            show_timings(answer)


def _from_stdin() -> bytes:
    if not (content := sys.stdin.buffer.read()):
        raise click.UsageError("--image -: standard input is empty: send one image file into it")
    return content
