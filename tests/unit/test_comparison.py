"""The arithmetic of benchmarks/compare.py: figures, targets, roofline, operator tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compare import PHOTO, asked_about
from comparison.candidates import OURS
from comparison.figures import MEASURES, TARGETS, Figure, memory_verdict, summarize, verdicts
from comparison.measure import Rounds, drop_from_cache
from comparison.plots import markdown_to_html
from comparison.profiling import operator_times
from comparison.report import as_markdown, targets
from comparison.results import Comparison, Entry
from comparison.roofline import (
    Peaks,
    Work,
    decode_work,
    prefill_work,
    projector_operations,
    share_of_roof,
    token_operations,
    tower_operations,
    vision_work,
)
from comparison.work import BOS, photo, token_ids
from conftest import fixture_named

from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.image_encoder import TransformerEncoder

pytestmark = pytest.mark.pure

DECODER = DecoderSpec(100, 8, 24, 3, 2, 1, 4, 1e-6, 1e4, 1.0, 64, False)
WEIGHTS_OF_A_LAYER = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 24
"""q; k and v with one head of 4; o; gate, up and down."""


def entry(name: str, **rows: list[float]) -> Entry:
    return Entry(name, OURS, {key: tuple(row) for key, row in rows.items()}, {}, {}, {}, ())


def comparison(*entries: Entry) -> Comparison:
    facts = dict.fromkeys(("processor", "memory_gb", "system", "python", "onnxruntime"), "?")
    machine = facts | {"mobilevlm": "?", "features": []}
    return Comparison("m", "command", 2, 1, machine, Peaks(1, 1, 1), entries, {})


def test_a_figure_is_the_median_with_least_and_most() -> None:
    assert summarize([3.0, 1.0, 10.0]) == Figure(median=3.0, low=1.0, high=10.0, count=3)
    assert summarize([]) is None


def test_targets_set_our_best_against_their_best() -> None:
    rows = {
        "ours a": {"encode": [1.0, 1.2, 9.0], "decode": [23.0]},
        "ours b": {"encode": [2.0], "decode": [10.0]},
        "theirs a": {"encode": [4.0], "decode": [20.0]},
        "theirs b": {"encode": [2.0], "decode": [5.0]},
    }
    found = {v.key: v for v in verdicts(rows, ["ours a", "ours b"], ["theirs a", "theirs b"])}
    assert set(found) == {"encode", "decode"}  # what nobody measured has no verdict
    encode, decode = found["encode"], found["decode"]
    assert (encode.ours, encode.peer, encode.met) == ("ours a", "theirs b", False)
    assert encode.ratio == pytest.approx(0.6)
    # more is better here: their best is the highest, and 23 / 20 is exactly the limit
    assert (decode.ours, decode.peer, decode.met) == ("ours a", "theirs a", True)
    assert decode.ratio == pytest.approx(1.15)


def test_our_best_has_no_worse_quality_than_the_peer() -> None:
    rows = {
        "small": {"decode": [30.0], "kl_decode": [0.2]},
        "good": {"decode": [24.0], "kl_decode": [0.096]},
        "theirs": {"decode": [20.0], "kl_decode": [0.098]},
    }
    (equal,) = verdicts(rows, ["small", "good"], ["theirs"])
    assert (equal.ours, equal.met) == ("good", True) and equal.ratio == pytest.approx(1.2)
    (worse,) = verdicts(rows, ["small"], ["theirs"])
    assert (worse.ours, worse.met) == ("small", False) and worse.ratio == pytest.approx(1.5)


def test_a_photo_of_a_model_that_splits_is_counted_with_its_tiles_and_marks() -> None:
    spec = fixture_named("smolvlm2").model.spec
    split = asked_about(spec, None)
    assert split.size == PHOTO and len(split.runs) == 13  # 3 rows of 4, and the whole small
    assert set(split.runs) == {spec.image.transformer.num_positions}
    assert split.positions > len(split.runs) * spec.image.connector.num_tokens  # marks of tiles
    tile = vision_work(spec, 10, split.runs[:1]).operations
    assert vision_work(spec, 10, split.runs).operations == len(split.runs) * tile


def test_a_photo_of_a_model_with_one_square_has_its_size() -> None:
    spec = fixture_named("llava_hf").model.spec
    size = spec.image.square.size
    found = asked_about(spec, None)
    assert (found.size, found.positions) == ((size, size), spec.image.connector.num_tokens)
    assert len(found.runs) == len(asked_about(spec, (1024, 768)).runs) == 1


def test_the_second_question_is_held_against_our_own_first() -> None:
    rows = {"ours": {"second_share": [0.2, 0.1, 0.14]}, "theirs": {"second_share": [0.01]}}
    (verdict,) = verdicts(rows, ["ours"], ["theirs"])
    assert (verdict.ratio, verdict.limit, verdict.met, verdict.peer) == (0.14, 0.15, True, None)


def test_every_target_of_the_table_is_a_ratio_below_or_above_its_limit() -> None:
    for target in TARGETS:
        assert (target.limit > 1) == (target.better == "more")


def test_memory_may_lie_350_mb_over_the_artifacts() -> None:
    for peak, met in ((1350.0, True), (1351.0, False)):
        verdict = memory_verdict({"a": {"peak": [peak], "size": [1000.0]}}, "a")
        assert verdict is not None and verdict.met is met
    assert memory_verdict({"a": {"size": [1000.0]}}, "a") is None


def test_each_candidate_shows_its_peak_over_its_artifacts() -> None:
    assert entry("a", peak=[1390.0, 1410.0], size=[1000.0]).figure("peak_over_size") == Figure(
        median=400.0, low=390.0, high=410.0, count=2
    )
    assert entry("a", size=[1000.0]).figure("peak_over_size") is None


def test_who_runs_a_part_of_the_model_wins_no_column_of_memory() -> None:
    whole, part = entry("a", load_and_first=[1.0], decode=[5.0], peak=[9.0]), entry("b", peak=[1.0])
    part.rows["decode"] = (7.0,)
    result = comparison(whole, part)
    winners = {m.key: winner.name for m in MEASURES if (winner := result.best(m))}
    assert winners == {"load_and_first": "a", "decode": "b", "peak": "a"}
    assert "| b | **7.0** | – | 1 |" in as_markdown(result)


def test_each_peer_has_the_ratio_to_our_best() -> None:
    peer = replace(entry("b", encode=[4.0], decode=[10.0], peak=[1.0]), group="mnn")
    result = comparison(entry("x", encode=[2.0]), entry("y", encode=[1.0], decode=[5.0]), peer)
    ratios = {m.key: result.ratio(m, "mnn") for m in MEASURES}
    assert {key: ratio for key, ratio in ratios.items() if ratio} == {"encode": 0.25, "decode": 0.5}
    assert "| mnn | 0.25 | – | – | 0.50 | – | – | – | – |" in targets(result)


def test_the_report_of_an_interrupted_run_says_what_is_complete() -> None:
    result = replace(
        comparison(entry("a")), finished=False, planned=Rounds(3, 5, 2), done=Rounds(3, 1, 0)
    )
    line = "3 of 3 rounds of loads, 1 of 5 rounds of stages, 0 of 2 rounds of curves"
    for text in (as_markdown(result), "\n".join(targets(result))):
        assert line in text
    assert "Interrupted" not in as_markdown(comparison(entry("a")))


def test_operations_of_a_decoder_layer_are_two_per_weight() -> None:
    assert token_operations(DECODER, "layers") == 3 * 2 * WEIGHTS_OF_A_LAYER


def test_a_prompt_of_one_token_is_a_decode_step_after_none() -> None:
    """Its attention sees itself, that of a step after none sees nothing older: 4 heads × head_dim
    operations per layer of difference."""
    prompt, step = prefill_work(DECODER, 1, 7), decode_work(DECODER, 0, 7, 4)
    assert prompt.operations - step.operations == 3 * 4 * 2 * 4
    assert (prompt.bytes_read, step.bytes_read) == (7, 7)


def test_a_decode_step_reads_keys_and_values_of_its_context() -> None:
    # 2 (keys, values) × 3 layers × 1 head × 4 × 10 positions × 2 bytes
    assert decode_work(DECODER, 10, 0, 2).bytes_read == 2 * 3 * 1 * 4 * 10 * 2


def test_operations_of_the_tower_and_projectors() -> None:
    tower = TransformerEncoder(
        8, 16, 2, 2, 12, 4, "quick_gelu", 1e-5
    )  # 9 patches and the class token
    weights = 4 * 8 * 8 + 2 * 8 * 16
    expected = 2 * 9 * 48 * 8 + 2 * (2 * 10 * weights + 4 * 10 * 10 * 8)
    assert tower_operations(tower) == expected
    linear = ConnectorSpec("mlp", 8, 6, 1, 3, 3)
    assert projector_operations(linear) == 2 * 9 * 8 * 6
    pooled = ConnectorSpec("ldpv2", 8, 6, 2, 4, 2)  # 16 patches, 4 tokens
    assert projector_operations(pooled) == 2 * 16 * 8 * 6 + 4 * (2 * 6 * 6 + 2 * 9 * 6)


def test_the_roof_is_the_slower_of_computing_and_reading() -> None:
    work = Work(operations=100.0, bytes_read=30.0)
    assert share_of_roof(work, 4.0, operations_peak=50.0, read_peak=30.0) == 0.5  # 2 s computing
    assert share_of_roof(work, 4.0, operations_peak=100.0, read_peak=10.0) == 0.75  # 3 s reading


def test_operators_are_summed_over_the_last_runs() -> None:
    def call(node: str, operator: str, microseconds: int, width: int) -> dict[str, object]:
        shape = [{"float": [1, 2, width]}]
        arguments = {"op_name": operator, "output_type_shape": shape}
        name = f"{node}_kernel_time"
        return {"cat": "Node", "name": name, "dur": microseconds, "args": arguments}

    run = [call("a", "MatMul", 3000, 8), call("b", "MatMul", 3000, 8), call("c", "Add", 2000, 8)]
    slow_first = [call("a", "MatMul", 99000, 8), *run[1:]]
    session = {"cat": "Session", "name": "model_run", "dur": 5, "args": {}}
    rows = operator_times([*slow_first, session, *run, *run], runs=2)
    assert [(row.what, row.count) for row in rows] == [("MatMul → 8", 2), ("Add", 1)]
    assert [row.milliseconds for row in rows] == [6.0, 2.0]
    assert rows[0].share == 0.75


def test_variations_differ_and_repeat() -> None:
    assert token_ids(20, 1000, 1) == token_ids(20, 1000, 1) != token_ids(20, 1000, 2)
    ids = token_ids(20, 1000, 1)
    assert len(ids) == 20 and ids[0] == BOS and max(ids) < 1000
    assert photo((8, 4), 1).shape == (4, 8, 3)
    assert not np.array_equal(photo((8, 4), 1), photo((8, 4), 2))


def test_dropped_files_are_known_to_be_dropped(tmp_path: Path) -> None:
    """A mapped file's pages stay; the share that stays is told, so no warm load passes as cold."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(2**20))
    held = np.memmap(path, np.uint8, "r")
    assert int(held.sum()) == 0  # every page is read
    assert drop_from_cache([path]) > 0.9
    del held


def test_tables_survive_the_way_to_html() -> None:
    table = "| x | y |\n| --- | --- |\n| **1** | < 2 |"
    page = markdown_to_html(f"## A & B\n\n{table}\n\n- some\n- `more`\n\ntext")
    assert "<h2>A &amp; B</h2>" in page
    assert page.count("<tr>") == 2 and "<th>y</th>" in page
    assert "<td><b>1</b></td><td>&lt; 2</td>" in page
    assert page.index("</table>") < page.index("<ul>") < page.index("<p>text</p>")
    assert page.count("<li>") == 2 and "<li><code>more</code></li>\n</ul>" in page
