"""benchmarks/compare.py with workers that only count: rounds, interruptions, going on."""

from __future__ import annotations

import importlib.util
import json
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare
import pytest
from comparison import measure
from comparison.candidates import LLAMA, OURS, Absent, Candidate, LineUp
from comparison.measure import Rounds
from comparison.results import read_result
from comparison.roofline import Peaks
from comparison.work import NotSupportedError

from mobilevlm.errors import MobileVLMError

ARGUMENTS = ("nano", "--rounds", "3", "--load-rounds", "2", "--threads", "1", "--quiet")
WHOLE = Rounds(2, 3, 2)


class Counting:
    """A worker's place. Every request is a line of ``asked``; the one at ``stop`` is SIGTERM."""

    asked: list[str]
    stop: int
    parts: frozenset[str]
    """Candidates without an image encoder."""

    def __init__(self, python: str | None) -> None:
        self.name = ""

    def ask(self, action: str, *arguments: Any, **fields: Any) -> Any:
        self.name = fields.get("options", {}).get("name", self.name)
        if len(self.asked) == self.stop:
            signal.raise_signal(signal.SIGTERM)
        self.asked.append(f"{self.name} {action} {arguments[-1] if arguments else ''}")
        if action == "open":
            return {"import": 0.1, "load": 1.0}
        if action == "memory":
            return {"peak": 100.0, "own": 50.0}
        if action in ("encode", "ask") and self.name in self.parts:
            raise NotSupportedError("decoder only")
        return 1.0 if action == "encode" else (2.0, 0.5)

    def close(self) -> None:
        pass


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Calls the command line with workers that are interrupted at a request; its exit status."""
    weights = tmp_path / "weights"
    weights.write_bytes(b"x" * 1000)

    def line_up(*_: Any) -> LineUp:
        names = ("mobilevlm a", "b")
        present = [Candidate(n, OURS, n, {"name": n}, (weights,)) for n in names]
        return LineUp(present, [Absent("c", "cannot be made: why")], {"b": "b 1.0"})

    spec = SimpleNamespace(
        image=SimpleNamespace(usual_edge=8, preparation=None),
        decoder=SimpleNamespace(hidden_size=8, vocab_size=500, context_length=2048),
    )
    monkeypatch.setattr(compare, "Artifacts", lambda *_: SimpleNamespace(name="nano", spec=spec))
    monkeypatch.setattr(compare, "asked_about", lambda *_: compare.Photo((8, 8), (16,), 4))
    monkeypatch.setattr(compare, "line_up", line_up)
    monkeypatch.setattr(compare, "measure_peaks", lambda threads: Peaks(1.0, 2.0, 3.0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no pictures
    monkeypatch.setattr(measure, "Worker", Counting)
    monkeypatch.setattr(measure, "PAUSE", 0)

    def run(stop: int = -1, arguments: tuple[str, ...] = ARGUMENTS) -> int:
        Counting.asked, Counting.stop, Counting.parts = [], stop, frozenset(["b"])
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments, "-o", str(tmp_path / "out")])
        return compare.main()

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)


def rows(folder: Path) -> dict[str, dict[str, int]]:
    """How many samples there are, by candidate and row."""
    result = read_result(folder / "out" / "compare.json")
    return {e.name: {k: len(v) for k, v in e.rows.items() if v} for e in result.entries}


def test_candidates_take_turns_in_every_round(runs: Any) -> None:
    assert runs() == 0
    encodes = [line for line in Counting.asked if " encode 10" in line]
    assert encodes == [f"{n} encode {v}" for v in (100, 101, 102) for n in ("mobilevlm a", "b")]
    loads = [line.split(" open")[0] for line in Counting.asked if " open" in line]
    # cold and warm by load round, then one for all rounds of the stages
    assert loads == ["mobilevlm a", "mobilevlm a", "b", "b"] * 2 + ["mobilevlm a", "b"]


def test_what_a_peer_cannot_do_is_said_once(runs: Any, tmp_path: Path) -> None:
    assert runs() == 0
    text = (tmp_path / "out" / "compare.md").read_text()
    assert text.count("- b: decoder only") == 1 and "- c: cannot be made: why" in text


def test_an_interrupted_run_goes_on_with_the_round_that_was_not_complete(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs() == 0
    whole, all_asked = rows(tmp_path), Counting.asked
    second_round = all_asked.index("mobilevlm a encode 101")
    (tmp_path / "out" / "compare.json").unlink()

    assert runs(stop=second_round + 2) == 130  # a candidate has begun its second round
    result = read_result(tmp_path / "out" / "compare.json")
    assert (result.finished, result.done, result.planned) == (False, Rounds(2, 1, 0), WHOLE)
    assert rows(tmp_path)["mobilevlm a"]["encode"] == 1  # not the one of that round
    out, err = capsys.readouterr()
    said = "2 of 2 rounds of loads, 1 of 3 rounds of stages, 0 of 2 rounds of curves"
    assert said in out and said in (tmp_path / "out" / "compare.md").read_text()
    assert "goes on" in err

    assert runs() == 0
    assert (
        Counting.asked[Counting.asked.index("mobilevlm a encode 101") :]
        == (all_asked[second_round:])
    )
    assert not any(" encode 100" in line for line in Counting.asked)
    result = read_result(tmp_path / "out" / "compare.json")
    assert (result.finished, result.done) == (True, WHOLE)
    assert rows(tmp_path) == whole
    assert "Interrupted" not in (tmp_path / "out" / "compare.md").read_text()


def test_every_request_can_be_the_last_and_nothing_is_lost_or_counted_twice(
    runs: Any, tmp_path: Path
) -> None:
    assert runs() == 0
    whole, count = rows(tmp_path), len(Counting.asked)
    for stop in range(0, count, 3):
        (tmp_path / "out" / "compare.json").unlink(missing_ok=True)
        assert runs(stop) == 130
        assert runs() == 0
        assert rows(tmp_path) == whole, stop


def test_an_interruption_in_the_first_round_leaves_an_earlier_result(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs() == 0
    before = (tmp_path / "out" / "compare.json").read_bytes()
    capsys.readouterr()
    assert runs(stop=1) == 130
    assert capsys.readouterr() == ("", "interrupted: no round was complete\n")
    assert (tmp_path / "out" / "compare.json").read_bytes() == before


@pytest.mark.parametrize("other", ["arguments", "machine", "files", "damaged"])
def test_another_run_begins_anew(
    other: str, runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runs(stop=30) == 130
    arguments: tuple[str, ...] = ARGUMENTS
    path = tmp_path / "out" / "compare.json"
    if other == "arguments":
        arguments = (*ARGUMENTS, "--memory", "9")
    elif other == "files":
        (tmp_path / "weights").write_bytes(b"x" * 1001)
    elif other == "machine":
        data = json.loads(path.read_text())
        data["machine"]["processor"] = "another"
        path.write_text(json.dumps(data))
    else:
        path.write_text(path.read_text()[:-20])
    assert runs(arguments=arguments) == 0
    assert "mobilevlm a encode 0" in Counting.asked  # the first round of loads
    assert read_result(path).done == WHOLE


def test_the_targets_of_an_earlier_run_are_printed_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Path(compare.__file__).parent / "results" / "mobilevlm_v2_1.7b" / "compare.json"
    monkeypatch.setattr(sys, "argv", ["compare.py", "--targets", str(stored)])
    assert compare.main() == 0
    lines = capsys.readouterr().out.splitlines()
    result = read_result(stored)
    assert lines[0] == f"## {result.model}, 2 threads, {result.rounds} rounds"
    assert sum(line.endswith(("| yes |", "| no |")) for line in lines) == len(result.verdicts())
    medians = {
        group: min(
            statistics.median(entry.rows["encode"])
            for entry in result.entries
            if entry.group == group and entry.rows.get("encode")
        )
        for group in (OURS, LLAMA)
    }
    assert lines[-1].startswith(f"| llama.cpp | {medians[OURS] / medians[LLAMA]:.2f} |")


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_what_is_no_result_is_told_in_one_line(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "compare.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MobileVLMError, match=r"compare\.json") as caught:
        read_result(path)
    assert "\n" not in str(caught.value)
