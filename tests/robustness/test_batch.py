"""``mobilevlm batch``: each row once, whatever ends in the middle; broken rows end nothing."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import killed_in_a_line, refusal

from mobilevlm.builtin import BUNDLES
from mobilevlm.cli import main
from mobilevlm.errors import MobileVLMError
from mobilevlm.nano.drawing import render
from mobilevlm.nano.scenes import sample_scene
from mobilevlm.runtime.batch import processes
from mobilevlm.runtime.batch.rows import Row
from mobilevlm.runtime.batch.workers import Job, Workers
from mobilevlm.runtime.journal import Journal

Capture = pytest.CaptureFixture[str]
BUNDLE = BUNDLES / "nano"
ROWS = 12
PROMPT = "Is there a {thing} in {image}?"
SHORT = ("-n", 4, "--threads", 1, "--no-plan")
KILLED = killed_in_a_line('{"index":3,"id":')
"""The program, killed after so many rows in the middle of a line"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes and questions about them as JSON lines."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "images").mkdir()
    things = ("star", "circle", "cat", "blue square")
    lines = []
    for number in range(ROWS):
        render(sample_scene(number)).save(folder / "images" / f"{number:02}.png")
        row = {"image": f"images/{number:02}.png", "thing": things[number % 4], "key": f"q{number}"}
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


