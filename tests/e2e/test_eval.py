"""``mobilevlm eval`` on a model with random weights: what it counts, not how well it answers."""

from __future__ import annotations

import json

from conftest import BundleOf, run_program

QUESTIONS = 24
"""Two of each of the 12 kinds."""


def test_eval_scores_each_kind_beside_blind(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny", "int4")
    done = run_program("eval", bundle, "--questions", str(QUESTIONS), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["suite"] == "scenes"
    assert result["overall"]["asked"] == QUESTIONS
    assert {score["asked"] for score in result["kinds"].values()} == {2}
    assert set(result["blind"]) == set(result["kinds"])
    for score in result["kinds"].values():
        assert 0 <= score["low"] <= score["accuracy"] <= score["high"] <= 1
    assert result["tokens_per_second"] > 0


def test_eval_prints_a_table_for_people(bundle_of: BundleOf) -> None:
    done = run_program("eval", bundle_of("tiny", "int4"), "--questions", "12", "--no-blind")
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if "two_images" in line]
    assert row.rstrip(" │").endswith("–"), "nothing was asked with noise for pictures"
    assert done.stdout.rstrip().endswith("tokens/s")
