"""Plain text that exports and verify are measured on: what of it a model is given, and when it
counts."""

from __future__ import annotations

import dataclasses
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import fixture_named
from numpy.typing import NDArray

from mobilevlm.export.calibration.samples import answer_ids, sample_pieces
from mobilevlm.export.quality.passages import (
    LONGEST_TEXT,
    MOST_LOGITS,
    PASSAGES,
    longest_text,
    missing_text,
    text_samples,
)
from mobilevlm.model import Model
from mobilevlm.prompt import Rows, count_positions

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


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        ({"context_length": 2048}, ""),
        ({"context_length": 16}, "no room for plain English and a question and its answer"),
        ({"context_length": 2048, "encoder_layers": 2}, "with an encoder are judged on images"),
    ],
)
def test_what_is_left_out_is_said(decoder: dict[str, Any], expected: str) -> None:
    model = model_of(**decoder)
    said = missing_text(model, text_samples(model, OWN))
    assert expected in said and (expected == "") == (said == "")


def test_models_with_an_encoder_are_given_no_text() -> None:
    """Progress counts what is given."""
    assert text_samples(model_of(context_length=2048, encoder_layers=2), OWN) == []


def test_logits_of_a_comparison_are_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export has room for those of the reference and for those of one graph."""
    pytest.importorskip("torch")
    import torch

    from mobilevlm.export.quality import measure

    model = model_of(context_length=2048)
    text = dataclasses.replace(text_samples(model, OWN)[0], answer="Sun")
    held: list[weakref.ref[Any]] = []

    def logits(*given: Any) -> NDArray[np.float32]:
        assert [item for item in held if item() is not None] == []
        found = np.random.default_rng(len(held)).standard_normal((3, 50)).astype(np.float32)
        held.append(weakref.ref(found))
        return found

    vlm: Any = SimpleNamespace(
        bundle=None, engine="onnx", spec=model.spec, prompt_logits=logits, embeds_logits=logits
    )
    exact = np.zeros((3, 50), np.float32)
    monkeypatch.setattr(measure, "_logits", lambda *_: exact)
    monkeypatch.setattr(measure, "stage_formats", lambda *_: {"prefill": "onnx"})
    answer = measure._Answer(
        [1, 2], Rows(np.zeros((9, 4), np.float32)), torch.zeros(1, 9, 4), False
    )
    nothing: Any = None
    figures = measure._measure_answers(nothing, vlm, text, ((), ()), [answer])
    assert len(held) == 3 and figures.prefill is not None and figures.text is not None


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
