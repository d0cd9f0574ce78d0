"""Rows of benchmarks' files, and answers that are kept while a suite is asked."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mobilevlm.cli.eval import SUITES
from mobilevlm.errors import ImageError, MobileVLMError, SuiteError
from mobilevlm.image import open_image
from mobilevlm.runtime import VLM
from mobilevlm.runtime.parquet import ParquetRows
from mobilevlm.runtime.suites.evaluate import Evaluation, compare, evaluate, read_questions
from mobilevlm.runtime.suites.question import Question, Suite
from mobilevlm.runtime.suites.registry import NAMES, find_suite
from mobilevlm.runtime.suites.rows import read_rows

pytestmark = pytest.mark.pure


def png(color: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(data, "PNG")
    return data.getvalue()


def color_of(read: Callable[[], Any] | None) -> tuple[int, ...]:
    assert read is not None
    return cast(tuple[int, ...], open_image(read()).getpixel((0, 0)))


RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_every_suite_of_the_registry_is_found_and_offered() -> None:
    assert set(SUITES) == {"scenes", *NAMES}
    assert [find_suite(name).name for name in NAMES] == list(NAMES)


def test_parquet_rows_read_their_images_when_they_are_needed(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "one": {"bytes": png("red"), "path": "a.png"}, "two": None, "many": []},
        {"id": 2, "one": {"bytes": png("blue"), "path": None}, "two": None,
         "many": [{"bytes": png("red"), "path": ""}, {"bytes": png("blue"), "path": "b"}]},
        {"id": 3, "one": None, "two": {"bytes": png("red"), "path": None}, "many": []},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test-00000.parquet", row_group_size=2)
    found = read_rows(tmp_path, "test")
    assert [row.need("id") for row in found] == [1, 2, 3]
    assert [color_of(row.image("one")) for row in found[1::-1]] == [BLUE, RED]
    assert found[2].image("one") is None and color_of(found[2].image("two")) == RED
    assert found[0].image("many") is None
    assert [color_of(read) for read in found[1].values["many"]] == [RED, BLUE]


def test_an_image_without_a_path_beside_its_bytes_is_one(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": png("red")}}, {"image": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = read_rows(tmp_path, "")
    assert color_of(found[0].image("image")) == RED and found[1].image("image") is None


def test_images_of_several_columns_are_read_group_by_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colors = ("red", "blue", "lime")
    rows = [{"a": {"bytes": png(colors[n % 3]), "path": ""},
             "b": {"bytes": png(colors[n % 2]), "path": ""}} for n in range(40)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=20)
    found = read_rows(tmp_path, "")
    read, begun = ParquetRows.read, []

    def counted(self: ParquetRows, columns: list[str], *skip: Any) -> Any:
        begun.append(columns)
        return read(self, columns, *skip)

    monkeypatch.setattr(ParquetRows, "read", counted)
    for row in found:
        for name in "ab":
            row.image(name)()  # type: ignore[misc]
    assert begun == [["a"], ["b"]] * 2
    again = [color_of(found[number].image("a")) for number in (0, 39, 7)]
    assert again == [RED, RED, BLUE] and begun[4:] == [["a"]], "39 is still there, 7 follows 0"


def test_a_file_of_the_same_rows_as_json_lines_or_a_table_gives_the_same(tmp_path: Path) -> None:
    text = base64.b64encode(png("red") + bytes(300)).decode()
    row = {"index": "7", "question": 'a "word"\nand a line', "image": text}
    (tmp_path / "a").mkdir()
    (tmp_path / "a/rows.jsonl").write_text(json.dumps(row) + "\n\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/rows.json").write_text(json.dumps({"data": [row]}))
    (tmp_path / "c").mkdir()
    quoted = row["question"].replace('"', '""')
    table = f'\ufeffindex\tquestion\timage\n6\tfirst\t{text}\n7\t"{quoted}"\t{text}\n'
    (tmp_path / "c/rows.tsv").write_text(table)
    for folder in "abc":
        found = read_rows(tmp_path / folder, "")[-1]
        assert (found.text("index"), found.text("question")) == (row["index"], row["question"])
        assert color_of(found.image("image")) == RED


def test_an_image_beside_the_rows_is_found_by_the_end_of_its_path(tmp_path: Path) -> None:
    for folder, color in (("1", "red"), ("2", "blue")):
        (tmp_path / "images" / folder).mkdir(parents=True)
        (tmp_path / "images" / folder / "x.png").write_bytes(png(color))
    rows = [{"image": "2/x.png"}, {"image": "x.png"}, {"image": "../x.png"}, {"image": "3/x.png"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = read_rows(tmp_path, "")
    assert color_of(found[0].image("image")) == BLUE
    with pytest.raises(SuiteError, match=r"row 2: image x\.png .* 2 files of that name"):
        found[1].image("image")
    for row in found[2:]:
        with pytest.raises(SuiteError, match="not there"):
            row.image("image")


def test_only_the_files_and_rows_of_a_split_are_read(tmp_path: Path) -> None:
    for name in ("validation-00000", "test-00000", "art_val"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"name": name}))
    names = [row.need("name") for row in read_rows(tmp_path, "validation")]
    assert names == ["art_val", "validation-00000"]
    with pytest.raises(SuiteError, match=r"split 'dev' \(found test, validation\): give --split"):
        read_rows(tmp_path, "dev")
    (tmp_path / "all").mkdir()
    rows = {"1": {"split": "test"}, "2": {"split": "val"}, "3": {}}
    (tmp_path / "all/problems.json").write_text(json.dumps(rows))
    assert [row.need("id") for row in read_rows(tmp_path / "all", "validation")] == ["2", "3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "no JSON"),
        ("a.json", b"3", "expected a list of questions"),
        ("a.json", b"[3]", "row 1: expected columns"),
        ("a.json", b"[]", "no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a"', "line 2: no JSON"),
        ("a.tsv", b"a\tb\n1\t2\t3\n", "line 2: 3 columns under 2 names"),
        ("a.tsv", b"a\tb\n\xff\t2\n", "'utf-8' codec"),
        ("a.parquet", b"PAR1" * 9, "damaged parquet file"),
        ("a.txt", b"", "below it: docs/how-to/evaluation.md"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MobileVLMError, match=message) as stop:
        read_rows(tmp_path, "")
    assert str(tmp_path) in str(stop.value) and "\n" not in str(stop.value)


def test_a_row_without_a_column_names_file_row_and_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"text": "a", "images": 1}]')
    with pytest.raises(SuiteError, match=r"row 1: no column 'question' \(found text, images\)"):
        read_rows(tmp_path, "")[0].need("question")


class Parrot:
    """In place of a model: answers with the question's last word, and counts."""

    def __init__(self, digest: str = "0" * 64, dies_after: int = 10**9) -> None:
        named = SimpleNamespace(name="parrot")
        manifest = SimpleNamespace(spec=named, recipe=named)
        self.bundle = SimpleNamespace(digest=digest, folder=Path("parrot"), manifest=manifest)
        self.engine = "onnx"
        self.asked: list[str] = []
        self._dies_after = dies_after

    def generate(self, prompt: str, images: list[Any], max_new_tokens: int) -> Any:
        if len(self.asked) == self._dies_after:
            raise KeyboardInterrupt
        self.asked.append(prompt)
        return SimpleNamespace(text=prompt.split()[-1], token_seconds=[0.5] * 2)


