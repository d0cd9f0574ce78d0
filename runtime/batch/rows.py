"""Rows of the input, read one by one: a folder of images, JSON lines, or a parquet file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobilevlm.console.terminal import shown
from mobilevlm.errors import MobileVLMError
from mobilevlm.runtime.parquet import ParquetRows, Skip
from mobilevlm.whole_file import file_sha256

LONGEST_LINE = 1 << 28
"""Bytes of a line of JSON, which may hold images as data: URIs."""


@dataclass(frozen=True)
class Row:
    """A row of the input."""

    index: int
    """From 0 on"""
    columns: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    """Why it could not be read"""


@dataclass(frozen=True)
class Input:
    """Rows that can be read as often as needed."""

    path: Path
    columns: tuple[str, ...]
    """Their names; of JSON lines those of the first row that can be read"""
    count: int
    digest: str
    """Digest of the content; of a folder, of its files' names, sizes and times"""
    read: Callable[[Collection[str], Skip], Iterator[Row]]
    """Yields the rows that are not skipped, with these columns at least."""

    @property
    def folder(self) -> Path:
        """Folder in which paths of images begin."""
        return self.path if self.path.is_dir() else self.path.parent


def open_input(path: Path) -> Input:
    """Open what a person names: a folder, ``.jsonl`` or ``.parquet``.

    Raises:
        MobileVLMError: it is something else, has no rows, or cannot be read.
        MissingExtraError: pyarrow is not installed.
    """
    if path.is_dir():
        opened = _open_folder(path)
    elif not path.is_file():
        raise MobileVLMError(f"{shown(path)}: no such file or folder: {_EXPECTED}")
    elif path.suffix.lower() in (".jsonl", ".ndjson"):
        opened = _open_lines(path)
    elif path.suffix.lower() == ".parquet":
        opened = _open_parquet(path)
    else:
        raise MobileVLMError(f"{shown(path)}: {_EXPECTED}")
    if not opened.count:
        raise MobileVLMError(f"{shown(path)}: it has no rows: {_EXPECTED}")
    return opened


_EXPECTED = "expected a folder of images, a .jsonl file or a .parquet file"


def _open_folder(path: Path) -> Input:
    from PIL import Image

    known = {*Image.registered_extensions(), ".heic", ".heif"}
    names: list[str] = []
    digest = hashlib.sha256()
    for place, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = Path(place, name)
            if not name.startswith(".") and file.suffix.lower() in known:
                names.append(os.path.relpath(file, path))
                status = file.stat()
                stamp = f"{names[-1]}\0{status.st_size}\0{status.st_mtime_ns}\n"
                digest.update(stamp.encode("utf-8", "surrogateescape"))

    def read(columns: Collection[str], skip: Skip) -> Iterator[Row]:
        for index, name in enumerate(names):
            if not skip(index):
                yield Row(index, {"image": name, "name": Path(name).name, "stem": Path(name).stem})

    return Input(path, ("image", "name", "stem"), len(names), digest.hexdigest(), read)


def _open_lines(path: Path) -> Input:
    def read(columns: Collection[str], skip: Skip) -> Iterator[Row]:
        for index, line in enumerate(_lines(path)):
            if not skip(index):
                yield _row(index, line)

    count, first = 0, Row(0, error="no row")
    for line in _lines(path):
        if first.error is not None:
            first = _row(count, line)
        count += 1
    if count and first.error is not None:
        raise MobileVLMError(f"{shown(path)}: no row is a JSON object; the last: {first.error}")
    return Input(path, tuple(first.columns), count, file_sha256(path), read)


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines that are not blank."""
    with path.open("rb") as file:
        for number in range(1 << 62):
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise MobileVLMError(
                    f"{shown(path)}: line {number + 1} has more than {LONGEST_LINE} bytes: give "
                    f"images as files"
                )
            if line := line.removeprefix(b"\xef\xbb\xbf" if number == 0 else b"").strip():
                yield line


def _row(index: int, line: bytes) -> Row:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(index, error=f"no JSON ({shown(error, 120)})")
    if not isinstance(found, dict):
        return Row(index, error=f"expected a JSON object, found {type(found).__name__}")
    return Row(index, found)


def _open_parquet(path: Path) -> Input:
    rows = ParquetRows(path)

    def read(columns: Collection[str], skip: Skip) -> Iterator[Row]:
        names = [name for name in rows.columns if name in columns]
        for index, values in rows.read(names, skip):
            yield Row(index, values)

    return Input(path, rows.columns, len(rows), file_sha256(path), read)
