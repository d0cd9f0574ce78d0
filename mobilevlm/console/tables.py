"""Tables for people: drawn to fit a terminal, one plain line a row in pipes and files.

No word is broken. Where the words of a table do not fit beside each other, each row is drawn as a
record: the first cell, and below it the others with their titles.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO, TypeAlias

from mobilevlm.console.terminal import columns, filled, plain


@dataclass(frozen=True)
class Column:
    """A column; ``whole``: its cells (names, paths) are never broken over lines."""

    title: str
    whole: bool = False
    right: bool = False


@dataclass(frozen=True)
class Styled:
    """Text in a style of rich, such as ``bold red``; plain where there is no terminal."""

    text: str
    style: str


Cell: TypeAlias = "str | Styled"


@dataclass
class Table:
    """Rows of text under titles. Nothing in a cell is markup."""

    columns: Sequence[Column]
    title: str = ""
    rows: list[tuple[Cell, ...] | None] = field(default_factory=list)
    """None: a rule between the row before and the row after it."""

    def add(self, *cells: Cell, style: str = "") -> None:
        """Append a row; ``style`` is that of all its cells."""
        self.rows.append(tuple(Styled(_text(cell), style) if style else cell for cell in cells))

    def rule(self) -> None:
        """Append a rule."""
        self.rows.append(None)


def show(table: Table, file: TextIO | None = None) -> None:
    """Print a table on ``file`` (stdout)."""
    file = file or sys.stdout
    if file.isatty():
        if any(column.title for column in table.columns) and _least_width(table) > columns():
            print("\n".join(_records(table)), file=file)
        else:
            _draw(table, file)
    else:
        print("\n".join(_lines(table)), file=file)


def _text(cell: Cell) -> str:
    return plain(cell.text if isinstance(cell, Styled) else cell)


def _title(table: Table) -> str:
    return "\n".join(map(plain, table.title.splitlines()))


def _lines(table: Table) -> list[str]:
    """Return the table as aligned text, one line a row, without rules."""
    cells = [[column.title for column in table.columns]]
    cells += [[_text(cell) for cell in row] for row in table.rows if row is not None]
    if not any(cells[0]):
        cells = cells[1:]
    widths = [max(len(row[index]) for row in cells) for index in range(len(table.columns))]
    lines = [_title(table)] if table.title else []
    for row in cells:
        aligned = [
            text.rjust(width) if column.right else text.ljust(width)
            for text, width, column in zip(row, widths, table.columns, strict=True)
        ]
        lines.append("  ".join(aligned).rstrip())
    return lines


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line of text on ``file`` (stdout); on a terminal broken between words alone."""
    print(filled(line, file or sys.stdout), file=file or sys.stdout)


def _records(table: Table) -> list[str]:
    """Return a row as several lines: a table that is too wide for the terminal."""
    width = max(len(column.title) for column in table.columns[1:])
    lines = [_title(table), ""] if table.title else []
    for row in table.rows:
        if row is None:
            continue
        first, *others = map(_text, row)
        lines.append(first)
        for column, text in zip(table.columns[1:], others, strict=True):
            if text:
                begin = f"  {plain(column.title):<{width}}  "
                room = max(columns() - len(begin), 20)
                parts = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
                lines += [begin + parts[0], *(" " * len(begin) + part for part in parts[1:])]
        lines.append("")
    return lines


def _draw(table: Table, file: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawing
    from rich.text import Text

    console = Console(file=file)
    titled = any(column.title for column in table.columns)
    drawing = Drawing(
        title=Text(_title(table)) if table.title else None,
        box=box.SIMPLE_HEAD if titled else None,
        show_header=titled,
        pad_edge=False,
    )
    for index, column in enumerate(table.columns):
        drawing.add_column(
            Text(column.title),
            no_wrap=column.whole,
            min_width=_longest(table, index, column.whole),
            overflow="fold",
            justify="right" if column.right else "left",
        )
    for row in table.rows:
        if row is None:
            drawing.add_section()
        else:
            drawing.add_row(*(Text(_text(cell), getattr(cell, "style", "")) for cell in row))
    console.width = max(console.width, _least_width(table))
    console.print(drawing, crop=False, soft_wrap=False)


def _least_width(table: Table) -> int:
    """Return the width at which no word, and no cell of a whole column, is broken."""
    longest = [_longest(table, index, item.whole) for index, item in enumerate(table.columns)]
    return sum(longest) + 3 * (len(longest) - 1) + 2


def _longest(table: Table, index: int, whole: bool) -> int:
    """Return the characters of a column's longest cell (``whole``) or word."""
    texts = [table.columns[index].title]
    texts += [_text(row[index]) for row in table.rows if row is not None]
    words = texts if whole else [word for text in texts for word in text.split()]
    return max(map(len, words), default=0)