def ask(parrot: Parrot, questions: list[Question], folder: Path | None = None) -> Evaluation:
    return evaluate(cast(VLM, parrot), SUITE, questions, folder)


SUITE = Suite("scenes", lambda data, split: [], lambda q, a: float(a == q.answers[0]), 8)
QUESTIONS = [
    Question(f"q{index}", f"Say {index}", (), (str(index % 7),), ("odd", "even")[index % 2 == 0])
    for index in range(20)
]


def test_scores_are_counted_by_kind_with_intervals() -> None:
    found = ask(Parrot(), QUESTIONS).to_dict()
    assert (found["overall"]["asked"], found["overall"]["right"]) == (20, 7)
    assert found["kinds"]["even"]["right"] == 4 and found["kinds"]["odd"]["right"] == 3
    assert 0 < found["overall"]["low"] < 0.35 < found["overall"]["high"] < 1
    assert found["tokens_per_second"] == 2.0 and found["not_asked"] == []


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(Parrot(dies_after=8), QUESTIONS, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])  # a kill in the middle of a line
    rest = Parrot()
    found = ask(rest, QUESTIONS, tmp_path)
    assert rest.asked == [f"Say {index}" for index in range(7, 20)]
    assert found.to_dict() == ask(Parrot(), QUESTIONS).to_dict()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["id"] for line in lines[1:]] == [q.id for q in QUESTIONS]


