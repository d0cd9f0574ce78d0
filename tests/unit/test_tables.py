"""Tables: names stay whole, nothing is markup, pipes get one plain line a row."""

from __future__ import annotations

import io
import re

import pytest

from mobilevlm.console.tables import Column, Styled, Table, say, show

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


def test_a_table_whose_words_do_not_fit_is_drawn_as_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    view = Table((Column("target", whole=True), Column("device"), Column("MB", True, True)))
    path = "docs/how-to/a-path-that-is-longer-than-others.md"
    view.add("onnxruntime-genai", f"apps in C and Swift through onnxruntime-genai, {path}", "4000")
    view.add(NAME, "", "1")
    file = Terminal()
    show(view, file)
    lines = file.getvalue().splitlines()
    assert lines[0] == "onnxruntime-genai"
    assert lines[1].startswith("  device  apps in C")
    assert "  MB      4000" in lines
    assert max(map(len, lines)) <= 80
    for name in ("onnxruntime-genai,", path, NAME):
        assert any(name in line for line in lines[1:]), name


def test_no_word_of_a_column_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    words = ("android-qnn-qcs6490", "Dragonwing-on-a-board", "one two three four five " * 9)
    view = Table(tuple(map(Column, ("target", "device", "notes"))))
    view.add(*words)
    file = Terminal()
    show(view, file)
    text = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert all(word in text for word in words[:2])
    assert max(map(len, text.splitlines())) <= 80


def test_a_line_is_broken_between_words_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    line = "Measured on this machine with onnxruntime-genai and --max-image-tokens set"
    file, pipe = Terminal(), io.StringIO()
    say(line, file)
    say(line, pipe)
    assert pipe.getvalue() == f"{line}\n"
    assert max(map(len, file.getvalue().splitlines())) <= 40
    assert file.getvalue().split() == line.split()


def test_a_table_without_titles_has_no_head() -> None:
    view = Table((Column(""), Column("")))
    view.add("a", "b")
    file = io.StringIO()
    show(view, file)
    assert file.getvalue() == "a  b\n"