def batch(*arguments: object) -> None:
    main([str(argument) for argument in ("batch", BUNDLE, *arguments, *SHORT)])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return what is the same in every run: all but the times."""
    return [(row["index"], row["id"], row["answer"], row["error"]) for row in rows]


@pytest.fixture(scope="module")
def expected(data: Path) -> list[tuple[Any, ...]]:
    """Answers of an undisturbed run in one process."""
    output = data / "expected.jsonl"
    batch(data / "rows.jsonl", "-o", output, "-p", PROMPT, "--processes", 1, "--id", "key")
    assert not Path(f"{output}.journal").exists()
    return answers(read(output))


def test_answers_are_those_of_run_in_the_order_of_the_rows(
    data: Path, expected: list[tuple[Any, ...]], capsys: Capture
) -> None:
    assert [index for index, *_ in expected] == list(range(ROWS))
    assert [name for _, name, *_ in expected] == [f"q{number}" for number in range(ROWS)]
    question = "Is there a blue square in <image>?"
    main(["run", str(BUNDLE), "--image", str(data / "images/03.png"), "-p", question,
          "-n", "4", "--threads", "1", "--no-plan"])  # fmt: skip
    assert capsys.readouterr().out == f"{expected[3][2]}\n"


def test_a_run_that_is_killed_gives_each_row_once_and_the_same_answers(
    data: Path, expected: list[tuple[Any, ...]], tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "answers.jsonl"
    command = ["batch", BUNDLE, data / "rows.jsonl", "-o", output, "-p", PROMPT, "--id", "key",
               "--processes", 2, *SHORT]  # fmt: skip
    killed = [sys.executable, "-c", KILLED, "4", *map(str, command)]
    done = subprocess.run(killed, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL and not output.exists()
    capsys.readouterr()
    main([str(word) for word in command])
    told = capsys.readouterr().err
    assert "4 of 12 rows are done already" in told and "not written whole" in told
    assert answers(read(output)) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_rows_that_cannot_be_answered_are_rows_with_an_error(
    data: Path, tmp_path: Path, capsys: Capture
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((data / "images/00.png").read_bytes()[:200])
    good = str(data / "images/00.png")
    lines = [
        json.dumps({"image": good, "thing": "star"}),
        json.dumps({"image": "broken.png", "thing": "star"}),
        json.dumps({"image": "missing.png", "thing": "star"}),
        json.dumps({"image": good}),
        json.dumps({"image": 7, "thing": "star"}),
        json.dumps({"image": good, "thing": "<image>"}),
        json.dumps({"image": "https://example.org/a.png", "thing": "star"}),
        '{"image": ',
        "[]",
        json.dumps({"image": f"data:;base64,{base64.b64encode(Path(good).read_bytes()).decode()}",
                    "thing": "star"}),
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    output = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit) as stop:
        batch(tmp_path / "rows.jsonl", "-o", output, "-p", PROMPT, "--fail-on-error")
    assert stop.value.code == 1
    assert "10 rows, 8 with an error" in capsys.readouterr().err
    rows = read(output)
    assert rows[0]["answer"] == rows[9]["answer"] and rows[0]["error"] is None
    told = [row["error"] for row in rows[1:9]]
    for error, words in zip(
        told,
        ("broken.png", "no such image file", "'thing' has nothing", "found int", "<image>",
         "not fetched", "no JSON", "expected a JSON object"),
        strict=True,
    ):  # fmt: skip
        assert words in error, (words, error)
    assert all(row["answer"] is None and row["timings"] is None for row in rows[1:9])
    batch(tmp_path / "rows.jsonl", "-o", output, "-p", PROMPT, "--restart")  # errors alone: exit 0


def test_parquet_as_the_hub_has_it_goes_in_and_parquet_comes_out(
    data: Path, expected: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    lines = read_lines(data / "rows.jsonl")
    images = [{"bytes": (data / row["image"]).read_bytes(), "path": "a.png"} for row in lines]
    images[1] = {"bytes": None, "path": str(data / lines[1]["image"])}
    table = pyarrow.table(
        {"image": images, "thing": [row["thing"] for row in lines], "number": range(ROWS)}
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=5)
    output = tmp_path / "out.parquet"
    batch(tmp_path / "rows.parquet", "-o", output, "-p", PROMPT, "--logprobs",
          "--top-logprobs", 2, "--id", "number")  # fmt: skip
    found = pyarrow.parquet.read_table(output).to_pylist()
    assert [row["answer"] for row in found] == [answer for *_, answer, _ in expected]
    assert [row["id"] for row in found] == [str(number) for number in range(ROWS)]
    first = found[0]
    assert len(first["logprobs"]) == first["new_tokens"] > 0
    assert first["logprobs"][0]["top"][0]["token_id"] == first["logprobs"][0]["token_id"]
    assert first["timings"]["ttft"] > 0 and first["visual_tokens"] > 0


def test_answers_follow_a_json_schema_in_each_process(
    data: Path, tmp_path: Path, capsys: Capture
) -> None:
    schema = tmp_path / "schema.json"
    properties = {"there": {"type": "boolean"}, "kind": {"enum": ["star", "circle"]}}
    whole = {"required": list(properties), "additionalProperties": False}
    schema.write_text(json.dumps({"type": "object", "properties": properties, **whole}))
    command = ["batch", BUNDLE, data / "rows.jsonl", "-p", PROMPT, "--threads", 1, "--no-plan",
               "-n", 40, "--json-schema", schema]  # fmt: skip
    main([str(word) for word in [*command, "-o", tmp_path / "out.jsonl", "--processes", 2]])
    for row in read(tmp_path / "out.jsonl"):
        answer = json.loads(row["answer"])
        assert type(answer["there"]) is bool and answer["kind"] in ("star", "circle"), row
        assert answer.keys() == properties.keys() and row["finish_reason"] == "stop"
    schema.write_text('{"type": "colour"}')
    capsys.readouterr()
    assert "schema" in refusal(capsys, *command, "-o", tmp_path / "other.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def test_a_folder_gives_its_images_and_rows_may_come_as_they_are_done(
    data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "images", tmp_path / "images")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / "00.png").rename(tmp_path / "images" / "z.png")
    output = tmp_path / "out.jsonl"
    batch(tmp_path / "images", "-o", output, "-p", "What is this?", "--id", "name",
          "--no-ordered", "--processes", 2)  # fmt: skip
    rows = read(output)
    names = [*(f"{number:02}.png" for number in range(1, ROWS)), "z.png"]
    assert sorted(row["id"] for row in rows) == names


def interrupt(monkeypatch: pytest.MonkeyPatch, rows: int, *command: object) -> None:
    """Runs the program until so many rows are done; then a person presses Ctrl-C."""
    append, left = Journal.append, [rows]

    def append_and_stop(journal: Journal, record: dict[str, Any]) -> None:
        append(journal, record)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    words = [str(word) for word in command]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Journal, "append", append_and_stop)
        patch.setattr("sys.argv", ["mobilevlm", *words])
        main(words)
    assert stop.value.code == 130


def test_a_journal_of_another_run_is_not_mixed_in(
    data: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    rows = tmp_path / "rows.jsonl"
    shutil.copy(data / "rows.jsonl", rows)
    command = ["batch", BUNDLE, rows, "-o", output, "-p", "Is it a {thing}?", *SHORT]
    interrupt(monkeypatch, 2, *command)
    capsys.readouterr()
    journal = Path(f"{output}.journal")
    kept = journal.read_bytes()
    other = ["batch", BUNDLE, rows, "-o", output, "-p", "Where is a {thing}?", *SHORT]
    assert "left by a run with another prompt: " in refusal(capsys, *other)
    assert "another answer options" in refusal(capsys, *command, "--temperature", 1)
    rows.write_text(rows.read_text().replace("circle", "square"))
    assert "left by a run with another input" in refusal(capsys, *command)
    assert journal.read_bytes() == kept
    journal.write_text("my notes\n")
    assert "no journal of 'mobilevlm batch'" in refusal(capsys, *command, "--restart")
    assert journal.read_text() == "my notes\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-p", "Is it {colour}?"], "no column 'colour': it has image, thing, key"),
        (["-p", "Is it {thing?"], "write {column}, and {{ or }} for a brace"),
        (["-p", "Is it {thing!r}?"], "is no column"),
        (["-p", "Is it {}?"], "is no column"),
        (["-p", "a", "--id", "name"], "--id: the input has no column 'name'"),
        (["-p", "a", "--image-column", "photo"], "--image-column: the input has no column"),
        (["-p", "{image}", "--image-column", "image", "--image-column", "key"], "those of column"),
        (["-p", "{image}", "--plain-text"], "--plain-text takes no image's place"),
        (["-p", "a", "--top-logprobs", "2"], "--top-logprobs belongs to --logprobs"),
        (["-p", "a", "--temperature", "-1"], "temperature"),
        (["-p", "a", "-o", "answers.csv"], "ends in .jsonl or .parquet"),
        (["-p", "a", "-o", "no/where.jsonl"], "there is no folder no"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_for_every_row_is_said_at_once(
    arguments: list[str], told: str, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    command = ["batch", BUNDLE, data / "rows.jsonl", "-o", tmp_path / "out.jsonl", *arguments]
    message = refusal(capsys, *command, "--threads", 1)
    assert told in message
    assert not (tmp_path / "out.jsonl").exists()


def test_inputs_and_outputs_that_cannot_be_used_are_said_in_one_line(
    data: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "out.jsonl"
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "text.jsonl").write_text("hello\n")
    for name, told in {
        "nowhere": "no such file or folder",
        "empty": "it has no rows",
        "rows.csv": "expected a folder of images",
        "rows.parquet": "damaged parquet file",
        "blank.jsonl": "it has no rows",
        "text.jsonl": "no row is a JSON object",
    }.items():
        assert told in refusal(capsys, "batch", BUNDLE, tmp_path / name, "-o", output, "-p", "a")
    output.write_text("precious")
    command = ["batch", BUNDLE, data / "rows.jsonl", "-o", output, "-p", "a"]
    assert "exists already: give --restart" in refusal(capsys, *command)
    assert output.read_text() == "precious"


def test_ctrl_c_keeps_what_is_done_and_says_the_command(
    data: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    command = ["batch", BUNDLE, data / "rows.jsonl", "-o", output, "-p", PROMPT, *SHORT]
    interrupt(monkeypatch, 2, *command, "--restart")
    told = capsys.readouterr().err
    assert f"stopped: mobilevlm batch {BUNDLE} " in told and "--restart" not in told
    assert "goes on where it was" in told
    assert len(Path(f"{output}.journal").read_text().splitlines()) == 3


def worked(
    answer: Callable[[None, Row], dict[str, Any]],
    rows: int,
    key: Callable[[Row], object] = lambda row: row.index,
) -> list[dict[str, Any]]:
    """Return what workers with another job give."""
    job = Job[None](lambda number: nullcontext(), answer, lambda row, error: {"error": error}, key)
    with Workers(job, 2) as workers:
        return list(workers.answers(Row(index) for index in range(rows)))


@pytest.mark.parametrize("together", [1, 3], ids=["single rows", "rows about one image"])
def test_a_worker_that_dies_is_started_again_and_its_row_fails_the_second_time(
    tmp_path: Path, together: int
) -> None:
    def answer(opened: None, row: Row) -> dict[str, Any]:
        first = tmp_path / str(row.index)
        if row.index == 5 or (row.index == 3 and not first.exists()):
            first.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"index": row.index}

    found = worked(answer, 9, lambda row: row.index // together)
    assert sorted(row["index"] for row in found if "index" in row) == [0, 1, 2, 3, 4, 6, 7, 8]
    [lost] = [row["error"] for row in found if "error" in row]
    assert lost == "it ended 2 worker processes (by SIGKILL, perhaps for want of memory)"


def test_neighbouring_rows_about_one_image_go_to_one_process() -> None:
    def answer(opened: None, row: Row) -> dict[str, Any]:
        return {"index": row.index, "process": os.getpid()}

    found = worked(answer, 40, lambda row: row.index // 4)
    of_image: dict[int, set[int]] = {}
    for row in found:
        of_image.setdefault(row["index"] // 4, set()).add(row["process"])
    assert sorted(row["index"] for row in found) == list(range(40))
    assert [len(processes) for processes in of_image.values()] == [1] * 10


def test_workers_that_all_die_end_the_batch() -> None:
    def answer(opened: None, row: Row) -> dict[str, Any]:
        os._exit(3)

    with pytest.raises(MobileVLMError, match=r"ended at each of 3 rows \(exit code 3\)"):
        worked(answer, 9)


SHARING = """\
import json, os, re, sys
from pathlib import Path
from mobilevlm.runtime.batch.processes import opened_processes
from mobilevlm.runtime.journal import Journal
from mobilevlm.runtime.batch.rows import Row
from mobilevlm.runtime.batch.workers import Job, Workers

