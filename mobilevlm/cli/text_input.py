"""Texts given as an argument, in a file or on standard input; schemas and grammars."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mobilevlm.console.line_editing import expanded
from mobilevlm.console.terminal import shown, typed

if TYPE_CHECKING:
    from mobilevlm.runtime import Generation

F = TypeVar("F", bound=Callable[..., Any])
MOST_BYTES = 1 << 24
"""Largest text file."""


def given_text(option: str, text: str) -> str:
    """Return what a person said: the argument, ``@FILE``'s content, or with ``-`` what standard
    input has; ``@@`` is an argument that begins with ``@``.

    Raises:
        click.UsageError: no such file, not UTF-8, or nothing in it.
    """
    if text == "-":
        return _decoded(f"{option} -: standard input", sys.stdin.buffer.read(MOST_BYTES + 1))
    if text.startswith("@@"):
        return typed(text[1:])
    if text.startswith("@"):
        return read_text_file(option, text[1:])
    return typed(text)


def read_text_file(option: str, path: str) -> str:
    """Return the text of a file that an option names.

    Raises:
        click.UsageError: as of :func:`given_text`.
    """
    place = f"{option}: {shown(path)}"
    try:
        file = expanded(path)
        if file.exists() and not file.is_file():
            raise click.UsageError(f"{place}: not a regular file")
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or shown(error)
        raise click.UsageError(f"{place}: {reason}") from None
    return _decoded(place, content)


def _decoded(place: str, content: bytes) -> str:
    if len(content) > MOST_BYTES:
        raise click.UsageError(f"{place}: more than {MOST_BYTES} bytes, too long for a text")
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{place}: no UTF-8 at byte {error.start}") from None
    if not text:
        raise click.UsageError(f"{place} is empty: a text was expected")
    return text


def structure_options(function: F) -> F:
    """``--json-schema`` and ``--grammar``, as ``VLM.stream`` takes them."""

    def read(context: Any, option: Any, path: str | None) -> str | None:
        return None if path is None else read_text_file(option.opts[0], path)

    for decorate in (
        click.option("--grammar", metavar="FILE", callback=read,
                     help="The answer follows these rules (Lark, or llama.cpp's GBNF; [structured] "
                          "extra)."),
        click.option("--json-schema", metavar="FILE", callback=read,
                     help="The answer is JSON that fulfils this schema ([structured] extra)."),
    ):  # fmt: skip
        function = decorate(function)
    return function


system_option = click.option(
    "--system", metavar="TEXT",
    callback=lambda context, option, text: None if text is None else given_text("--system", text),
    help="The system message, in place of the model's own; @FILE reads it from a file.",
)  # fmt: skip


def warn_of_cut(answer: Generation, options: dict[str, Any]) -> None:
    """Say on stderr that a structured answer is not whole."""
    structured = options.get("json_schema") or options.get("grammar")
    if structured and answer.finish_reason == "length":
        print(
            f"mobilevlm: warning: the answer was cut after {len(answer.token_ids)} tokens and is "
            f"not whole: raise --max-new-tokens, or limit lengths in the schema",
            file=sys.stderr,
        )
