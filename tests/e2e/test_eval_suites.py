"""``mobilevlm eval`` and ``report`` on tiny files of benchmarks, with the built-in model."""

from __future__ import annotations

import base64
import io
import json
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import killed_in_a_line, refusal

from mobilevlm.cli import main
from mobilevlm.nano.drawing import render
from mobilevlm.nano.questions import ask
from mobilevlm.nano.scenes import TRAINING_SEEDS, Scene, sample_scene
from mobilevlm.runtime.suites.question import Question
from mobilevlm.runtime.suites.yes_no import pope_answer

SCENES = [sample_scene(TRAINING_SEEDS + seed, "evaluation") for seed in range(9, 13)]


def png(scene: Scene) -> bytes:
    data = io.BytesIO()
    render(scene).save(data, "PNG")
    return data.getvalue()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in ("eval", *arguments)])
    return capsys.readouterr().out


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(capsys, *arguments, "--json"))
    return found


@pytest.fixture(scope="module")
def pope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions about each scene in the hub's format, one of them with a broken image."""

    rows = []
    for index, scene in enumerate(SCENES):
        for turn in range(2):
            question = ask(scene, "exists", random.Random(10 * index + turn))
            assert question is not None
            rows.append(
                {"id": f"{2 * index + turn}", "question_id": f"{2 * index + turn}",
                 "question": question.text, "answer": question.truth, "image_source": "scene",
                 "image": {"bytes": png(scene), "path": "x.png"},
                 "category": "random" if turn else "popular"}
            )  # fmt: skip
    rows[-1]["image"] = {"bytes": b"no image", "path": "x.png"}
    folder = tmp_path_factory.mktemp("pope")
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "data/test-00000-of-00001.parquet")
    return folder


