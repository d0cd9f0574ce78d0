"""``mobilevlm chat``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobilevlm.cli.image_input import allow_urls_option, given_images, given_sounds
from mobilevlm.cli.options import (
    ModelOptions,
    cache_dir_options,
    model_options,
    plain_text_option,
    sampling_options,
    show_timings,
)
from mobilevlm.cli.text_input import structure_options, system_option, warn_of_cut
from mobilevlm.console.line_editing import edited, files_in
from mobilevlm.console.terminal import plain, plain_answer, typed
from mobilevlm.errors import MobileVLMError

if TYPE_CHECKING:
    from mobilevlm.runtime.answer.chat import Chat

HELP = """\
/image FILE   show further images with the next question; clipboard: takes what was copied
/audio FILE   the same with sounds, for models that hear
/new FILE     begin a new conversation about these images, or about none
/reset        begin a new conversation about the same images
/system TEXT  set the system message; alone: show it; /system "": the model's own again
/save FILE    write the conversation as JSON messages
/context      show how much of the context is left
/timings      show or hide timings after each answer
/help         show this
/quit         leave (also Ctrl-D)
A line that ends with \\ goes on in the next; so does a text from \"\"\" to \"\"\"."""
COMMANDS = tuple(line.split()[0] for line in HELP.splitlines() if line.startswith("/"))
NEARLY_FULL = 1 / 8
"""Share of the context; with less room than that a person is warned."""


@dataclass
class Talk:
    """A conversation at the terminal."""

    chat: Chat
    context_length: int
    allow_urls: bool = False
    names: list[str] = field(default_factory=list)
    """Files or data: URIs of the images or sounds"""
    timings: bool = False
    """Shown after each answer"""


@click.command("chat", epilog=f"\b\nIn the conversation:\n{HELP}")
@model_options
@cache_dir_options
@click.option(
    "--image", "images", multiple=True, metavar="FILE", help="An image, or clipboard:; repeatable."
)
@click.option(
    "--audio", "sounds", multiple=True, metavar="FILE", help="A sound, for models that hear."
)
@allow_urls_option
@system_option
@plain_text_option
@structure_options
@sampling_options
def command(
    model: ModelOptions,
    images: tuple[str, ...],
    sounds: tuple[str, ...],
    allow_urls: bool,
    system: str | None,
    **sampling: Any,
) -> None:
    """Talk about images or sounds with the model in BUNDLE. Ctrl-C stops an answer."""
    shown = given_images(images, allow_urls)
    if "-" in sounds:
        raise click.UsageError("--audio -: what is typed is standard input here: give a file")
    heard = given_sounds(sounds)
    with model.open() as vlm, edited(COMMANDS):
        chat = vlm.chat([*shown, *heard], system)
        names = [*shown, *sounds]
        talk = Talk(chat, vlm.spec.decoder.context_length, allow_urls, names)
        print(f"{plain(vlm.spec.name)}, loaded in {vlm.load_seconds:.1f} s. /help lists commands.",
              file=sys.stderr)  # fmt: skip
        while True:
            text = _read_text()
            if text is None or (text.is_command and text.words == "/quit"):
                return
            if text.is_command:
                _obey(talk, text.words)
            elif text.words:
                _answer(talk, typed(text.words), sampling)
                _warn_of_end(talk)


@dataclass(frozen=True)
class Text:
    """Text that a person typed, of one or more lines."""

    words: str
    lines: int
    quoted: bool
    """Between three quotation marks"""

    @property
    def is_command(self) -> bool:
        """True if it begins with ``/``; of several lines only those of a known command."""
        if self.quoted or not self.words.startswith("/"):
            return False
        return self.lines == 1 or self.words.split()[0] in COMMANDS


def _read_text() -> Text | None:
    """Return what is typed next, of several lines where they belong together; none at the end of
    input. Ctrl-C clears what is typed so far."""
    while True:
        try:
            return _read_lines()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n(Ctrl-D or /quit leaves)", file=sys.stderr)


