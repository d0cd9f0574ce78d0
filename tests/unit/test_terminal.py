"""Text from files and models on its way to a terminal."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import BundleOf

import mobilevlm.cli
from mobilevlm.bundle import read_manifest, write_manifest
from mobilevlm.console import progress
from mobilevlm.console.terminal import plain, plain_answer
from mobilevlm.errors import PlanWarning

HOSTILE = "a\x1b[31m\x9b2J\x07\x7f\u202eb[/bold]\r\n\tc"
SHOWN = "a\ufffd[31m\ufffd2J\ufffd\ufffd\ufffdb[/bold]  c"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_name_is_one_line_without_what_a_terminal_obeys() -> None:
    assert plain(HOSTILE) == SHOWN
    assert plain("Größe 日本語 👩‍👩‍👧 عربى e\u0301") == "Größe 日本語 👩‍👩‍👧 عربى e\u0301"


def test_an_answer_keeps_its_lines_and_loses_control_characters_on_a_terminal_only() -> None:
    answer = "one\n\ttwo \x1b]0;title\x07\x9b2J\r\x00 عربى"
    assert plain_answer(answer, Terminal()) == "one\n\ttwo ]0;title2J عربى"
    assert plain_answer(answer, io.StringIO()) == answer


def test_errors_show_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mobilevlm.cli.main(["inspect", f"/nowhere/{HOSTILE}"])
    assert f"/nowhere/{SHOWN}".replace("]  c", "] c") in capsys.readouterr().err
    with pytest.raises(SystemExit):
        mobilevlm.cli.main([HOSTILE])
    assert "\x1b" not in capsys.readouterr().err


def test_warnings_show_no_control_characters() -> None:
    shown = mobilevlm.cli._format_warning(PlanWarning(HOSTILE), PlanWarning, "file", 1)
    assert shown == f"mobilevlm: warning: {SHOWN}\n"
    shown = mobilevlm.cli._format_warning(UserWarning(HOSTILE), UserWarning, "file", 1)
    assert shown == f"file:1: UserWarning: {SHOWN}\n"


def test_progress_shows_neither_control_characters_nor_markup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_enabled", True)
    progress.say(HOSTILE)
    assert terminal.getvalue() == f"{SHOWN}\n"
    with progress.track("[/bold]\x07", 1) as advance:
        advance(1)
    assert "[/bold]\ufffd" in terminal.getvalue()


def test_json_escapes_what_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    mobilevlm.cli.show_json({"name": HOSTILE})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"name": HOSTILE}
    assert not any((ord(letter) < 32 and letter != "\n") or 127 <= ord(letter) < 160
                   for letter in printed)  # fmt: skip


def test_tables_show_neither_control_characters_nor_markup() -> None:
    from mobilevlm.console.tables import Column, Table, show

    for stream in (Terminal(), io.StringIO()):
        table = Table((Column("name", whole=True), Column("value")), title="[/bold]\x1b[2J")
        table.add("[/bold]", HOSTILE)
        show(table, stream)
        printed = stream.getvalue()
        assert "[/bold]" in printed and "\x1b[2J" not in printed and "\x9b" not in printed
        assert "\x1b[31m" not in printed and "\x07" not in printed


def test_a_model_whose_name_is_markup_is_inspected(
    bundle_of: BundleOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_of("tiny", "fp32"), bundle)
    manifest, _ = read_manifest(bundle)
    spec = replace(manifest.spec, name="[/bold]\x1b[31m")
    write_manifest(bundle, replace(manifest, spec=spec))
    mobilevlm.cli.main(["inspect", str(bundle)])
    printed = capsys.readouterr().out
    assert "[/bold]\ufffd[31m" in printed and "\x1b" not in printed