def test_stored_answers_of_other_words_are_asked_for_again(tmp_path: Path) -> None:
    ask(Parrot(), QUESTIONS, tmp_path)
    changed = [Question("q0", "Say 5", (), ("5",)), *QUESTIONS[1:]]
    again = Parrot()
    found = ask(again, changed, tmp_path)
    assert again.asked == ["Say 5"] and found.judged[0].score == 1


def test_stored_answers_of_other_settings_are_refused(tmp_path: Path) -> None:
    parrot = cast(VLM, Parrot())
    evaluate(parrot, SUITE, QUESTIONS, tmp_path, {"max_tiles": 1})
    with pytest.raises(MobileVLMError, match="another max_tiles: give another folder"):
        evaluate(parrot, SUITE, QUESTIONS, tmp_path, {"max_tiles": 2})
    (path,) = tmp_path.iterdir()
    path.write_text('{"suite": "scenes"}\n')
    with pytest.raises(MobileVLMError, match="no journal of 'mobilevlm eval': remove it, or give"):
        evaluate(parrot, SUITE, QUESTIONS, tmp_path, {"max_tiles": 1})


def test_a_line_that_is_no_answer_is_asked_for_again_with_what_follows(tmp_path: Path) -> None:
    ask(Parrot(), QUESTIONS, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    path.write_text(whole.replace('"answer":"11"', '"anser":"11"'))
    rest = Parrot()
    ask(rest, QUESTIONS, tmp_path)
    assert rest.asked == [f"Say {index}" for index in range(11, 20)]
    assert path.read_text() == whole


def test_a_broken_image_is_one_wrong_answer_with_its_error() -> None:
    def broken() -> bytes:
        raise ImageError("x.png: damaged")

    found = ask(Parrot(), [Question("bad", "Say 1", (broken,), ("1",)), *QUESTIONS])
    assert [(item.question.id, item.score, item.error) for item in found.failed] == [
        ("bad", 0.0, "x.png: damaged")
    ]
    assert found.overall.asked == 21


def test_two_bundles_are_compared_question_by_question() -> None:
    first, second = ask(Parrot(), QUESTIONS), ask(Parrot(), QUESTIONS)
    assert compare(first, second).mean == 0
    with pytest.raises(ValueError, match="different questions"):
        compare(first, ask(Parrot(), QUESTIONS[1:]))


def test_a_limit_is_spread_over_the_data_and_keeps_groups_whole() -> None:
    questions = [Question(f"{n}+{t}", "?", group=str(n)) for n in range(10) for t in range(3)]
    suite = Suite("x", lambda data, split: questions, lambda q, a: 0.0, 8, grouped=True)
    kept = read_questions(suite, Path(), limit=4)
    assert [q.id for q in kept] == [f"{n}+{t}" for n in (0, 2, 5, 7) for t in range(3)]
    assert read_questions(suite, Path(), limit=99) == questions
    twice = Suite("x", lambda data, split: questions * 2, lambda q, a: 0.0, 8)
    with pytest.raises(SuiteError, match=r"two questions have the id 0\+0"):
        read_questions(twice, Path())
