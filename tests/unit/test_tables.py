"""Tables: names stay whole, nothing is markup, pipes get one plain line a row."""

from __future__ import annotations

import io
import re

import pytest

from mobilevlm.console.tables import Column, Styled, Table, show

pytestmark = pytest.mark.pure

NAME = "onnx/decoder_model_merged_q4_with_a_long_suffix.onnx"


class Terminal(io.StringIO):
    """Text of a terminal; rich reads its width from COLUMNS."""

    def isatty(self) -> bool:
        return True


def table() -> Table:
    view = Table(
        (Column("file", whole=True), Column("notes"), Column("MB", True, True)), "[/bold] x"
    )
    view.add(NAME, "one two three four five six seven eight nine ten eleven [reference]", "1.5")
    view.rule()
    view.add("short", Styled("[red]", "bold red"), "123.4", style="")
    return view


def test_pipes_get_one_aligned_line_a_row() -> None:
    file = io.StringIO()
    show(table(), file)
    title, head, first, second = file.getvalue().splitlines()
    assert title == "[/bold] x"
    assert head.split() == ["file", "notes", "MB"]
    assert first.startswith(NAME) and first.endswith("[reference]    1.5")
    assert second.endswith("123.4") and len(second) == len(first) == len(head)


def test_names_are_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    show(table(), file)
    text = file.getvalue()
    assert NAME in text
    assert "[/bold] x" in text and "[red]" in text and "[reference]" in text


def test_what_may_be_broken_fits_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    show(table(), file)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(NAME in line for line in lines)


def test_a_table_without_titles_has_no_head() -> None:
    view = Table((Column(""), Column("")))
    view.add("a", "b")
    file = io.StringIO()
    show(view, file)
    assert file.getvalue() == "a  b\n"
