"""Questions of each benchmark, from tiny files in the formats of the hub and of its authors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mobilevlm.errors import SuiteError
from mobilevlm.image import open_image
from mobilevlm.runtime.suites.evaluate import read_questions
from mobilevlm.runtime.suites.question import Question
from mobilevlm.runtime.suites.registry import find_suite

pytestmark = pytest.mark.pure
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def png(color: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), COLORS[color]).save(data, "PNG")
    return data.getvalue()


def hub_image(color: str) -> dict[str, Any]:
    return {"bytes": png(color), "path": f"{color}.png"}


def parquet(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def text(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def image(path: Path, color: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(color))


def questions(name: str, data: Path) -> list[Question]:
    """Questions of a suite, whose images are all read once."""
    found = read_questions(find_suite(name), data)
    for question in found:
        assert question.prompt.count("<image>") in (0, len(question.images))
    return found


def colors(question: Question) -> list[str]:
    names: dict[Any, str] = {value: name for name, value in COLORS.items()}
    return [names[open_image(read()).getpixel((0, 0))] for read in question.images]


def judged(name: str, question: Question, answer: str) -> float:
    return find_suite(name).judge(question, answer)


def test_mmmu_has_subjects_images_in_the_text_and_open_answers(tmp_path: Path) -> None:
    none = {f"image_{index}": None for index in range(3, 8)}
    common = {"explanation": "", "topic_difficulty": "Easy", "subfield": "x", "img_type": "['x']"}
    rows = [
        {"id": "validation_Art_Theory_2", "question": "Which <image 1>?", "answer": "B",
         "options": "['it\\'s this', '<image 2>']", "question_type": "multiple-choice",
         "image_1": hub_image("red"), "image_2": hub_image("blue"), **none, **common},
        {"id": "validation_Art_Theory_3", "question": "How many in <image 1>?",
         "options": "[]", "question_type": "open", "answer": "['3', 'three']",
         "image_1": hub_image("blue"), "image_2": None, **none, **common},
    ]  # fmt: skip
    parquet(tmp_path / "Art_Theory/validation-00000-of-00001.parquet", *rows)
    parquet(tmp_path / "Art_Theory/dev-00000-of-00001.parquet", rows[0])
    choice, opened = questions("mmmu", tmp_path)
    assert choice.prompt == (
        "Which <image>?\n(A) it's this\n(B) <image>\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (choice.kind, choice.choices) == ("Art_Theory", ("it's this", "<image 2>"))
    assert colors(choice) == ["red", "blue"] and colors(opened) == ["blue"]
    assert judged("mmmu", choice, "(B)") == 1 and judged("mmmu", choice, "A") == 0
    assert opened.prompt.endswith(">?\nAnswer the question using a single word or phrase.")
    assert judged("mmmu", opened, "It is 3.") == 1 and judged("mmmu", opened, "Three") == 1


def test_mmmu_pro_has_questions_in_text_or_in_the_image(tmp_path: Path) -> None:
    options = str([f"choice {index}" for index in range(10)])
    parquet(
        tmp_path / "standard/test-00000-of-00002.parquet",
        {"id": "test_History_1", "question": "Who in <image 1>?", "options": options,
         "answer": "J", "subject": "History", "image_1": hub_image("red"), "image_2": None},
    )  # fmt: skip
    (standard,) = questions("mmmu-pro", tmp_path / "standard")
    assert "\nJ. choice 9\nAnswer with the option letter" in standard.prompt
    assert standard.kind == "History" and judged("mmmu-pro", standard, "Answer: J") == 1
    parquet(
        tmp_path / "vision/test-00000-of-00002.parquet",
        {"id": "test_History_1", "image": hub_image("blue"), "options": options,
         "answer": "C", "subject": "History"},
    )  # fmt: skip
    (vision,) = questions("mmmu-pro", tmp_path / "vision")
    assert vision.prompt.endswith("where LETTER is one of options.") and colors(vision) == ["blue"]
    assert judged("mmmu-pro", vision, "C") == 1


def test_cmmmu_has_choices_statements_and_blanks(tmp_path: Path) -> None:
    options = {f"option{index}": f"选项{index}" for index in range(1, 5)}
    empty = {f"option{index}": "" for index in range(1, 5)}
    common = {"category": "科学", "subcategory": "物理", "image_2": None}
    parquet(
        tmp_path / "val-00000-of-00001.parquet",
        {"id": 1, "type": "选择", "question": '看图<img="a.png">选', "answer": "AC",
         "image_1": hub_image("red"), **options, **common},
        {"id": 2, "type": "判断", "question": "对吗？", "answer": "错",
         "image_1": hub_image("blue"), **empty, **common},
        {"id": 3, "type": "填空", "question": "多少？", "answer": "12",
         "image_1": hub_image("blue"), **empty, **common},
    )  # fmt: skip
    choice, statement, blank = questions("cmmmu", tmp_path)
    assert choice.prompt.endswith(
        "\n\n问题：看图<image>选\n选项：\n(A) 选项1\n(B) 选项2\n(C) 选项3\n(D) 选项4\n\n"
        "正确答案：\n"
    )
    assert choice.kind == "科学" and statement.prompt.endswith("\n\n问题：对吗？\n正确答案：\n")
    assert "<image>" not in statement.prompt and colors(statement) == ["blue"]
    assert judged("cmmmu", choice, "(A)(C)") == 1 and judged("cmmmu", choice, "A") == 0
    assert judged("cmmmu", statement, "错误") == 1 and judged("cmmmu", blank, "答案是12") == 1


def test_tmmlu_has_subjects_by_the_names_of_its_files(tmp_path: Path) -> None:
    rows = [
        {"question": "首都？", "A": "東京", "B": "大阪", "C": "京都", "D": "奈良", "answer": "A"}
    ]
    for name in ("basic_medical_science_test.csv", "basic_medical_science_dev.csv"):
        pc.write_csv(pa.Table.from_pylist(rows), tmp_path / name)
    (question,) = questions("tmmlu+", tmp_path)
    assert question.kind == "basic_medical_science" and question.images == ()
    assert question.prompt == (
        "以下是關於基礎醫學考試單選題，請選出正確的答案。\n\n"
        "首都？\nA. 東京\nB. 大阪\nC. 京都\nD. 奈良\n答案："
    )
    assert judged("tmmlu+", question, "答案是A") == 1


def test_pope_of_the_hub_and_of_its_authors_are_the_same(tmp_path: Path) -> None:
    parquet(
        tmp_path / "hub/test-00000-of-00001.parquet",
        {"id": "0", "question_id": "1", "question": "Is there a dog in the image?", "answer": "yes",
         "image_source": "x", "image": hub_image("red"), "category": "random"},
    )  # fmt: skip
    line = {"question_id": 1, "image": "COCO_val2014_000000000001.jpg", "label": "yes",
            "text": "Is there a dog in the image?"}  # fmt: skip
    lines = [json.dumps({**line, "question_id": number}) for number in (1, 2)]
    (tmp_path / "own").mkdir()
    (tmp_path / "own/coco_pope_random.json").write_text("\n".join(lines))
    image(tmp_path / "own/val2014/COCO_val2014_000000000001.jpg")
    (hub,), own = questions("pope", tmp_path / "hub"), questions("pope", tmp_path / "own")
    assert (own[0].id, own[0].prompt, own[0].answers) == (hub.id, hub.prompt, hub.answers)
    assert own[0].kind == hub.kind == "random" and colors(own[0]) == colors(hub) == ["red"]


def test_mme_has_two_questions_an_image(tmp_path: Path) -> None:
    common = {"question_id": "OCR/0001.jpg", "image": hub_image("red"), "category": "OCR"}
    rows = [{**common, "question": f"Is it {word}? Please answer yes or no.", "answer": answer}
            for word, answer in (("a", "Yes"), ("b", "No"))]  # fmt: skip
    parquet(tmp_path / "test-00000-of-00001.parquet", *rows)
    first, second = questions("mme", tmp_path)
    assert first.group == second.group and first.id != second.id
    assert judged("mme", first, "Yes") == judged("mme", second, "No.") == 1


def test_scienceqa_asks_the_questions_with_an_image(tmp_path: Path) -> None:
    common = {"question": "Which?", "choices": ["iron", "wood"], "answer": 1, "hint": "",
              "subject": "natural science"}  # fmt: skip
    rows = [{**common, "image": hub_image("red")}, {**common, "image": None}]
    parquet(tmp_path / "hub/test-00000-of-00001.parquet", *rows)
    problems = {
        "7": {**common, "image": "image.png", "split": "test", "hint": "Look."},
        "8": {**common, "image": None, "split": "test"},
        "9": {**common, "image": "image.png", "split": "train"},
    }
    text(tmp_path / "own/problems.json", problems)
    for number, color in (("7", "blue"), ("9", "red")):
        image(tmp_path / f"own/test/{number}/image.png", color)
    (hub,), (own,) = (questions("scienceqa", tmp_path / name) for name in ("hub", "own"))
    assert hub.prompt.startswith("Which?\nA. iron\nB. wood\nAnswer with the option's letter")
    assert own.prompt == f"Context: Look.\n{hub.prompt}" and own.id == "7"
    assert colors(hub) == ["red"] and colors(own) == ["blue"]
    assert judged("scienceqa", own, "B") == judged("scienceqa", hub, "The answer is B.") == 1


def test_seed_asks_about_images_only(tmp_path: Path) -> None:
    rows = [
        {"question_id": str(number), "question": "What?", "answer": "D", "data_id": "x_1",
         "question_type_id": kind, "choice_a": "a dog", "choice_b": "a cat", "choice_c": "a cow",
         "choice_d": "a pig"}
        for number, kind in ((1, 5), (2, 11))
    ]  # fmt: skip
    hub = [{**row, "data_type": "image", "image": [hub_image("red")]} for row in rows]
    parquet(tmp_path / "hub/test-00000-of-00001.parquet", *hub)
    text(tmp_path / "own/SEED-Bench.json", {"questions": rows, "question_type": {"5": "x"}})
    image(tmp_path / "own/SEED-Bench-image/x_1")
    for name in ("hub", "own"):
        (question,) = questions("seed", tmp_path / name)
        assert question.kind == "instance counting" and colors(question) == ["red"]
        assert judged("seed", question, "D. a pig") == 1


def test_vqav2_joins_the_official_questions_and_annotations(tmp_path: Path) -> None:
    people = [{"answer": answer, "answer_confidence": "yes", "answer_id": number}
              for number, answer in enumerate(["2"] * 4 + ["three"] * 6, 1)]  # fmt: skip
    asked = {"question_id": 42000, "image_id": 42, "question": "How many?"}
    said = {"question_id": 42000, "image_id": 42, "answers": people, "answer_type": "number",
            "question_type": "how many", "multiple_choice_answer": "three"}  # fmt: skip
    text(tmp_path / "own/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [asked]})
    text(tmp_path / "own/v2_mscoco_val2014_annotations.json", {"annotations": [said]})
    image(tmp_path / "own/val2014/COCO_val2014_000000000042.jpg")
    parquet(tmp_path / "hub/validation-00000-of-00068.parquet",
            {**asked, **said, "image": hub_image("red")})  # fmt: skip
    for name in ("own", "hub"):
        (question,) = questions("vqav2", tmp_path / name)
        assert question.kind == "number" and colors(question) == ["red"]
        assert judged("vqav2", question, "Two") == 1 and judged("vqav2", question, "4") == 0
        assert question.prompt.startswith("How many?\nAnswer the question using a single word")


def test_textvqa_reads_its_file_and_the_hubs(tmp_path: Path) -> None:
    row = {"question_id": 34602, "image_id": "003a8ae2ef43b901", "question": "what brand?",
           "answers": ["dakota"] * 2 + ["nokia"] * 8}  # fmt: skip
    text(tmp_path / "own/TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [row]})
    image(tmp_path / "own/train_images/003a8ae2ef43b901.jpg")
    parquet(tmp_path / "hub/validation-00000.parquet", {**row, "image": hub_image("red")})
    for name in ("own", "hub"):
        (question,) = questions("textvqa", tmp_path / name)
        assert colors(question) == ["red"]
        assert judged("textvqa", question, "Dakota.") == pytest.approx(0.6)
        assert question.prompt.startswith("What brand?\nAnswer the question using a single")


def test_gqa_finds_its_images_in_another_file(tmp_path: Path) -> None:
    asked = {"question": "Left or right?", "answer": "left", "imageId": "n1",
             "types": {"structural": "choose", "semantic": "rel"}, "isBalanced": True}  # fmt: skip
    text(tmp_path / "own/testdev_balanced_questions.json", {"201": asked})
    image(tmp_path / "own/images/n1.jpg")
    parquet(tmp_path / "hub/testdev_balanced_instructions/testdev-0.parquet",
            {"id": "201", **asked})  # fmt: skip
    parquet(tmp_path / "hub/testdev_balanced_images/testdev-0.parquet",
            {"id": "n1", "image": hub_image("red")})  # fmt: skip
    for name in ("own", "hub"):
        (question,) = questions("gqa", tmp_path / name)
        assert (question.id, question.kind, colors(question)) == ("201", "choose", ["red"])
        assert judged("gqa", question, "Left") == 1


def test_chartqa_has_questions_of_people_and_machines(tmp_path: Path) -> None:
    row = {"imgname": "1.png", "query": "How much?", "label": "50"}
    text(tmp_path / "own/test/test_human.json", [row])
    text(tmp_path / "own/test/test_augmented.json", [row])
    image(tmp_path / "own/test/png/1.png")
    augmented, human = questions("chartqa", tmp_path / "own")
    assert (human.kind, augmented.kind) == ("human", "augmented") and colors(human) == ["red"]
    parquet(tmp_path / "hub/test-00000-of-00001.parquet",
            {"type": "human_test", "question": "How much?", "answer": "50",
             "image": hub_image("red")})  # fmt: skip
    (hub,) = questions("chartqa", tmp_path / "hub")
    assert hub.kind == "human_test" and judged("chartqa", hub, "52") == 1
    assert hub.prompt == "How much?\nAnswer the question with a single word."


def test_mmbench_takes_the_turns_that_its_data_has(tmp_path: Path) -> None:
    """The hub's rows and OpenCompass' table have each turn as a row of its own."""
    common = {"question": "Which?", "hint": "nan", "C": "nan", "D": "nan", "category": "color",
              "L2-category": "attribute", "split": "dev"}  # fmt: skip
    parquet(
        tmp_path / "hub/dev-00000-of-00001.parquet",
        {**common, "index": 7, "A": "red", "B": "blue", "answer": "B", "image": hub_image("red")},
        {**common, "index": 1000007, "A": "blue", "B": "red", "answer": "A",
         "image": hub_image("red")},
    )  # fmt: skip
    first, second = questions("mmbench", tmp_path / "hub")
    assert (first.id, first.group, second.id, second.group) == ("7+0", "7", "7+1", "7")
    assert first.prompt.startswith("Which?\nA. red\nB. blue\nAnswer with the option's letter")
    assert second.choices == ("blue", "red") and second.answers == ("A",)
    text(tmp_path / "own/rows.json", [
        {"index": "7", "question": "Which?", "A": "red", "B": "blue", "answer": "B",
         "image": "x.png", "l2-category": "attribute"}])  # fmt: skip
    image(tmp_path / "own/x.png")
    turns = questions("mmbench", tmp_path / "own")
    assert [(turn.id, turn.prompt) for turn in turns] == [
        (first.id, first.prompt), (second.id, second.prompt)
    ]  # fmt: skip


def test_docvqa_and_ocrbench_read_their_files_and_the_hubs(tmp_path: Path) -> None:
    row = {"questionId": 337, "question": "What is it?", "answers": ["ITC Limited", "itc"],
           "question_types": ["handwritten", "form"]}  # fmt: skip
    text(tmp_path / "own/val_v1.0.json", {"dataset_name": "docvqa", "data": [
        {**row, "image": "documents/x_1.png"}]})  # fmt: skip
    image(tmp_path / "own/val/documents/x_1.png")
    parquet(tmp_path / "hub/validation-0.parquet", {**row, "image": hub_image("red")})
    for name in ("own", "hub"):
        (question,) = questions("docvqa", tmp_path / name)
        assert question.kind == "handwritten" and colors(question) == ["red"]
        assert judged("docvqa", question, "ITC limited") == 1
    ocr = {"question": "what is written?", "question_type": "Regular Text Recognition"}
    parquet(
        tmp_path / "ocr/test-0.parquet",
        {"dataset": "IIIT5K", "answer": ["CENTRE"], "image": hub_image("red"), **ocr},
    )
    text(tmp_path / "ocr_own/OCRBench.json", [
        {"dataset_name": "IIIT5K", "image_path": "IIIT5K/1.png", "type": ocr["question_type"],
         "question": ocr["question"], "answers": "CENTRE", "id": 0}])  # fmt: skip
    image(tmp_path / "ocr_own/IIIT5K/1.png")
    for name in ("ocr", "ocr_own"):
        (question,) = questions("ocrbench", tmp_path / name)
        assert question.kind == "Regular Text Recognition" and colors(question) == ["red"]
        assert judged("ocrbench", question, "It says Centre.") == 1


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("mmbench", {"index": 1, "A": "a", "B": "b", "answer": "C", "image": "x.png"}, "'C'"),
        ("mmbench", {"index": "x1", "A": "a", "B": "b", "answer": "A"}, "index x1: expected a"),
        ("scienceqa", {"choices": ["a"], "answer": 3, "image": "x.png"}, "answer 3"),
        ("cmmmu", {"type": "x"}, "type 'x'"),
        ("mmmu", {"id": "a", "answer": "B", "options": "['a"}, "options: no list"),
        ("pope", {"question_id": 1, "text": "?", "label": "no"}, "no column 'image'"),
        ("vqav2", {"question_id": 1, "question": "?", "image_id": 3}, "000000000003.jpg"),
        ("textvqa", {"question_id": 1, "question": "?", "image": 3}, "expected an image"),
        ("seed", {"question_type_id": 10}, "no question of the suite 'seed'"),
    ],
)
def test_rows_that_do_not_fit_are_named(
    tmp_path: Path, name: str, row: dict[str, Any], message: str
) -> None:
    image(tmp_path / "x.png")
    text(tmp_path / "rows.json", [row])
    with pytest.raises(SuiteError, match=message) as stop:
        questions(name, tmp_path)
    assert str(tmp_path) in str(stop.value) and "\n" not in str(stop.value)