def test_nano_answers_pope_from_parquet(
    pope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("nano", "--suite", "pope", "--data", pope, "--answers", tmp_path / "answers")
    found = evaluated(capsys, *command)
    assert found["overall"]["asked"] == 8 and set(found["kinds"]) == {"popular", "random"}
    assert 0 < found["overall"]["right"] <= 7, "the broken image is a wrong answer"
    assert set(found["figures"]) == {"precision", "recall", "f1", "f1_mean", "yes_ratio"}
    (failed,) = found["not_asked"]
    assert failed["id"] == "random/7" and "8 bytes" in failed["error"]
    assert evaluated(capsys, *command) == found, "from the stored answers"
    table = run(capsys, *command)
    assert "yes_ratio" in table and "tokens/s" in table
    page = tmp_path / "report.html"
    run(capsys, *command, "--html", page)
    html = page.read_text()
    assert "Wrong answers" in html and "not an image in a format" in html
    assert "http" not in html.replace("http-equiv", ""), "the page loads nothing"


def test_a_report_has_score_speed_and_memory_of_each_bundle(
    pope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    command = ("report", "nano", "--suite", "pope", "--data", pope, "--limit", 2, "--runs", 1,
               "--new-tokens", 2, "--threads", 1, "--html", page)  # fmt: skip
    main([str(word) for word in (*command, "--json")])
    (found,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert found["evaluation"]["overall"]["asked"] == 2
    assert found["bench"]["new_tokens"] == 2 and found["bench"]["peak_memory_mb"] > 0
    assert "first token, ms" in page.read_text() and "nano" in page.read_text()
    told = refusal(capsys, "report", "nano", "/nowhere", *map(str, command[2:]))
    assert "/nowhere: no such bundle" in told, "before the first one is asked"


def test_a_report_refuses_options_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "--suite pope needs --data" in refusal(capsys, "report", "nano", "--suite", "pope")
    assert "no such folder /nowhere" in refusal(capsys, "report", "nano", "--html", "/nowhere/x")


KILLED = killed_in_a_line('{"id":"random/5","answer":')
"""The program, killed after so many answers in the middle of a line"""


def test_an_evaluation_that_is_killed_goes_on_with_the_next_question(
    pope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilevlm.runtime.suites import evaluate as module

    command = ("nano", "--suite", "pope", "--data", pope)
    expected = evaluated(capsys, *command)
    kept = (*command, "--answers", tmp_path)
    words = ["5", "eval", *map(str, kept)]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL and not done.stdout
    asked, ask_one = [], module._ask

    def note(vlm: Any, question: Question, *more: Any) -> Any:
        asked.append(question.id)
        return ask_one(vlm, question, *more)

    monkeypatch.setattr(module, "_ask", note)
    found = evaluated(capsys, *kept)
    assert asked == ["random/5", "popular/6", "random/7"]
    found["tokens_per_second"] = expected["tokens_per_second"]
    assert found == expected
    (path,) = tmp_path.iterdir()
    ids = [json.loads(line).get("id") for line in path.read_text().splitlines()[1:]]
    assert len(ids) == len(set(ids)) == 8


def test_a_bundle_compared_with_itself_differs_by_nothing_and_passes(
    pope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ("nano", "nano", "--suite", "pope", "--data", pope, "--answers", tmp_path)
    found = evaluated(capsys, *pair, "--max-drop", "0", "--limit", "4")
    assert found["difference"]["mean"] == 0 and found["difference"]["p"] == 1
    assert found["difference"]["asked"] == 4 and found["passed"] is True
    assert "second minus first: +0.00 points" in run(capsys, *pair)


def test_a_worse_bundle_fails_the_gate_with_exit_code_1(
    pope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilevlm.runtime.suites import evaluate as module

    asked, count = module._ask, iter(range(16))

    def ask_or_spoil(*arguments: Any) -> Any:
        entry = asked(*arguments)
        if next(count) < 8:
            return entry
        return replace(entry, answer="yes" if pope_answer(entry.answer) == "no" else "no")

    monkeypatch.setattr(module, "_ask", ask_or_spoil)
    page = tmp_path / "report.html"
    command = ("eval", "nano", "nano", "--suite", "pope", "--data", pope, "--max-drop", "1")
    with pytest.raises(SystemExit) as stop:
        main([*map(str, command), "--html", str(page)])
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert "second minus first: -" in printed.out
    line = printed.err.splitlines()[-1]
    html = page.read_text()
    assert "second minus first: -" in html and "Answers that differ in score" in html
    assert html.count("data:image/png;base64,") == html.count('<div class="sample">') == 7
    assert "points below" in line and "--max-drop allows 1 (95% interval of the drop" in line


def test_nano_answers_mmbench_in_circles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = base64.b64encode(png(SCENES[0])).decode()
    rows = ["index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tl2-category\tsplit"]
    rows.append(f"1\tWhich?\t\tred\tblue\t\t\tB\tcolor\t{image}\tattribute\tdev")
    rows.append("2\tWhich?\tLook.\tred\tblue\tgreen\t\tA\tcolor\t1\tattribute\tdev")
    rows.append(f"3\tWhich?\t\tred\tblue\tgreen\t\tA\tcolor\t{image}\tattribute\ttest")
    data = tmp_path / "mmbench_dev_en.tsv"
    data.write_text("\n".join(rows) + "\n")
    found = evaluated(capsys, "nano", "--suite", "mmbench", "--data", data)
    assert (found["questions"], found["overall"]["asked"], found["not_asked"]) == (5, 2, [])
    assert found["kinds"]["attribute"]["asked"] == 2 and "vanilla_accuracy" in found["figures"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "pope"), "--suite pope needs --data"),
        (("--data", "x"), "go with another --suite"),
        (("--answers", "x"), "with two bundles"),
        (("--max-drop", "1"), "--max-drop goes with two bundles"),
        (("--html", "x.html"), "--html goes with another --suite"),
        (("nano", "--html", "/nowhere/x.html"), "no such folder /nowhere"),
        (("nano", "--no-blind"), "--no-blind goes with one bundle"),
        (("--suite", "pope", "--data", "x", "--questions", "20"), "use --limit"),
        (("--suite", "pope", "--data", "/nowhere"), "/nowhere: no such file or folder"),
    ],
)
def test_wrong_usage_is_one_line(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, "eval", "nano", *options)


def test_two_bundles_answer_the_built_in_questions(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = evaluated(capsys, "nano", "nano", "--questions", "12", "--answers", tmp_path)
    assert found["difference"]["asked"] == 12 and found["max_drop"] is None
    assert found["bundles"][0]["overall"]["right"] >= 6