def _read_lines() -> Text | None:
    line = _read_line("> ")
    if line is None:
        return None
    lines: list[str] = []
    quoted = line.startswith('"""')
    line = line.removeprefix('"""') if quoted else line
    while line is not None:
        if quoted and line.rstrip().endswith('"""'):
            lines.append(line.rstrip().removesuffix('"""'))
            break
        if not quoted and not line.endswith("\\"):
            lines.append(line)
            break
        lines.append(line if quoted else line.removesuffix("\\"))
        line = _read_line(". ")
    return Text("\n".join(lines).strip(), len(lines), quoted)


def _read_line(prompt: str) -> str | None:
    """Return the next line; none at the end of input."""
    try:
        return input(prompt if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _obey(talk: Talk, line: str) -> None:
    verb, _, argument = line.partition(" ")
    from mobilevlm.prompt import Sound  # brings numpy

    argument = typed(argument.strip())
    chat = talk.chat
    try:
        if verb == "/image" and argument:
            files = given_images(files_in(argument), talk.allow_urls)
            chat.show(files)
            talk.names += files
        elif verb == "/audio" and argument:
            files = files_in(argument)
            chat.show([Sound(file) for file in files])
            talk.names += files
        elif verb == "/new":
            files = given_images(files_in(argument), talk.allow_urls) if argument else []
            chat.begin(files)
            talk.names = list(files)
        elif verb == "/system":
            if argument:
                chat.system = None if argument in ('""', "''") else argument
            else:
                print(plain(chat.system or "no system message of your own"), file=sys.stderr)
        elif verb == "/save" and argument:
            _save(talk, argument)
        elif line == "/context":
            print(f"room for {chat.room} of {talk.context_length} tokens", file=sys.stderr)
        elif line == "/timings":
            talk.timings = not talk.timings
        elif line == "/reset":
            chat.reset()
        elif line == "/help":
            print(HELP, file=sys.stderr)
        else:
            print(f"{plain(line)}: not a command. {HELP}", file=sys.stderr)
    except MobileVLMError as error:
        print(f"error: {plain(error)}", file=sys.stderr)


def _save(talk: Talk, name: str) -> None:
    """Write the conversation as ``VLM.generate`` takes it, images by their files."""
    import json

    images = iter(talk.names)
    messages: list[dict[str, Any]] = []
    if talk.chat.system is not None:
        messages.append({"role": "system", "content": talk.chat.system})
    for message in talk.chat.messages:
        content: Any = message["content"]
        if not isinstance(content, str):
            content = [
                part if part["type"] == "text" else {**part, part["type"]: next(images)}
                for part in content
            ]
        messages.append({"role": message["role"], "content": content})
    files = files_in(name)
    if len(files) != 1:
        print(f"error: {plain(name)}: one file is written: put a name with spaces into quotes",
              file=sys.stderr)  # fmt: skip
        return
    path = Path(files[0])
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(messages, file, indent=2, ensure_ascii=False)
            file.write("\n")
    except FileExistsError:
        print(f"error: {plain(path)}: there is such a file: give another name", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"error: {plain(path)}: {plain(error)}", file=sys.stderr)
    else:
        print(f"{plain(path)}: {len(messages)} messages", file=sys.stderr)


def _warn_of_end(talk: Talk) -> None:
    """Say when the next turns may not fit."""
    if talk.chat.room < NEARLY_FULL * talk.context_length:
        print(
            f"the context is nearly full: room for {talk.chat.room} of {talk.context_length} "
            f"tokens: /reset begins anew",
            file=sys.stderr,
        )


def _answer(talk: Talk, question: str, sampling: dict[str, Any]) -> None:
    try:
        stream = talk.chat.ask(question, **sampling)
        for piece in stream:
            print(plain_answer(piece, sys.stdout), end="", flush=True)
        print()
        warn_of_cut(stream.generation, sampling)
        if talk.timings:
            show_timings(stream.generation)
    except KeyboardInterrupt:
        print(" [stopped]")
    except MobileVLMError as error:
        print(f"error: {plain(error)} (/reset begins anew)", file=sys.stderr)
