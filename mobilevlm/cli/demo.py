"""``mobilevlm demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mobilevlm.cli.options import engine_option, show_timings, threads_option
from mobilevlm.console import progress
from mobilevlm.console.terminal import plain_answer

if TYPE_CHECKING:
    from mobilevlm.nano.questions import Question
    from mobilevlm.nano.scenes import Scene

QUESTIONS = 3
LONGEST_ANSWER = 48
"""Tokens; the longest true answers take half as many."""

EXAMPLES = """\b
Examples:
  mobilevlm demo
  mobilevlm demo --seed 7 -o scene.png
"""


@click.command("demo", epilog=EXAMPLES)
@click.option(
    "--seed", "given", type=click.IntRange(0), help="Draw this scene again; default: a new one."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE.png",
              help="File to write the image to; default: one in the temporary folder.")  # fmt: skip
@engine_option("What runs the stages.")
@threads_option
def command(given: int | None, output: Path | None, engine: str, threads: int | None) -> None:
    """Draw a scene that no model has seen, and let the built-in model nano answer questions about
    it, with the truth beside each answer. Nothing is downloaded."""
    progress.enable()
    import random
    import tempfile

    from mobilevlm.nano.drawing import render
    from mobilevlm.nano.evaluate import is_right
    from mobilevlm.nano.scenes import TRAINING_SEEDS, sample_scene
    from mobilevlm.runtime import load

    asked: tuple[Question, ...] = ()
    while not asked or (given is None and len(asked) < QUESTIONS):
        seed = random.randrange(10**6) if given is None else given
        scene = sample_scene(TRAINING_SEEDS + seed, "evaluation")
        asked = _questions(scene)
    path = output or Path(tempfile.gettempdir()) / f"mobilevlm-demo-{seed}.png"
    image = render(scene)
    image.save(path)
    with load("nano", engine, threads) as vlm:
        print(f"image     {path}  (scene {seed})")
        right = 0
        for question in asked:
            print(f"\nquestion  {question.text}\nanswer    ", end="", flush=True)
            stream = vlm.stream(question.text, [image], max_new_tokens=LONGEST_ANSWER)
            for piece in stream:
                print(plain_answer(piece, sys.stdout), end="", flush=True)
            answer = stream.finish()
            good = is_right(question, answer.text)
            right += good
            print(f"\ntruth     {question.truth}  ({'right' if good else 'wrong'})", flush=True)
            show_timings(answer)
    print(f"\n{right} of {len(asked)} right. Ask something yourself:")
    print(f'  mobilevlm run nano --image {path} --prompt "What is in the picture?"')


def _questions(scene: Scene) -> tuple[Question, ...]:
    """Questions of different kinds, in whole sentences."""
    from mobilevlm.nano.questions import questions

    chosen: dict[str, Question] = {}
    for question in questions(scene, 24):
        if question.style == "full":
            chosen.setdefault(question.kind, question)
    return tuple(chosen.values())[:QUESTIONS]