def memory(name):
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(rf"^{name}: +(\\d+) kB", text, re.MULTILINE)[1])

def answer(vlm, row):
    vlm.generate("What is this?", [sys.argv[2]], max_new_tokens=4)
    return {"number": os.getpid(), "own": memory("Pss")}

loading = {"bundle": sys.argv[1], "threads": None, "max_memory_mb": None, "plan": "none"}
with opened_processes({**loading, "threads": 1}, {}, 2, 8) as opened:
    assert opened.count == 2 and opened.shared
    with Workers(Job(opened.open, answer, None), 2) as workers:
        told = list(workers.answers(map(Row, range(8))))
    alone = memory("Rss")
print(json.dumps([alone, {row["number"]: row["own"] for row in told}]))
"""
"""Memory of a process that has loaded a model, and of two that answer with it"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of processes is Linux's to tell")
def test_two_processes_share_the_weights_and_take_less_than_half_as_much_again(data: Path) -> None:
    words = [sys.executable, "-c", SHARING, str(BUNDLE), str(data / "images/00.png")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    alone, own = json.loads(done.stdout)
    assert len(own) == 2
    assert sum(own.values()) < 1.5 * alone


def test_processes_with_several_threads_load_the_model_by_themselves(
    data: Path, expected: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "default_threads", lambda: 2)
    output = tmp_path / "out.jsonl"
    main(["batch", str(BUNDLE), str(data / "rows.jsonl"), "-o", str(output), "-p", PROMPT,
          "-n", "4", "--no-plan", "--threads", "2", "--id", "key"])  # fmt: skip
    assert answers(read(output)) == expected
