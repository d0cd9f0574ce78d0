"""Usage of experts by layer and modality: counted alike everywhere, and shown as a table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MOE_FIXTURES, Fixture, fixture_named, refusal, run_program

import mobilevlm
from mobilevlm.console.tables import Styled
from mobilevlm.export.calibration.samples import Sample, sample_tokens
from mobilevlm.export.experts.table import UsageReport, usage_table
from mobilevlm.export.experts.usage import LayerUsage, bundle_usage, checkpoint_usage, shares


def samples(fixture: Fixture) -> list[Sample]:
    return [
        Sample("What is this?", "A house.", (fixture.image,)),
        Sample("<image> Or <image>?", "", (fixture.image, fixture.image)),
        Sample("And what is that?", "", ()),
    ]


@pytest.mark.parametrize("name", MOE_FIXTURES)
def test_every_choice_of_every_position_is_counted_in_its_modality(name: str) -> None:
    fixture = fixture_named(name)
    usage = checkpoint_usage(fixture.model, samples(fixture))
    tokens = [part for sample in samples(fixture) for part in sample_tokens(fixture.model, sample)]
    assert [layer.layer for layer in usage] == [0, 2]
    for layer in usage:
        assert len(layer.visual) == len(layer.text) == 4
        assert sum(layer.visual) == 2 * 3 * fixture.model.spec.image.connector.num_tokens
        assert sum(layer.text) == 2 * sum(isinstance(token, int) for token in tokens)
        assert sum(layer.total) == sum(layer.visual) + sum(layer.text)


def test_a_float_bundle_uses_the_experts_of_its_checkpoint(tmp_path: Path) -> None:
    fixture = fixture_named("moe_llava_stablelm")
    mobilevlm.export(
        fixture.checkpoint, tmp_path / "b", recipe="fp32", vision_tower=fixture.tower, measure=False
    )
    with mobilevlm.load(tmp_path / "b", "onnx") as vlm:
        found = bundle_usage(vlm, samples(fixture))
    assert found == checkpoint_usage(fixture.model, samples(fixture))


def test_shares_of_nothing_are_nothing() -> None:
    assert shares((0, 0)) == (0.0, 0.0)
    assert shares((1, 3)) == (0.25, 0.75)


USAGE = UsageReport(
    "a <model>",
    "3 samples",
    2,
    (LayerUsage(0, (60, 20, 20), (5, 5, 0)), LayerUsage(7, (100, 0), (4, 6))),
)
"""The second layer has fewer experts."""


def test_a_modality_that_was_not_seen_is_left_out() -> None:
    assert [name for name, _ in USAGE.parts] == ["50 visual tokens", "5 text tokens"]
    unseen = tuple(replace(layer, visual=(0,) * len(layer.visual)) for layer in USAGE.layers)
    assert [name for name, _ in replace(USAGE, layers=unseen).parts] == ["5 text tokens"]


def test_the_table_has_a_row_for_each_layer_and_modality() -> None:
    view = usage_table(USAGE)
    titles = [column.title for column in view.columns]
    assert titles == ["layer", "tokens", "expert 0", "expert 1", "expert 2"]
    rows = [row for row in view.rows if row is not None]
    assert [row[:2] for row in rows] == [
        ("0", "visual"), ("7", "visual"), ("0", "text"), ("7", "text")
    ]  # fmt: skip
    assert rows[1][2:] == (Styled("100.0%", "bold"), Styled("0.0%", "dim"))
    assert USAGE.to_dict()["layers"][7] == {"visual": (100, 0), "text": (4, 6)}


def test_inspect_shows_experts_of_a_bundle(tmp_path: Path) -> None:
    fixture = fixture_named("moe_llava_qwen")
    mobilevlm.export(
        fixture.checkpoint, tmp_path / "b", recipe="int4", vision_tower=fixture.tower, measure=False
    )
    lines = [{"image": str(fixture.image), "prompt": "What is this?", "answer": "A house."}]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    done = run_program("inspect", tmp_path / "b", "--experts", "--data", data, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    tokens = fixture.model.spec.image.connector.num_tokens
    assert [sum(layer["visual"]) for layer in found["layers"].values()] == [2 * tokens] * 2
    assert found["source"] == "recipe int4, engine onnx"


def test_what_has_no_experts_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no experts" in refusal(capsys, "inspect", "nano", "--experts")
