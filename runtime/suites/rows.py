"""Rows of a benchmark's files: parquet as the hub has it, JSON, JSONL, TSV and CSV.

Columns of images are not read with the others: a row holds a function that reads one when its
question is asked.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm.console.terminal import shown
from mobilevlm.errors import ImageError, SuiteError
from mobilevlm.image import ImageInput
from mobilevlm.runtime.suites.question import OpenImage

ENDINGS = (".parquet", ".jsonl", ".json", ".tsv", ".csv")
"""Kinds of files; a folder is read by the first kind that it has."""
SPLITS = {"train", "test", "validation", "val", "dev", "testdev"}
IMAGE_ENDINGS = {"", ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
"""Endings of names of image files; SEED-Bench has some without any."""
LONGEST_NAME = 255
"""Characters of a file's name; a longer text in an image column is base64."""


@dataclass(frozen=True)
class Row:
    """A row, and the place that messages about it name."""

    place: str
    file: Path
    values: Mapping[str, Any]
    folder: ImageFolder

    def get(self, *names: str) -> Any:
        """Return the first of these columns that is there, or none."""
        for name in names:
            value = self.values.get(name)
            if value is not None and value != "":
                return value
        return None

    def need(self, *names: str) -> Any:
        """Return the first of these columns that is there.

        Raises:
            SuiteError: none is.
        """
        value = self.get(*names)
        if value is None:
            found = shown(", ".join(self.values), 200)
            raise SuiteError(
                f"{self.place}: no column {' or '.join(map(repr, names))} (found {found}): is this "
                f"the data of the suite?"
            )
        return value

    def text(self, *names: str) -> str:
        """Return a column as text, or an empty one."""
        value = self.get(*names)
        return "" if value is None else str(value).strip()

    def texts(self, *names: str) -> tuple[str, ...]:
        """Return a column of one or several texts, or of objects with ``answer`` as in VQA."""
        value = self.need(*names)
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(str(x.get("answer", "") if isinstance(x, dict) else x) for x in items)

    def image(self, *names: str) -> OpenImage | None:
        """Return what reads the image of the first of these columns that is there, or none.

        Raises:
            SuiteError: the column holds no image.
        """
        value = self.get(*names)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is None:
            return None
        if callable(value):
            read: OpenImage = value
            return read
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            content = value
            return lambda: content
        if isinstance(value, str):
            return image_of_text(value, self.folder, self.place)
        raise SuiteError(f"{self.place}: {names[0]}: expected an image, found {shown(value, 60)}")

    def need_image(self, *names: str) -> OpenImage:
        """Return what reads an image.

        Raises:
            SuiteError: there is none.
        """
        found = self.image(*names)
        if found is None:
            self.need(*names)
            raise SuiteError(f"{self.place}: {names[0]}: the row has no image")
        return found


