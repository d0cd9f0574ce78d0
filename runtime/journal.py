"""A journal of answers: one JSON line each, in the order in which they were made.

A process may be killed at any moment: what was appended stays, and a last line that was torn is
dropped. The first line says which run it is of, so that another is not mixed in.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from mobilevlm.bundle_identity import lock_file
from mobilevlm.console import progress
from mobilevlm.console.terminal import shown
from mobilevlm.errors import MobileVLMError

SYNC_ROWS = 64
SYNC_SECONDS = 2.0
"""Records, and time, after which the disk must have what was appended."""
PATIENCE = 5.0
"""Seconds that workers of a run that was killed may take to end"""

Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class JournalKind:
    """Differences between the journals of the programs."""

    command: str
    """Program that writes it"""
    key: Callable[[Record], Hashable]
    """Returns what a record is of; raises KeyError, TypeError or ValueError for no record."""
    elsewhere: str
    """Words of a message: how to write to another file"""
    again: str
    """Words of a message: what to do about answers of another run"""

    @property
    def format(self) -> str:
        return f"{self.command} 1"


@dataclass(frozen=True)
class _Content:
    """Whole lines of a journal."""

    run: dict[str, Any] | None
    places: dict[Hashable, int]
    """Offset of each record; of two of one key the first counts"""
    lines: int
    end: int


class Journal:
    """The records that are there. One process at a time has it open."""

    def __init__(self, file: BinaryIO, path: Path, kind: JournalKind, content: _Content) -> None:
        self.path, self.kind = path, kind
        self._file, self._end, self._places = file, content.end, content.places
        self._unsynced, self._synced = 0, time.monotonic()

    def __len__(self) -> int:
        """Return how many records are there."""
        return len(self._places)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def get(self, key: Hashable) -> Record | None:
        """Return the record of this key, if it is there."""
        place = self._places.get(key)
        if place is None:
            return None
        self._file.seek(place)
        record: Record = json.loads(self._file.readline())
        return record

    def append(self, record: Record) -> None:
        """Add a record. A process that ends from here on leaves it to the next."""
        line = json_line(record)
        self._file.seek(self._end)
        self._file.write(line)
        self._file.flush()
        self._places.setdefault(self.kind.key(record), self._end)
        self._end += len(line)
        self._unsynced += 1
        if self._unsynced >= SYNC_ROWS or time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Return when the disk has it all."""
        os.fsync(self._file.fileno())
        self._unsynced, self._synced = 0, time.monotonic()

    def records(self, order: Iterable[Hashable] | None = None) -> Iterator[Record]:
        """Yield each record once, as they were made or in the order of these keys."""
        for key in list(self._places) if order is None else order:
            record = self.get(key)
            if record is not None:
                yield record

    def remove(self) -> None:
        """Remove the file: an output has it all."""
        self.path.unlink(missing_ok=True)


@contextmanager
def open_journal(
    path: Path, kind: JournalKind, run: Mapping[str, Any], restart: bool = False
) -> Iterator[Journal]:
    """Open the journal of a run, or begin one. ``run``: what makes a run another one, by names that
    a message can say; ``restart``: forget what is there.

    Raises:
        MobileVLMError: it is of another run, is no journal, or another process has it.
    """
    with _locked(path, kind) as file:
        content = _read(file, path, kind)
        if content.run is None or restart:
            first = json_line({"format": kind.format, "run": run})
            file.truncate(0)
            file.seek(0)
            file.write(first)
            content = _Content(dict(run), {}, 1, len(first))
        else:
            _check_run(path, kind, content.run, run)
            if content.end < file.seek(0, os.SEEK_END):
                progress.say(
                    f"{path}: line {content.lines + 1} was not written whole: it and what follows "
                    f"is done again"
                )
                file.truncate(content.end)
        file.flush()
        os.fsync(file.fileno())
        _sync_folder(path.parent)
        journal = Journal(file, path, kind, content)
        try:
            yield journal
        finally:
            journal.sync()


def json_line(record: Mapping[str, Any]) -> bytes:
    """Return a line of JSON; half a surrogate pair is written as JSON's escape."""
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


@contextmanager
def _locked(path: Path, kind: JournalKind) -> Iterator[BinaryIO]:
    """Open the file for this process alone."""
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            if not lock_file(file.fileno(), shared=False, seconds=PATIENCE):
                raise MobileVLMError(
                    f"{shown(path)}: another process is writing this output: wait for it, or "
                    f"{kind.elsewhere}"
                )
            if os.fstat(file.fileno()).st_nlink:  # else its owner has just removed it
                yield file
                return


def _read(file: BinaryIO, path: Path, kind: JournalKind) -> _Content:
    """Read what is whole.

    Raises:
        MobileVLMError: it is no journal.
    """
    header = file.readline()
    if not header.endswith(b"\n"):
        begun = json_line({"format": kind.format})[:-2]
        if not begun.startswith(header[: len(begun)]):
            raise _no_journal(path, kind)
        return _Content(None, {}, 0, 0)
    try:
        found = json.loads(header)
        run = found["run"] if found["format"] == kind.format else None
    except (ValueError, KeyError, TypeError):
        run = None
    if not isinstance(run, dict):
        raise _no_journal(path, kind)
    places: dict[Hashable, int] = {}
    lines, end = 1, len(header)
    for line in file:
        try:
            if not line.endswith(b"\n"):
                break
            places.setdefault(kind.key(json.loads(line)), end)
        except (ValueError, KeyError, TypeError):
            break
        lines, end = lines + 1, end + len(line)
    return _Content(run, places, lines, end)


def _check_run(
    path: Path, kind: JournalKind, theirs: Mapping[str, Any], run: Mapping[str, Any]
) -> None:
    names = [name for name in {**run, **theirs} if run.get(name) != theirs.get(name)]
    if names:
        raise MobileVLMError(
            f"{shown(path)}: left by a run with another {shown(', '.join(names))}: {kind.again}"
        )


def _no_journal(path: Path, kind: JournalKind) -> MobileVLMError:
    return MobileVLMError(
        f"{shown(path)}: no journal of '{kind.command}': remove it, or {kind.elsewhere}"
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
