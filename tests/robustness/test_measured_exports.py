"""Measurements of an export, for other processors too and against limits of the user."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import RANDOM_WEIGHTS, fixture_named, refusal

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.checkpoint import Rescaling
from mobilevlm.cli import main
from mobilevlm.errors import PrecisionWarning, QualityError
from mobilevlm.export.formats import Job
from mobilevlm.export.settled import Settled, settle_model
from mobilevlm.model import Model
from mobilevlm.recipe import Recipe
from mobilevlm.runtime.engines.onnx import engine as onnx

Capture = pytest.CaptureFixture[str]
FIXTURE = fixture_named("llava_v1")


def test_an_export_for_processors_with_8_bit_products_is_measured_on_any(tmp_path: Path) -> None:
    """0.018 is what 8 bits lose; where sums saturate it were 0.092."""
    pytest.importorskip("torch")
    place = tmp_path / "bundle"
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrecisionWarning)  # the person chose another processor
        mobilevlm.export(
            FIXTURE.checkpoint,
            place,
            target="cpu-arm64",
            vision_tower=FIXTURE.tower,
            limits=RANDOM_WEIGHTS,
        )
    manifest = open_bundle(place).manifest
    assert {part.weight_bits for part in manifest.artifacts} == {8, None}
    assert manifest.quality.measured
    assert manifest.quality.note.startswith("text: plain English has a perplexity of ")
    assert manifest.quality.stages["vision"].figures["relative_error"] < 0.03
    assert manifest.system_prompt is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)
        with mobilevlm.load(place) as vlm:
            assert vlm.generate("Who?", [FIXTURE.image], max_new_tokens=2).token_ids


def export(capsys: Capture, tmp_path: Path, *options: str, code: int = 2) -> str:
    place = ["-o", tmp_path / "bundle", "--vision-tower", FIXTURE.tower, "--quiet"]
    message = refusal(capsys, "export", FIXTURE.checkpoint, *place, *options, code=code)
    assert not (tmp_path / "bundle").exists()
    return message


def test_a_limit_on_the_command_line_fails_an_export_that_misses_it(
    tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("torch")
    limits = ("--limit", "vision_relative_error=0.0001", "--limit", "decoder_kl=0.6")
    message = export(capsys, tmp_path, *limits, code=1)
    assert "vision relative_error is 0.0" in message and "the limit is 0.0001" in message


def test_a_head_of_a_thousand_times_its_size_misses_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text has thousands of nats per token, whose exponential no float holds."""
    pytest.importorskip("torch")
    monkeypatch.setattr("mobilevlm.export.quality.measure.EXPECTED", math.inf)

    def with_a_broken_head(said: Settled, model: Model) -> tuple[Model, Recipe, list[Job]]:
        changes = {"decoder.lm_head.weight": Rescaling(columns=np.array([1e3], np.float32))}
        broken = dataclasses.replace(model, weights=model.weights.changed(changes))
        return model, *settle_model(said, broken)[1:]

    monkeypatch.setattr("mobilevlm.export.pipeline.settle_model", with_a_broken_head)
    with pytest.raises(QualityError, match="perplexity_ratio is inf, the limit"):
        mobilevlm.export(
            FIXTURE.checkpoint, tmp_path / "bundle", recipe="int8", vision_tower=FIXTURE.tower
        )
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--limit", "decoder_kl"), "--limit 'decoder_kl': expected NAME=VALUE"),
        (("--limit", "decoder_kl=few"), "expected NAME=VALUE, as decoder_kl=0.2"),
        (("--limit", "kl=0.2"), "limit 'kl' is not known: expected vision_relative_error"),
        (("--limit", "decoder_kl=nan"), "limit decoder_kl is nan"),
        (("--limit", "decoder_kl=1", "--no-measure"), "leave --no-measure out"),
        (("--require-measured", "--no-measure"), "leave --no-measure out"),
    ],
)
def test_a_limit_that_is_none_is_refused_before_anything_is_made(
    options: tuple[str, ...], expected: str, tmp_path: Path, capsys: Capture
) -> None:
    assert expected in export(capsys, tmp_path, *options)


def test_what_cannot_be_measured_fails_if_a_person_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Here for want of memory: without the flag the manifest says so."""
    pytest.importorskip("torch")
    monkeypatch.setattr("mobilevlm.export.quality.gate.MEMORY_BASE", 0.0)
    monkeypatch.setattr("mobilevlm.export.quality.gate.MEMORY_LEAST", 0.0)
    message = export(capsys, tmp_path, "--require-measured", code=1)
    assert "quality was not measured (running it takes 0." in message
    assert "leave --require-measured out" in message
    place = tmp_path / "bundle"
    manifest = mobilevlm.export(FIXTURE.checkpoint, place, vision_tower=FIXTURE.tower)
    assert manifest.quality.note.startswith("running it takes 0.")


def test_text_that_was_left_out_is_in_the_manifest_and_fails_if_a_person_asks_for_it(
    tmp_path: Path, capsys: Capture
) -> None:
    """The built-in nano knows drawn scenes only: by default it is judged on them."""
    pytest.importorskip("torch")
    place = tmp_path / "bundle"
    message = refusal(
        capsys, "export", "nano", "-o", place, "--require-measured", "--quiet", code=1
    )
    assert "text: plain English has a perplexity of " in message
    assert "limits not checked: perplexity_ratio)" in message and not place.exists()
    note = mobilevlm.export("nano", place).quality.note
    assert note.startswith("text: plain English has a perplexity of ") and note in message
    assert open_bundle(place).manifest.quality.note == note
    main(["inspect", str(place)])
    assert "not measured: text: plain English has a perplexity of" in capsys.readouterr().out


def test_a_limit_whose_figure_is_missing_fails_if_a_person_asks_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("mobilevlm.export.quality.measure.EXPECTED", math.inf)
    limits = {"decoder_kl": 0.6, "perplexity_ratio": 9}  # of text that nano never saw
    manifest = mobilevlm.export("nano", tmp_path / "whole", limits=limits, require_measured=True)
    assert manifest.quality.measured and not manifest.quality.note
    monkeypatch.setattr("mobilevlm.export.quality.measure.perplexity_figures", lambda _: {})
    with pytest.raises(QualityError, match=r"\(limits not checked: perplexity_ratio\)"):
        mobilevlm.export(
            "nano", tmp_path / "bundle", limits={"decoder_kl": 0.6}, require_measured=True
        )


def test_before_exact_products_8_bit_weights_are_not_measured_and_loading_says_that_they_saturate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.24 and 1.27 end the process where the setting is given."""
    for module in ("runtime.engines.opening", "export.quality.gate"):
        monkeypatch.setattr(f"mobilevlm.{module}.int8_weight_bits", lambda: 7)
    monkeypatch.setattr(onnx, "_version", lambda: (1, 27))
    manifest = mobilevlm.export("nano", tmp_path / "bundle", recipe="int8", weight_bits=8)
    assert not manifest.quality.measured
    assert "8-bit weights saturate on this processor before onnxruntime 1.30" in (
        manifest.quality.note
    )
    with pytest.warns(PrecisionWarning, match="answers may be wrong"):
        mobilevlm.load(tmp_path / "bundle").close()
