"""TMMLU+ (Tam et al. 2024): questions of 66 subjects in traditional Chinese, without images.

Prompts and the reading of answers follow iKala's evaluator; its system message is left out, since
not every model takes one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mobilevlm.runtime.suites.question import Judged, Question, Suite, letters, mean_scores
from mobilevlm.runtime.suites.rows import read_rows

NAMES = {
    "STEM": (
        "organic_chemistry=有機化學 advance_chemistry=化學 physics=物理 "
        "secondary_physics=高中物理 pharmacy=藥劑學 "
        "statistics_and_machine_learning=統計與機器學習 computer_science=資訊工程 "
        "basic_medical_science=基礎醫學 junior_science_exam=國中會考基測自然科 "
        "junior_math_exam=國中會考基測數學科 tve_mathematics=統測數學 "
        "tve_natural_sciences=統測自然科 junior_chemistry=國中理化 "
        "engineering_math=工程數學"
    ),
    "humanities": (
        "general_principles_of_law=法學大意 anti_money_laundering=洗錢防制 "
        "jce_humanities=指考人文科目 introduction_to_law=法律概論 taxation=稅務 "
        "trust_practice=信託實務 administrative_law=行政法"
    ),
    "social sciences": (
        "clinical_psychology=臨床心理學 ttqav2=台灣在地用語 "
        "human_behavior=人類行為與社會 national_protection=軍事 politic_science=政治 "
        "educational_psychology=教育心理 education_(profession_level)=教育專業 "
        "economics=經濟學 "
        "occupational_therapy_for_psychological_disorders=心理障礙職能治療學 "
        "geography_of_taiwan=台灣地理 physical_education=體育 macroeconomics=總經 "
        "chinese_language_and_literature=國文 junior_chinese_exam=國中會考基測國文 "
        "tve_chinese_language=統測國文 education=教育常識 "
        "three_principles_of_people=三民主義 taiwanese_hokkien=閩南語"
    ),
    "other": (
        "dentistry=牙醫學 traditional_chinese_medicine_clinical_medicine=中醫臨床醫學 "
        "technical=技術工相關 culinary_skills=餐旅 mechanical=機械與機電概論 "
        "logic_reasoning=邏輯思維 real_estate=房地產 finance_banking=金融與法規 "
        "marketing_management=行銷管理 business_management=企業管理 agriculture=農業 "
        "official_document_management=機關文書 financial_analysis=財務分析 "
        "management_accounting=管理會計 veterinary_pathology=獸醫病理學 "
        "accounting=會計學 fire_science=火災學 optometry=視光學 "
        "insurance_studies=保險學 pharmacology=藥理學 veterinary_pharmacology=獸醫藥理學 "
        "nautical_science=航海 auditing=審計學 trade=貿易 tve_design=統測＿設計 "
        "junior_social_studies=國中會考基測社會科 music=音樂科"
    ),
}
"""Subjects and their names in prompts, by category."""
NAME_OF = dict(pair.split("=") for pairs in NAMES.values() for pair in pairs.split())
CATEGORY_OF = {
    pair.split("=")[0]: category for category, pairs in NAMES.items() for pair in pairs.split()
}
STATED = re.compile(
    r"(?:correct answer is:\n{1,3}|一项是\s?|的解是|所以答案為|答案應?為[:：]\s?|"
    r"答案為(?:\(| \*\*)|"
    r"答案(?:應該|应该|应)?(?:[是为选][:：]?|[:：])(?:\s?[选選]?[项項]?\s?|\(| \*\*))([A-D])"
)
ELSEWHERE = re.compile(r"(?:^[選选][項项]?([A-D])|([A-D]).)")
SPLIT = re.compile(r"[_-](test|dev|val|validation|train)$")


def read_letter(answer: str) -> str:
    """Return the letter that an answer begins with, else the last one after ``答案`` and the like,
    else the last one that something stands behind; an empty text if there is none."""
    said = answer.strip()
    if said[:1] in letters(4):
        return said[0]
    found = STATED.findall(said)
    if not found:
        found = ["".join(groups) for groups in ELSEWHERE.findall(said)]
    return found[-1] if found else ""


def read_tmmlu(data: Path, split: str) -> list[Question]:
    """Read TMMLU+: files named after their subjects."""
    found = []
    for row in read_rows(data, split):
        subject = SPLIT.sub("", row.file.stem)
        if subject.split("-")[0] in ("test", "dev", "val", "validation", "train"):
            subject = row.file.parent.name
        choices = tuple(str(row.need(name)) for name in "ABCD")
        lines = "\n".join(f"{name}. {choice}" for name, choice in zip("ABCD", choices, strict=True))
        name = f"{subject}/{row.place.rpartition(' ')[2]}"
        found.append(
            Question(
                name,
                f"{row.need('question')}\n{lines}\n答案：",
                answers=(str(row.need("answer")).strip(),),
                kind=subject,
                choices=choices,
                lead=f"以下是關於{NAME_OF.get(subject, subject)}考試單選題，請選出正確的答案。\n\n",
            )
        )
    return found


def tmmlu_figures(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the mean accuracy of each category's subjects, and the mean of the categories, which
    papers report: small subjects count as much as large ones."""
    gathered: dict[str, list[float]] = {}
    for subject, accuracy in mean_scores(judged).items():
        gathered.setdefault(CATEGORY_OF.get(subject, "other"), []).append(accuracy)
    found = {name: sum(gathered[name]) / len(gathered[name]) for name in NAMES if name in gathered}
    return {**found, "average": sum(found.values()) / len(found)} if found else {}


SUITES = (
    Suite(
        name="tmmlu+",
        read=read_tmmlu,
        judge=lambda question, answer: float(read_letter(answer) == question.answers[0]),
        max_new_tokens=32,
        split="test",
        figures=tmmlu_figures,
        shots="dev",
    ),
)
