"""Plain text that exports and verify are measured on: what of it a model is given, and when it
counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from conftest import fixture_named

from mobilevlm.export.calibration.samples import answer_ids, sample_pieces
from mobilevlm.export.quality.passages import (
    LONGEST_TEXT,
    MOST_LOGITS,
    PASSAGES,
    longest_text,
    text_samples,
)
from mobilevlm.model import Model
from mobilevlm.prompt import count_positions

OWN = 16
"""Tokens that a question is answered in."""


def model_of(**decoder: Any) -> Model:
    model = fixture_named("llava_v1").model
    changed = dataclasses.replace(model.spec.decoder, **decoder)
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, decoder=changed))


def test_a_long_context_has_room_for_the_text_and_a_question() -> None:
    model = model_of(context_length=2048)
    text, question = text_samples(model, OWN)
    assert PASSAGES.startswith(text.answer) and not question.answer
    assert LONGEST_TEXT - 16 < len(answer_ids(model, text)) <= LONGEST_TEXT


@pytest.mark.parametrize("context", [16, 90, 120, 200])
def test_what_a_short_context_has_no_room_for_is_left_out(context: int) -> None:
    model = model_of(context_length=context)
    for sample in text_samples(model, OWN):
        added = 0 if sample.answer else OWN
        assert count_positions(sample_pieces(model, sample)) + added <= context


def test_a_large_vocabulary_is_measured_at_fewer_positions() -> None:
    assert longest_text(model_of(vocab_size=32000)) == LONGEST_TEXT
    assert longest_text(model_of(vocab_size=151936)) * 151936 <= MOST_LOGITS


@pytest.mark.parametrize(("loss", "counts"), [(3.0, True), (6.0, False)])
def test_text_that_the_reference_does_not_expect_is_not_judged(loss: float, counts: bool) -> None:
    """A perplexity of 20, and one of 403."""
    pytest.importorskip("torch")
    from mobilevlm.export.quality.measure import SampleFigures, _unexpected
    from mobilevlm.export.quality.metrics import TextFigures, TokenFigures

    sample = text_samples(model_of(context_length=2048), OWN)[0]
    text = TextFigures(found=0.0, exact=10 * loss, tokens=10)
    nothing = TokenFigures(*([] for _ in range(3)))  # type: ignore[arg-type]
    note = _unexpected([SampleFigures(sample, (), (), nothing, None, None, text, (), None)])
    assert (note == "") == counts
    assert counts or note == (
        "plain English has a perplexity of 403 in this model: judged on images"
    )
