"""``mobilevlm run``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobilevlm.cli import show_json
from mobilevlm.cli.image_input import allow_urls_option, given_images, given_sounds
from mobilevlm.cli.options import (
    ModelOptions,
    cache_dir_options,
    model_options,
    plain_text_option,
    sampling_options,
    show_timings,
)
from mobilevlm.cli.text_input import given_text, structure_options, system_option, warn_of_cut
from mobilevlm.console.terminal import plain_answer

if TYPE_CHECKING:
    from mobilevlm.runtime import Generation, TextStream

EXAMPLES = """\b
Examples:
  mobilevlm run bundle/ --image photo.jpg -p "What is in the image?"
  mobilevlm run bundle/ --image a.jpg --image b.jpg -p "<image> or <image>: which is older?"
  mobilevlm run bundle/ --image photo.jpg -p "What is it?" -p "Which colour has it?" -n 32
  mobilevlm run bundle/ --video clip.mp4 --frames 8 -p "What happens?"
  mobilevlm run bundle/ --audio speech.wav -p "What is said?"
  cat photo.jpg | mobilevlm run bundle/ --image - -p "Describe the image." --json
  mobilevlm run bundle/ --image photo.jpg -p @question.txt --json-schema answer.json
  mobilevlm run bundle/ --image photo.jpg -p "What is this?" --max-memory 512MB
  mobilevlm run model.gguf --mmproj mmproj.gguf --image photo.jpg -p "What is this?"
"""


@click.command("run", epilog=EXAMPLES)
@model_options
@cache_dir_options
@click.option(
    "--image",
    "images",
    multiple=True,
    metavar="FILE",
    help="An image, or its data: URI; repeat for more; - reads it from standard input, "
    "clipboard: takes what was copied.",
)
@allow_urls_option
@click.option(
    "--audio",
    "sounds",
    multiple=True,
    metavar="FILE",
    help="A sound, for models that hear: WAV, others with the [audio] extra; repeat for more; - "
    "reads it from standard input.",
)
@click.option(
    "--video",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A video, after the images: a clip with the times of its frames where the model takes "
    "some, else frames as images, each one tile where the model splits images ([video] extra).",
)
@click.option(
    "--frames",
    type=click.IntRange(1, 768),
    help="Number of frames: 8 by default, of a clip two a second.",
)
@click.option(
    "-p",
    "--prompt",
    "prompts",
    required=True,
    multiple=True,
    metavar="TEXT",
    help="The question; <image> in it places an image. @FILE reads it from a file, - from "
    "standard input. Repeat to ask several, each by itself.",
)
@system_option
@click.option("--raw", is_flag=True, help="The prompt is complete: no conversation around it.")
@plain_text_option
@structure_options
@sampling_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of the stream."
)
@click.option(
    "--json-lines",
    is_flag=True,
    help="Print a JSON object a line: each piece as it comes, then the whole answer.",
)
def command(
    model: ModelOptions,
    images: tuple[str, ...],
    sounds: tuple[str, ...],
    allow_urls: bool,
    video: Path | None,
    frames: int | None,
    prompts: tuple[str, ...],
    raw: bool,
    as_json: bool,
    json_lines: bool,
    **options: Any,
) -> None:
    """Ask questions about images or sounds and stream the answers of the model in BUNDLE."""
    if raw and not options["special_tokens"]:
        raise click.UsageError("--plain-text does not go with --raw, whose text is all the prompt")
    if raw and options["system"] is not None:
        raise click.UsageError("--system does not go with --raw, whose text is all the prompt")
    if as_json and (json_lines or len(prompts) > 1):
        raise click.UsageError(
            "--json prints one object: use --json-lines alone for several prompts or a stream"
        )
    if [*images, *sounds, *prompts].count("-") > 1:
        raise click.UsageError("standard input can be one image, sound or prompt: give - once")
    sources: list[Any] = [*given_images(images, allow_urls, stdin=True)]
    sources += given_sounds(sounds)
    questions, clip = [given_text("--prompt", prompt) for prompt in prompts], None
    if video is not None:
        from mobilevlm.runtime.answer.video import blank_clip, open_video

        clip = open_video(video)
    elif frames is not None:
        raise click.UsageError("--frames is of a video: give one by --video, or leave it out")
    with model.open() as vlm:
        if clip is not None:
            shown = [*sources, blank_clip(clip, vlm.spec, frames)]
            special, system = options["special_tokens"], options["system"]
            for question in questions:
                vlm.check_fits(question, shown, raw, special, system)
            sources.append(vlm.prepare_video(clip, frames))
        for number, question in enumerate(questions):
            stream = vlm.stream(question, sources, raw=raw, **options)
            if as_json:
                show_json(_data(stream.finish()))
            elif json_lines:
                _show_lines(stream, number)
            else:
                for piece in stream:
                    print(plain_answer(piece, sys.stdout), end="", flush=True)
                print(flush=True)
                show_timings(stream.finish())
            warn_of_cut(stream.finish(), options)


def _show_lines(stream: TextStream, number: int) -> None:
    """Print the pieces and the answer of a prompt, an object a line."""
    for piece in stream:
        print(json.dumps({"prompt": number, "piece": piece}), flush=True)
    print(json.dumps({"prompt": number, "answer": _data(stream.finish())}), flush=True)


def _data(answer: Generation) -> dict[str, Any]:
    """Return an answer as JSON data."""
    data = dataclasses.asdict(answer)
    del data["tool_calls"]  # no tools are given here
    if answer.logprobs is None:
        del data["logprobs"]
    return data
