"""Lines that a person types: history, completion of commands and files, and files as words."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

MOST_LINES = 1000
"""Lines of the history that are kept."""
_URI = re.compile(r"(data|file|https?):", re.IGNORECASE)


def expanded(path: str) -> Path:
    """Return a path with the home that ``~`` or ``~name`` stands for; as it is where there is none,
    so that who opens it says that there is no such file."""
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):  # no such person, or a name that no system takes
        return Path(path)


def files_in(text: str) -> list[str]:
    """Return the files that a person typed: one as it stands, or several as a shell reads them,
    with quotes, backslashes and ``~``; URIs and addresses as they are."""
    if _URI.match(text):
        return text.split()
    with contextlib.suppress(OSError):  # a name that is too long
        whole = expanded(text)
        if whole.is_file():
            return [str(whole)]
    try:
        words = shlex.split(text)
    except ValueError:  # a quote that is not closed
        words = [text]
    return [word if _URI.match(word) else str(expanded(word)) for word in words]


@contextlib.contextmanager
def edited(commands: Sequence[str]) -> Iterator[None]:
    """Let ``input`` edit lines on a terminal, complete ``commands`` and the files behind them, and
    remember lines from one time to the next."""
    try:
        import readline
    except ModuleNotFoundError:  # Python without it: lines are typed as they are
        readline = None  # type: ignore[assignment]
    if readline is None or not sys.stdin.isatty():
        yield
        return

    def complete(text: str, number: int) -> str | None:
        found = completions(readline.get_line_buffer()[: readline.get_endidx()], commands)
        return found[number] if number < len(found) else None

    with contextlib.suppress(OSError, RuntimeError):
        readline.read_history_file(history_file())
    readline.set_history_length(MOST_LINES)
    readline.set_completer_delims("")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        readline.set_completer(None)
        with contextlib.suppress(OSError, RuntimeError):  # no home, or it cannot be written
            history = history_file()
            history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            readline.write_history_file(history)
            history.chmod(0o600)


def history_file() -> Path:
    """Return where lines of earlier conversations are kept.

    Raises:
        RuntimeError: this user has no home folder.
    """
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "mobilevlm" / "chat_history"


def completions(line: str, commands: Sequence[str]) -> list[str]:
    """Return whole lines that a beginning may become: a command, or one with a file."""
    verb, space, typed = line.partition(" ")
    if not line.startswith("/"):
        return []
    if not space:
        return [f"{command} " for command in commands if command.startswith(verb)]
    before, name = _last_word(typed)
    folder, _, start = name.rpartition("/")
    shown = f"{folder}/" if "/" in name else ""
    try:
        entries = sorted(os.scandir(expanded(shown or ".")), key=lambda entry: entry.name)
        return [
            f"{verb} {before}{_escaped(shown + entry.name)}{'/' if entry.is_dir() else ''}"
            for entry in entries
            if entry.name.startswith(start) and (start or not entry.name.startswith("."))
        ]
    except (OSError, ValueError):  # no such folder, no name of one
        return []


def _last_word(typed: str) -> tuple[str, str]:
    """Split what is typed into the words before the last, and the last without its escapes."""
    start = 0
    for match in re.finditer(r"(?<!\\) ", typed):
        start = match.end()
    return typed[:start], re.sub(r"\\(.)", r"\1", typed[start:])


def _escaped(name: str) -> str:
    return re.sub(r"([\s'\"\\])", r"\\\1", name)
