"""``mobilevlm chat``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobilevlm.cli.options import (
    ModelOptions,
    model_options,
    plain_text_option,
    sampling_options,
    show_timings,
)
from mobilevlm.cli.text_input import structure_options, system_option, warn_of_cut
from mobilevlm.console.terminal import plain, plain_answer, typed
from mobilevlm.errors import MobileVLMError

if TYPE_CHECKING:
    from mobilevlm.runtime.answer.chat import Chat

HELP = """\
/image FILE   talk about another image, or several (a new conversation begins)
/reset        begin a new conversation about the same images
/timings      show or hide timings after each answer
/help         show this
/quit         leave (also Ctrl-D)"""
NEARLY_FULL = 1 / 8
"""Share of the context; with less room than that a person is warned."""


@click.command("chat", epilog=f"\b\nIn the conversation:\n{HELP}")
@model_options
@click.option("--image", "images", multiple=True, metavar="FILE", help="A picture; repeatable.")
@system_option
@plain_text_option
@structure_options
@sampling_options
def command(
    model: ModelOptions,
    images: tuple[str, ...],
    system: str | None,
    **sampling: Any,
) -> None:
    """Talk about pictures with the model in BUNDLE. Ctrl-C stops an answer."""
    from mobilevlm.runtime.answer.chat import Chat

    with model.open() as vlm:
        chat = Chat(vlm, list(images), system)
        print(f"{plain(vlm.spec.name)}, loaded in {vlm.load_seconds:.1f} s. /help lists commands.",
              file=sys.stderr)  # fmt: skip
        timings = False
        while True:
            line = _read_line()
            if line is None or line == "/quit":
                return
            if line == "/timings":
                timings = not timings
            elif line.startswith("/"):
                _obey(chat, line)
            elif line:
                _answer(chat, typed(line), sampling, timings)
                _warn_of_end(chat, vlm.spec.decoder.context_length)


def _read_line() -> str | None:
    """Return the next line; none at the end of input. Ctrl-C clears what is typed so far."""
    if not sys.stdin.isatty():
        return _without_prompt()
    import readline  # noqa: F401  (gives input() history and editing)

    while True:
        try:
            return input("> ").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", file=sys.stderr)


def _without_prompt() -> str | None:
    try:
        return input().strip()
    except EOFError:
        return None


def _obey(chat: Chat, line: str) -> None:
    verb, _, argument = line.partition(" ")
    try:
        if verb == "/image" and argument:
            chat.begin(files_in(argument.strip()))
        elif verb == "/reset":
            chat.begin(chat.images)
        elif verb == "/help":
            print(HELP, file=sys.stderr)
        else:
            print(f"{plain(line)}: not a command. {HELP}", file=sys.stderr)
    except MobileVLMError as error:
        print(f"error: {plain(error)}", file=sys.stderr)


def files_in(text: str) -> list[str]:
    """Return the files that a person typed: one as it stands, or several as a shell reads them,
    with quotes, backslashes and ``~``."""
    whole = Path(text).expanduser()
    if whole.is_file():
        return [str(whole)]
    try:
        words = shlex.split(text)
    except ValueError:  # a quote that is not closed
        words = [text]
    return [str(Path(word).expanduser()) for word in words]


def _warn_of_end(chat: Chat, context_length: int) -> None:
    """Say when the next turns may not fit."""
    if chat.room < NEARLY_FULL * context_length:
        print(
            f"the context is nearly full: room for {chat.room} of {context_length} tokens: "
            f"/reset begins anew",
            file=sys.stderr,
        )


def _answer(chat: Chat, question: str, sampling: dict[str, Any], timings: bool) -> None:
    try:
        stream = chat.ask(question, **sampling)
        for piece in stream:
            print(plain_answer(piece, sys.stdout), end="", flush=True)
        print()
        warn_of_cut(stream.generation, sampling)
        if timings:
            show_timings(stream.generation)
    except KeyboardInterrupt:
        print(" [stopped]")
    except MobileVLMError as error:
        print(f"error: {plain(error)} (/reset begins anew)", file=sys.stderr)
