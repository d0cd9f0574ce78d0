"""Tables for people: drawn to fit a terminal, one plain line a row in pipes and files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO, TypeAlias

from mobilevlm.console.terminal import plain


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
NARROWEST = 10
"""Characters that a column whose cells may be broken has at least."""


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
    for column in table.columns:
        drawing.add_column(
            Text(column.title),
            no_wrap=column.whole,
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
    """Return the characters of a line in which no name is broken."""
    total = 0
    for index, column in enumerate(table.columns):
        texts = [column.title, *(_text(row[index]) for row in table.rows if row is not None)]
        longest = max(map(len, texts))
        total += (longest if column.whole else min(longest, NARROWEST)) + 3
    return total
