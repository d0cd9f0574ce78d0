"""Answers to questions about drawn scenes, on whatever processor this runs on.

    python benchmarks/emulation/answers.py BUNDLE QUESTIONS OUTPUT.npz

Only the base install is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mobilevlm
from mobilevlm.nano.evaluate import LONGEST_ANSWER, is_right
from mobilevlm.nano.suite import evaluation_set, images_of


def answers(bundle: Path, questions: int) -> dict[str, NDArray[Any]]:
    """``ids.N`` of each greedy answer and ``right`` ``(questions,)``; of the first question
    ``visual`` ``(visual tokens, hidden)`` and ``logits`` ``(vocab_size,)`` after the prompt."""
    found: dict[str, NDArray[Any]] = {}
    right = []
    examples = evaluation_set(questions)
    with mobilevlm.load(bundle) as vlm:
        for index, example in enumerate(examples):
            question = example.question
            answer = vlm.generate(question.text, images_of(example), max_new_tokens=LONGEST_ANSWER)
            found[f"ids.{index}"] = np.asarray(answer.token_ids)
            right.append(is_right(question, answer.text))
        images = images_of(examples[0])
        found["visual"] = vlm.encode_image(images[0])
        found["logits"] = vlm.prompt_logits(examples[0].question.text, images)[-1]
    return {**found, "right": np.asarray(right)}


if __name__ == "__main__":
    bundle, questions, output = sys.argv[1:]
    arrays: dict[str, Any] = {**answers(Path(bundle), int(questions))}
    np.savez(output, **arrays)
