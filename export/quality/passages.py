"""Text that a decoder is measured on: a prompt with an answer in plain English, and a question that
the model answers itself.

Nothing is calibrated on them, and they are the same on every machine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from mobilevlm.export.calibration.samples import Sample, answer_ids, sample_pieces
from mobilevlm.model import Model
from mobilevlm.prompt import count_positions

LONGEST_TEXT = 288
"""Tokens of the passages that are measured: enough for a mean KL within a tenth of itself"""
MOST_LOGITS = 24_000_000
"""Positions times vocabulary: a large vocabulary has fewer positions."""
SHORTEST_TEXT = 8
"""A context that has no room for so many goes without the passages."""
EXPECTED = 100.0
"""Largest perplexity of the passages in the reference at which they are text that it may meet: a
general language model has 5 to 30, one for drawn scenes or with random weights has thousands."""

PROMPT = "Write three short texts: an explanation, a story, and the description of a photo."
PASSAGES = (
    "Sunlight looks white, but it is a mixture of all the colors of the rainbow. When it "
    "enters the atmosphere, it meets molecules of nitrogen and oxygen that are much smaller "
    "than the length of its waves. These molecules scatter short waves far more strongly than "
    "long ones, so blue light is sent in every direction while red light goes straight on. "
    "Wherever you look, some of that scattered blue light reaches your eyes. In the evening "
    "the light has a longer way through the air, most of the blue is gone by the time it "
    "arrives, and the sun and the clouds around it turn orange and red.\n\n"
    "Every night for thirty years, old Martha climbed the ninety-two steps and lit the lamp. "
    "The fishermen in the village said they could set their watches by her. One evening in "
    "November a storm came in from the west, and the wind broke two panes of glass at the top "
    "of the tower. Martha hung her coat over the hole, held it with both hands, and stood "
    "there until morning. When the boats came home at dawn, the captain of the smallest one "
    'walked up the hill with a basket of fish. "We saw your light," he said. She only smiled, '
    "and asked him to help her down the stairs.\n\n"
    "The image shows a narrow street in the center of a city on a sunny afternoon. On the "
    "left side there is a row of small shops with striped awnings, and in front of the first "
    "one a woman in a red dress is choosing oranges from a wooden box. Two men on bicycles "
    "are riding past a white delivery van that is parked at the curb. In the background you "
    "can see a church tower with a clock, and above the roofs the sky is clear and blue. A "
    "brown dog is sleeping in the shade under a table."
)
"""An answer to it"""

QUESTION = "What is the capital of France, and what is it known for?"
"""Prompt that a model answers itself"""


def text_samples(model: Model, answer_tokens: int) -> list[Sample]:
    """Return the passages as far as there is room for them, and the question, which is answered in
    ``answer_tokens``; without what the context has no room for, and none for a model with an
    encoder."""
    if model.spec.decoder.encoder_layers:
        return []
    asked, question = Sample(PROMPT, "", ()), Sample(QUESTION, "", ())
    room = min(_room(model, asked), longest_text(model))
    words = PASSAGES.split(" ")
    ends = range(1, len(words) + 1)
    most = bisect_right(ends, room, key=lambda end: _answer_length(model, asked, words[:end]))
    found: list[Sample] = []
    if most and _answer_length(model, asked, words[:most]) >= SHORTEST_TEXT:
        found.append(replace(asked, answer=" ".join(words[:most])))
    if _room(model, question) >= answer_tokens:
        found.append(question)
    return found


def missing_text(model: Model, samples: Sequence[Sample]) -> str:
    """Return why the passages or the question are not among the samples of :func:`text_samples`;
    empty if both are."""
    if model.spec.decoder.encoder_layers:
        return "models with an encoder are judged on images"
    prompts = {sample.prompt for sample in samples}
    names = {PROMPT: "plain English", QUESTION: "a question and its answer"}
    missing = [name for prompt, name in names.items() if prompt not in prompts]
    return f"the context has no room for {' and '.join(missing)}" if missing else ""


def longest_text(model: Model) -> int:
    """Return how many tokens of the passages are measured, if the context has room for them."""
    return min(LONGEST_TEXT, MOST_LOGITS // model.spec.decoder.vocab_size)


def _room(model: Model, sample: Sample) -> int:
    """Return the positions that the context has left behind a sample."""
    return model.spec.decoder.context_length - count_positions(sample_pieces(model, sample))


def _answer_length(model: Model, sample: Sample, words: Sequence[str]) -> int:
    return len(answer_ids(model, replace(sample, answer=" ".join(words))))
