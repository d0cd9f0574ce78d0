"""Rows of parquet files. pyarrow is of the extra ``[batch]``.

An image as the hub has it is a struct of ``bytes`` and ``path``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from mobilevlm.console.terminal import shown
from mobilevlm.errors import MobileVLMError, require

BATCH = 16
"""Rows that are in memory at a time"""
RECENT = 32
"""Values of image columns that are kept for the next who ask for them"""

Skip: TypeAlias = Callable[[int], bool]
"""Tells which rows need not be read."""


def parquet_module() -> Any:
    """Return ``pyarrow.parquet``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise require("pyarrow", "batch", "reading and writing parquet") from None
    return pyarrow.parquet


class ParquetRows:
    """Rows of a file, which can be read as often as needed."""

    def __init__(self, path: Path) -> None:
        """Read its schema.

        Raises:
            MissingExtraError: pyarrow is not installed.
            MobileVLMError: it is no parquet file.
        """
        self.path = path
        parquet = parquet_module()
        try:
            with parquet.ParquetFile(path) as file:
                self._schema, metadata = file.schema_arrow, file.metadata
                leaves = [file.schema.column(index).path for index in range(len(file.schema))]
        except Exception as error:  # a decoder of others' on a file of others'
            raise self._damaged(error) from None
        self.columns: tuple[str, ...] = tuple(self._schema.names)
        self.leaves: Sequence[str] = leaves
        """Paths of what columns consist of, such as ``image.bytes``"""
        self._firsts = [0]
        """First row of each group, and the number of rows"""
        for group in range(metadata.num_row_groups):
            self._firsts.append(self._firsts[-1] + metadata.row_group(group).num_rows)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._firsts[-1]

    def group(self, index: int) -> int:
        """Return the row group that has this row."""
        return bisect_right(self._firsts, index) - 1

    def read(
        self, columns: Collection[str], skip: Skip = lambda index: False
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the numbers, and these columns or leaves, of the rows that are not skipped.

        Raises:
            MobileVLMError: the file is damaged.
        """
        names = list(columns)
        try:
            with parquet_module().ParquetFile(self.path, pre_buffer=False) as file:
                for group, first in enumerate(self._firsts[:-1]):
                    if all(skip(index) for index in range(first, self._firsts[group + 1])):
                        continue
                    index = first
                    for batch in file.iter_batches(BATCH, row_groups=[group], columns=names):
                        found = batch.to_pylist() if names else [{}] * batch.num_rows
                        for number, row in enumerate(found):
                            if not skip(index + number):
                                yield index + number, row
                        index += batch.num_rows
        except (OSError, ValueError, ArithmeticError, NotImplementedError) as error:
            raise self._damaged(error) from None

    def image_columns(self) -> dict[str, bool]:
        """Return the columns of the hub's images, with True where a row has a list of them."""
        import pyarrow

        types, found = pyarrow.types, {}
        for column in self._schema:
            several = types.is_list(column.type) or types.is_large_list(column.type)
            kind = column.type.value_type if several else column.type
            if types.is_struct(kind) and {"bytes", "path"} <= {part.name for part in kind}:
                found[column.name] = several
        return found

    def _damaged(self, error: Exception) -> MobileVLMError:
        return MobileVLMError(f"{shown(self.path)}: damaged parquet file ({shown(error, 160)})")


def rows_with_images(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file; each of the hub's images is a function that reads its bytes.

    Raises:
        MissingExtraError: pyarrow is not installed.
        MobileVLMError: it cannot be read.
    """
    rows = ParquetRows(path)
    columns = rows.image_columns()
    kept = [
        leaf for leaf in rows.leaves if leaf.split(".")[0] not in columns or leaf.endswith(".path")
    ]
    images = _Images(rows)
    for index, values in rows.read(kept):
        for name, several in columns.items():
            there = values.get(name)
            if several:
                places = range(len(there or ()))
                values[name] = [images.reader(name, index, place) for place in places]
            elif there is not None:
                values[name] = images.reader(name, index, None)
        yield values


class _Images:
    """Images of a file, read one after another; a step back begins its row group anew."""

    def __init__(self, rows: ParquetRows) -> None:
        self._rows = rows
        self._open: dict[str, tuple[int, Iterator[tuple[int, dict[str, Any]]]]] = {}
        """Number of the row that comes next, and the rows from there on, of each column"""
        self._value = lru_cache(RECENT)(self._read)

    def reader(self, name: str, index: int, place: int | None) -> Callable[[], bytes]:
        """Return what reads an image of a row. ``place``: its number in a list of them."""

        def read() -> bytes:
            value = self._value(name, index)
            content = (value if place is None else value[place])["bytes"]
            if not content:
                raise MobileVLMError(f"{self._rows.path}: {name}: the image is not in the file")
            return bytes(content)

        return read

    def _read(self, name: str, index: int) -> Any:
        following, rows = self._open.get(name, (len(self._rows), iter(())))
        last = self._rows.group(max(following - 1, 0))
        if index < following or self._rows.group(index) != last:
            rows = self._rows.read([name], lambda number: number < index)
        for number, values in rows:
            if number == index:
                self._open[name] = index + 1, rows
                return values[name]
        raise MobileVLMError(f"{shown(self._rows.path)}: it lost rows while it was read")
