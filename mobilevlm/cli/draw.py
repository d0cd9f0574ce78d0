"""``mobilevlm draw``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from mobilevlm.cli import show_json
from mobilevlm.cli.options import ModelOptions, model_options, output_option
from mobilevlm.cli.text_input import given_text
from mobilevlm.console import progress

EXAMPLES = """\b
Examples:
  mobilevlm draw bundle/ -p "A red house near a river." -o house.png
  mobilevlm draw bundle/ -p @scene.txt -o scene.png --n 4 --guidance 5 --seed 7
"""


@click.command("draw", epilog=EXAMPLES)
@model_options
@click.option(
    "-p",
    "--prompt",
    required=True,
    metavar="TEXT",
    help="Description of the image; @FILE reads it from a file, - from standard input.",
)
@output_option("output", "Where the image goes; of several, FILE-1.png, FILE-2.png …", "FILE.png")
@click.option(
    "--n",
    "count",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Number of images.",
)
@click.option(
    "--guidance",
    type=click.FloatRange(0, 1e6),
    metavar="SCALE",
    help="How closely the image follows the text, by default the checkpoint's own scale; 1: "
    "without guidance, in half the time.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    help="The same seed draws the same images; each further image has the next number.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="0 takes the most likely code each time.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object about the images.")
def command(
    model: ModelOptions,
    prompt: str,
    output: Path,
    count: int,
    guidance: float | None,
    seed: int | None,
    temperature: float,
    as_json: bool,
) -> None:
    """Draw what a text says, with a model in BUNDLE that makes images (Janus-Pro)."""
    files = _files(output, count)
    text = given_text("--prompt", prompt)
    progress.enable()
    with model.open() as vlm:
        start = time.perf_counter()
        total = count * vlm.spec.drawing.num_tokens
        with progress.track("draw", total, unit="codes") as advance:
            found = vlm.drawn(text, count, guidance, seed, temperature, lambda done, _: advance(1))
            for file, drawn in zip(files, found, strict=True):
                drawn.image.save(file)
                if not as_json:
                    print(file, flush=True)
        seconds = time.perf_counter() - start
        progress.say(f"{total / seconds:.3g} codes/s, {seconds / count:.3g} s an image")
    if as_json:
        size = list(drawn.image.size)
        show_json({"files": [str(file) for file in files], "size": size, "seconds": seconds})


def _files(output: Path, count: int) -> list[Path]:
    """Return where images go.

    Raises:
        click.UsageError: no PNG file, or in no folder.
    """
    if output.suffix.lower() != ".png":
        raise click.UsageError(f"--output {output}: images are PNG files: give FILE.png")
    if not output.parent.is_dir():
        raise click.UsageError(f"--output {output}: no such folder {output.parent}: make it first")
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{index}") for index in range(1, count + 1)]