class ImageFolder:
    """Image files below a folder, found by what a row calls them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, list[Path]] | None = None

    def find(self, name: str, place: str) -> Path:
        """Return the file whose path ends with this name.

        Raises:
            SuiteError: there is none, or several.
        """
        direct = self.folder / name
        if ".." not in Path(name).parts and not Path(name).is_absolute() and direct.is_file():
            return direct
        if self._found is None:
            self._found = {}
            for path in sorted(self.folder.rglob("*")):
                if path.suffix.lower() in IMAGE_ENDINGS and path.is_file():
                    self._found.setdefault(path.name, []).append(path)
        parts = Path(name).parts
        named = [
            path
            for path in self._found.get(Path(name).name, [])
            if path.relative_to(self.folder).parts[-len(parts) :] == parts
        ]
        if len(named) != 1:
            several = f"{len(named)} files of that name: keep one" if named else "not there"
            raise SuiteError(f"{place}: image {shown(name)} below {self.folder}: {several}")
        return named[0]


def image_of_text(text: str, folder: ImageFolder, place: str) -> OpenImage:
    """Return what reads an image that a row names as a file or holds in base64."""
    if text.startswith("data:"):
        return lambda: text
    if len(text) > LONGEST_NAME:
        return lambda: _decoded(text, place)
    path = folder.find(text, place)
    return lambda: path


def _decoded(text: str, place: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{place}: damaged base64 of the image ({error})") from None


def read_rows(data: Path, split: str) -> list[Row]:
    """Return the rows of a file, or of the files in a folder, of a split (all, if it has no name).

    Raises:
        SuiteError: there are none, or a file cannot be read.
    """
    home = data if data.is_dir() else data.parent
    folder = ImageFolder(home)
    rows: list[Row] = []
    for path in _files(data, split):
        reader = _READERS[path.suffix.lower()]
        for number, values in enumerate(reader(path), 1):
            if not isinstance(values, Mapping):
                raise SuiteError(f"{path}: row {number}: expected columns, found {shown(values)}")
            said = values.get("split")
            if split and isinstance(said, str) and _same_split(said) not in ("", split):
                continue
            rows.append(Row(f"{path}: row {number}", path, values, folder))
    if not rows:
        raise SuiteError(f"{data}: no rows{f' of the split {split!r}' if split else ''}")
    return rows


def _same_split(name: str) -> str:
    word = name.lower()
    return {"val": "validation"}.get(word, word)


def _files(data: Path, split: str) -> list[Path]:
    if data.is_file():
        if data.suffix.lower() not in ENDINGS:
            raise SuiteError(f"{data}: expected one of {', '.join(ENDINGS)}")
        return [data]
    if not data.is_dir():
        raise SuiteError(f"{data}: no such file or folder: give the suite's data with --data")
    for ending in ENDINGS:
        found = [path for path in sorted(data.rglob(f"*{ending}")) if path.is_file()]
        if found:
            return _of_split(data, found, split)
    raise SuiteError(f"{data}: no {', '.join(ENDINGS)} below it: docs/how-to/evaluation.md tells "
                     f"where the data comes from")  # fmt: skip


def _of_split(data: Path, found: Sequence[Path], split: str) -> list[Path]:
    """Return the files whose names say this split; those that say none belong to each."""
    if not split:
        return list(found)
    kept: list[Path] = []
    others: set[str] = set()
    for path in found:
        words = set(re.split(r"[^a-z0-9]+", str(path.relative_to(data)).lower()))
        said = {_same_split(word) for word in words & SPLITS}
        if not said or split in said:
            kept.append(path)
        others |= said
    if not kept:
        raise SuiteError(
            f"{data}: no files of the split {split!r} (found {', '.join(sorted(others))}): give "
            f"--split"
        )
    return kept


def _read_json(path: Path) -> Iterator[Any]:
    """Yield the rows of a list, of the lists in an object, or of an object of objects by id."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _read_lines(path)  # POPE's files are lines, whatever their name says
            return
        raise SuiteError(f"{path}: no JSON: {shown(error, 120)}") from None
    if isinstance(data, dict):
        lists = [rows for name, rows in data.items() if name in ("questions", "annotations", "data")
                 and isinstance(rows, list)]  # fmt: skip
        if lists:
            for rows in lists:
                yield from rows
            return
        for name, values in data.items():
            yield {"id": name, **values} if isinstance(values, dict) else values
        return
    if not isinstance(data, list):
        raise SuiteError(f"{path}: expected a list of questions, found {shown(data, 60)}")
    yield from data


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise SuiteError(f"{path}: line {number}: no JSON: {shown(error)}") from None


def _read_table(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a TSV or CSV file; a long image column is read again when it is needed."""
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open("rb") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter=delimiter)
        try:
            names = [name.lstrip("\ufeff").strip() for name in next(reader, [])]
            while True:
                start = lines.offset
                cells = next(reader, None)
                if cells is None:
                    return
                if not cells:
                    continue
                if len(cells) > len(names):
                    raise SuiteError(
                        f"{path}: line {reader.line_num}: {len(cells)} columns under {len(names)} "
                        f"names"
                    )
                row: dict[str, Any] = dict(zip(names, cells, strict=False))
                image = row.get("image", "")
                if len(image) > LONGEST_NAME:
                    column = names.index("image")
                    row["image"] = _table_image(path, delimiter, start, column)
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise SuiteError(f"{path}: line {reader.line_num}: {shown(error, 120)}") from None


class _Lines:
    """Lines of a file as text, and the offset of the next one."""

    def __init__(self, file: Any) -> None:
        self._file, self.offset = file, file.tell()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line: bytes = self._file.readline()
        if not line:
            raise StopIteration
        self.offset += len(line)
        return line.decode()


def _table_image(path: Path, delimiter: str, start: int, column: int) -> OpenImage:
    def read() -> ImageInput:
        with path.open("rb") as file:
            file.seek(start)
            cells = next(csv.reader(_Lines(file), delimiter=delimiter))
        return _decoded(cells[column], str(path))

    return read


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    from mobilevlm.runtime.parquet import rows_with_images

    return rows_with_images(path)


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".tsv": _read_table,
    ".csv": _read_table,
}
