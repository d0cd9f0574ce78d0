"""Progress: a bar on a terminal, a line now and then in a log, nothing unless it is turned on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mobilevlm.console import progress

pytestmark = pytest.mark.pure

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def enabled() -> Iterator[None]:
    progress.enable()
    yield
    progress.enable(False)


def test_a_log_gets_a_line_now_and_then(
    enabled: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with progress.track("search", 8) as advance:
        for _ in range(8):
            now += progress.LINES_EVERY / 2
            advance(1)
    assert capsys.readouterr().err.split("\n") == [
        "search      25 %, 0:00:30 left",
        "search      50 %, 0:00:20 left",
        "search      75 %, 0:00:10 left",
        "",
    ]


def test_lines_of_counted_work_have_the_rate_of_this_run_and_the_time_left(
    enabled: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with progress.track("rows", 1000, done=500, unit="rows") as advance:
        now += 20
        advance(50)
    assert capsys.readouterr().err == "rows        55 %, 2.5 rows/s, 0:03:00 left\n"


def test_quick_work_says_nothing_in_a_log(enabled: None, capsys: Capture) -> None:
    with progress.track("search", 100) as advance:
        for _ in range(100):
            advance(1)
    assert capsys.readouterr().err == ""


def test_nothing_is_shown_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(progress, "LINES_EVERY", 0.0)
    with progress.track("search", 2) as advance:
        advance(1)
    assert capsys.readouterr().err == ""
