"""Text that a decoder is measured on: questions with answers in plain English, and questions that
the model answers itself.

Nothing is calibrated on them, and they are the same on every machine.
"""

from __future__ import annotations

from dataclasses import replace

from mobilevlm.export.calibration.samples import Sample, answer_ids, sample_pieces
from mobilevlm.model import Model
from mobilevlm.prompt import count_positions

LONGEST_PASSAGE = 96
"""Tokens of a passage that are measured"""
SHORTEST_PASSAGE = 8
"""A context that has no room for so many goes without the passage."""
EXPECTED = 100.0
"""Largest perplexity of the passages in the reference at which they are text that it may meet: a
general language model has 5 to 30, one for drawn scenes or with random weights has thousands."""

PASSAGES: tuple[tuple[str, str], ...] = (
    (
        "Explain why the sky is blue.",
        "Sunlight looks white, but it is a mixture of all the colors of the rainbow. When it "
        "enters the atmosphere, it meets molecules of nitrogen and oxygen that are much smaller "
        "than the length of its waves. These molecules scatter short waves far more strongly "
        "than long ones, so blue light is sent in every direction while red light goes straight "
        "on. Wherever you look, some of that scattered blue light reaches your eyes. In the "
        "evening the light has a longer way through the air, most of the blue is gone by the "
        "time it arrives, and the sun and the clouds around it turn orange and red.",
    ),
    (
        "Write a short story about a lighthouse.",
        "Every night for thirty years, old Martha climbed the ninety-two steps and lit the "
        "lamp. The fishermen in the village said they could set their watches by her. One "
        "evening in November a storm came in from the west, and the wind broke two panes of "
        "glass at the top of the tower. Martha hung her coat over the hole, held it with both "
        "hands, and stood there until morning. When the boats came home at dawn, the captain of "
        'the smallest one walked up the hill with a basket of fish. "We saw your light," he '
        "said. She only smiled, and asked him to help her down the stairs.",
    ),
    (
        "Describe a photo of a busy street.",
        "The image shows a narrow street in the center of a city on a sunny afternoon. On the "
        "left side there is a row of small shops with striped awnings, and in front of the "
        "first one a woman in a red dress is choosing oranges from a wooden box. Two men on "
        "bicycles are riding past a white delivery van that is parked at the curb. In the "
        "background you can see a church tower with a clock, and above the roofs the sky is "
        "clear and blue. A brown dog is sleeping in the shade under a table.",
    ),
)
"""Prompts and answers"""

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Give me three tips for staying healthy.",
)
"""Prompts that a model answers itself"""


def text_samples(model: Model, answer_tokens: int) -> list[Sample]:
    """Return the passages as far as the context has room for them, then the questions, which are
    answered in ``answer_tokens``."""
    context = model.spec.decoder.context_length
    found: list[Sample] = []
    for prompt, answer in PASSAGES:
        asked = Sample(prompt, "", ())
        room = min(LONGEST_PASSAGE, context - count_positions(sample_pieces(model, asked)))
        words = answer.split()
        while words and _answer_length(model, replace(asked, answer=" ".join(words))) > room:
            words.pop()
        sample = replace(asked, answer=" ".join(words))
        if words and _answer_length(model, sample) >= SHORTEST_PASSAGE:
            found.append(sample)
    questions = [Sample(question, "", ()) for question in QUESTIONS]
    return found + [
        question
        for question in questions
        if count_positions(sample_pieces(model, question)) + answer_tokens <= context
    ]


def _answer_length(model: Model, sample: Sample) -> int:
    return len(answer_ids(model, sample))
