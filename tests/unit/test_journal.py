"""A journal: what counts of it after a kill, and who may write to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from mobilevlm.errors import MobileVLMError
from mobilevlm.runtime.batch.batch import JOURNAL
from mobilevlm.runtime.journal import Journal, json_line, open_journal

pytestmark = pytest.mark.pure

Open: TypeAlias = Callable[[], AbstractContextManager[Journal]]


def record(index: object) -> dict[str, Any]:
    return {"index": index, "answer": f"\ud800{index}", "error": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def again(path: Path) -> Open:
    """Opens the same journal, as the same command does."""
    return lambda: open_journal(path, JOURNAL, {"prompt": "a" * 40})


def test_each_record_is_there_once_in_either_order(path: Path, again: Open) -> None:
    with again() as journal:
        for index in (4, 2, 7):
            journal.append(record(index))
    torn = json_line(record(5))[:-1]
    path.write_bytes(path.read_bytes() + json_line(record(2)) + torn)
    with again() as journal:
        assert len(journal) == 3 and 7 in journal and 5 not in journal
        journal.append(record(5))
        assert [row["index"] for row in journal.records(range(9))] == [2, 4, 5, 7]
        assert list(journal.records()) == [record(index) for index in (4, 2, 7, 5)]
        assert journal.get(5) == record(5) and journal.get(6) is None
    assert [json.loads(line)["index"] for line in path.read_bytes().splitlines()[1:]] == [
        4, 2, 7, 2, 5,
    ]  # fmt: skip


@pytest.mark.parametrize("index", ["3", None, [3], 2.0])
def test_a_line_that_is_no_record_ends_what_counts(index: object, path: Path, again: Open) -> None:
    with again() as journal:
        journal.append(record(0))
    path.write_bytes(path.read_bytes() + json_line(record(index)) + json_line(record(1)))
    with again() as journal:
        assert [row["index"] for row in journal.records()] == [0]
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("length", range(0, 60, 7))
def test_a_header_that_was_torn_begins_a_journal_anew(length: int, path: Path, again: Open) -> None:
    with again():
        pass
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    with again() as journal:
        assert len(journal) == 0
    assert path.read_bytes() == whole


def test_one_run_at_a_time_has_a_journal(again: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilevlm.runtime.journal.PATIENCE", 0.0)
    with (
        again(),
        pytest.raises(MobileVLMError, match="another process is writing this output"),
        again(),
    ):
        pass
