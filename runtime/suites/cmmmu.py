"""CMMMU (Zhang et al. 2024): MMMU's kind of questions in Chinese, with statements to be judged.

Answers are read by the official rules. Where the official code draws an answer, the question's id
draws it here.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from mobilevlm.errors import SuiteError
from mobilevlm.runtime.suites.mmmu import EDGES, Value
from mobilevlm.runtime.suites.question import Question, Suite, drawn_letter, letters
from mobilevlm.runtime.suites.rows import read_rows

CHOICE, STATEMENT, BLANK = "选择", "判断", "填空"
"""Types of questions."""
PROMPTS = {
    CHOICE: "请回答以下多项选择题，并选出正确选项。这些题目可能包括单选和多选题型。"
    "如果所提供的信息不足以确定一个明确的答案，"
    "那么请根据可用的数据和你的判断来选择最可能正确的选项。",
    STATEMENT: "请回答以下判断题，并根据题目描述和所给的信息来判断问题中陈述的对错。"
    "如果信息不完整或不足以作出绝对判断，"
    "请运用你的逻辑推理和现有信息来做出最可能的判断。",
    BLANK: "请回答以下填空题，并根据题目的要求和所提供的信息来给出最恰当的答案。"
    "如果信息不足以确切回答，那么请依据现有的数据和你的推理能力来填写最合理的答案。",
}
BLANK_KEYS = (
    "是",
    "为",
    "所以",
    "等于",
    "方案",
    "选择",
    "正确答案",
    "因此",
    "最后",
    "答案",
    "结果",
)
STATEMENT_KEYS = ("是", "为", "所以", "判断", "陈述", "说法", "表达", "答案", "结果")
NUMBERS = (
    r"-?\d{1,3}(?:，\d{3})+",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+)(?![eE][+-]?\d+)(?!，\d)",
)
RIGHT = ("正确", "对", "准确", "肯定", "对的")
WRONG = ("不对", "错误", "不正确", "不准确", "不合适", "否定", "错的", "错")
UNCLEAR = ("对错", "是否正确", "否正确", "或者", "是否", "正确性", "对不")
MARK = re.compile(r'<img="[^"]*">')
TRIVIAL = (":", ",", ".", "!", "?", ";", "'")


def read_letters(answer: str, choices: Sequence[str]) -> str:
    """Return the letters that an answer says most often, in their order, or an empty text: as
    ``(B)``, else as ``B``, else by the texts of the choices."""
    said = answer
    for mark in EDGES:
        said = said.strip(mark)
    names = letters(len(choices))
    for texts in ([f"({name})" for name in names], names, choices):
        counts = [said.count(text) if text else 0 for text in texts]
        if max(counts):
            return "".join(name for name, count in zip(names, counts, strict=True)
                           if count == max(counts))  # fmt: skip
    return ""


def key_texts(answer: str, keys: Sequence[str], equation: bool) -> list[str]:
    """Return the shortest text after a key word of each sentence, or the whole answer."""
    said = answer.strip("。").strip()
    parts = re.split(r"。|\n", said)
    found = []
    for index, part in enumerate(parts):
        last = (*keys, "=") if equation and index == len(parts) - 1 else keys
        shortest = ""
        for tail in (part.split(key)[-1].strip() for key in last if key in part):
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in TRIVIAL:
            found.append(shortest)
    return found or [said]


def normalized(text: str, truth: str) -> list[Value]:
    """Return a number rounded to two places, or text; none if it is much longer than the truth."""
    said = text.strip()
    try:
        return [round(float(said.replace(",", "")), 2)]
    except ValueError:
        too_long = len(said) > len(truth) + 20 or _latin(said) > _latin(truth) + 2
        return [] if too_long else [said]


def _latin(text: str) -> int:
    return len(re.findall("[a-zA-Z]", text))


def blank_match(answer: str, truth: str) -> bool:
    """Return whether an answer fills the blank: its text holds the truth, or the same number."""
    true = normalized(truth, truth)
    found = key_texts(answer, BLANK_KEYS, equation=True)
    texts = found + [
        number for text in found for form in NUMBERS for number in re.findall(form, text)
    ]
    for value in (value for text in texts for value in normalized(text, truth)):
        if isinstance(value, str):
            if any(isinstance(other, str) and other in value for other in true):
                return True
        elif value in true:
            return True
    return False


def read_statement(answer: str) -> str:
    """Return ``对`` or ``错`` by more sentences with such a word, or an empty text. As in the
    official code ``不正确`` holds ``正确`` and counts as right."""
    found = set(key_texts(answer, STATEMENT_KEYS, equation=False))
    votes = 0
    for text in found:
        if any(word in text for word in UNCLEAR):
            continue
        if any(word in text for word in RIGHT):
            votes += 1
        elif any(word in text for word in WRONG):
            votes -= 1
    return "对" if votes > 0 else "错" if votes < 0 else ""


def judge(question: Question, answer: str) -> float:
    """Return whether an answer is right. An empty answer to a question of choice is wrong."""
    (truth,) = question.answers
    kind = question.form
    if kind == CHOICE:
        if not answer:
            return 0.0
        return float((read_letters(answer, question.choices) or drawn_letter(question)) == truth)
    if kind == BLANK:
        return float(blank_match(answer, truth))
    drawn = "对错"[zlib.crc32(question.id.encode()) % 2]
    return float((read_statement(answer) or drawn) == truth)


def read_cmmmu(data: Path, split: str) -> list[Question]:
    """Read CMMMU's parquet or JSONL files."""
    found = []
    for row in read_rows(data, split):
        kind = str(row.need("type"))
        if kind not in PROMPTS:
            raise SuiteError(f"{row.place}: type {kind!r}: expected {', '.join(PROMPTS)}")
        choices = tuple(row.text(f"option{index}") for index in range(1, 5))
        if kind != CHOICE:
            choices = ()
        lines = [f"({name}) {text}\n" for name, text in
                 zip(letters(len(choices)), choices, strict=True)]  # fmt: skip
        listed = f"选项：\n{''.join(lines)}\n" if choices else ""
        text = f"{PROMPTS[kind]}\n\n问题：{row.need('question')}\n{listed}正确答案：\n"
        names = [f"image_{index}" for index in range(1, 6)]
        images = [image for name in names if (image := row.image(name)) is not None]
        if not images and (single := row.image("image")) is not None:
            images = [single]
        marks = len(MARK.findall(text))
        text = MARK.sub("<image>", text) if marks == len(images) else MARK.sub("", text)
        truth = str(row.need("answer")).strip()
        name, subject = str(row.need("id")), row.text("category")
        found.append(Question(name, text, tuple(images), (truth,), subject, choices, form=kind))
    return found


SUITES = (Suite("cmmmu", read_cmmmu, judge, 128, split="validation", shots="dev"),)
