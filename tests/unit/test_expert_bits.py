"""Bits of sparse experts: what usage does to a measured divergence, and units of a fused layer."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
from conftest import fixture_named, run_program

from mobilevlm.bundle import open_bundle
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.recipes.file import find_recipe
from mobilevlm.export.search.bit_allocation import Option
from mobilevlm.export.search.expert_bits import PRIOR, ExpertUse, by_usage, expert_uses
from mobilevlm.export.search.search import Data, Goal, search
from mobilevlm.recipe import LinearFormat

MLP = "decoder.layers.0.mlp.experts"
Q2, Q4 = LinearFormat("q2"), LinearFormat("q4")
TEXTS = [
    Sample("What is red?", "Blood is, and so are roses.", ()),
    Sample("Say hello in three words.", "Hello to you.", ()),
]
FORMATS = tuple(LinearFormat(p, symmetric=False) for p in ("q2", "q4", "q8"))


def options(*kls: float) -> list[Option]:
    return [Option(Q2, 2, kls[0]), Option(Q4, 4, kls[1])]


def test_divergence_follows_the_share_of_choices() -> None:
    """Measured alike and used alike, but one of them four times as often in all the data."""
    many = 10**6
    uses = {
        f"{MLP}.0": ExpertUse(many, 2 * many, 0.8),
        f"{MLP}.1": ExpertUse(many, 2 * many, 0.2),
    }
    names = ["decoder.layers.0.attn.q_proj", f"{MLP}.0.fc1", f"{MLP}.1.fc1"]
    dense, often, seldom = by_usage(names, [options(9, 3), options(1, 0.5), options(1, 0.5)], uses)
    assert dense == options(9, 3)
    assert [option.kl for option in often] == pytest.approx([1.6, 0.8])
    assert [option.kl for option in seldom] == pytest.approx([0.4, 0.2])
    assert [(option.layers, option.size) for option in seldom] == [(Q2, 2), (Q4, 4)]


def test_what_was_measured_stays_where_the_data_agree() -> None:
    many = 10**7
    uses = {f"{MLP}.0": ExpertUse(3 * many, 4 * many, 0.75),
            f"{MLP}.1": ExpertUse(many, 4 * many, 0.25)}  # fmt: skip
    names = [f"{MLP}.0.fc1", f"{MLP}.1.fc1"]
    found = by_usage(names, [options(5, 1), options(0.1, 0.01)], uses)
    kls = [option.kl for row in found for option in row]
    assert kls == pytest.approx([5, 1, 0.1, 0.01], rel=1e-3)


def test_an_expert_that_was_not_measured_is_taken_for_an_average_one() -> None:
    """Its own effect is zero in every format, which would give it the fewest bits for certain."""
    uses = {f"{MLP}.0": ExpertUse(10**6, 10**6, 0.9), f"{MLP}.1": ExpertUse(0, 10**6, 0.1)}
    found = by_usage([f"{MLP}.0.fc1", f"{MLP}.1.fc1"], [options(4, 1), options(0, 0)], uses)
    assert [option.kl for option in found[1]] == pytest.approx([0.4, 0.1])
    assert PRIOR > 0


def test_usage_counts_the_choices_of_both_kinds_of_data() -> None:
    model = fixture_named("moe_llava_stablelm").model
    uses = expert_uses(model, TEXTS[:1], TEXTS[1:])
    assert set(uses) == {f"decoder.layers.{i}.mlp.experts.{j}" for i in (0, 2) for j in range(4)}
    for layer in (0, 2):
        found = [uses[f"decoder.layers.{layer}.mlp.experts.{index}"] for index in range(4)]
        assert sum(use.expected for use in found) == pytest.approx(1)
        assert {use.layer_measured for use in found} == {sum(use.measured for use in found)}


@pytest.mark.parametrize("experts", ["plain", "fused"])
def test_a_search_gives_bits_to_each_expert_or_to_each_layer(
    experts: Literal["plain", "fused"],
) -> None:
    model = fixture_named("moe_llava_stablelm").model
    found = search(model, Goal(bits_per_weight=5.0), FORMATS, Data(TEXTS, TEXTS), experts)
    layer = {
        name: layers
        for name, layers in found.layers.items()
        if name.startswith("decoder.layers.0.mlp.experts.")
    }
    assert len(layer) == 8  # gate and up are one product
    units = [unit for unit in found.units if ".experts." in unit.name]
    assert len(units) == (2 if experts == "fused" else 16)
    assert experts == "plain" or len(set(layer.values())) == 1
    assert bool(found.usage) == (experts == "plain")
    step = max(
        abs(unit.stored_bytes(a) - unit.stored_bytes(b))
        for unit in found.units
        for a, b in pairwise(FORMATS)
    )
    weights = sum(unit.size for unit in found.units)
    assert 5.0 - 8 * step / weights < found.bits_per_weight <= 5.0
    assert sum(group.size for unit in found.units for group in unit.groups) == weights


def test_blocks_that_no_fused_operator_takes_are_refused() -> None:
    model = fixture_named("moe_llava_stablelm").model  # 64 and 96 channels
    formats = [replace(FORMATS[0], block_size=128)]
    with pytest.raises(MobileVLMError, match="search with --experts plain"):
        search(model, Goal(max_kl=1.0), formats, Data(TEXTS, TEXTS), "fused")


@pytest.mark.parametrize("experts", ["plain", "fused"])
def test_a_searched_recipe_exports_with_the_size_that_it_says(experts: str, tmp_path: Path) -> None:
    fixture = fixture_named("moe_llava_stablelm")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "What is red?", "answer": "Blood is."}\n')
    source = [fixture.checkpoint, "--vision-tower", fixture.tower]
    plan, bundle = tmp_path / "plan.toml", tmp_path / "bundle"
    done = run_program("search", *source, "-o", plan, "--budget", "5bpw", "--quantizer", "rtn",
                       "--experts", experts, "--data", data)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert find_recipe(str(plan)).experts == experts
    assert ("share of the layer's choices" in plan.read_text()) == (experts == "plain")
    done = run_program("export", *source, "-o", bundle, "--recipe", plan, "--no-measure")
    assert done.returncode == 0, done.stderr
    found = open_bundle(bundle).artifact("decoder", "onnx").bits_per_weight
    assert found is not None and found == pytest.approx(5.0, abs=0.3) and found <= 5.0
