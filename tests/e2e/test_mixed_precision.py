"""Mixed precision from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Fixture, refusal, tree_of

from mobilevlm.bundle import open_bundle
from mobilevlm.cli import main

LINES = """\
{"prompt": "What is red?", "answer": "Blood is, and so are roses."}
{"prompt": "Say hello.", "answer": "Hello to you."}
"""


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    path.write_text(LINES)
    return path


def test_a_searched_recipe_makes_a_bundle_of_its_size_every_time(
    mobilevlm_v2: Fixture, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (mobilevlm_v2.checkpoint, "--vision-tower", mobilevlm_v2.tower)
    plan, texts = tmp_path / "plan.toml", []
    for _ in range(2):
        main_arguments = ("search", *source, "-o", plan, "--budget", "5bpw", "--json", "--quiet")
        main([*map(str, main_arguments), "--data", str(samples), "--calibration", str(samples)])
        texts.append(plan.read_text())
    assert texts[0] == texts[1]
    said = json.loads(capsys.readouterr().out.split("\n}\n")[0] + "\n}")
    assert 4.5 < said["bits_per_weight"] <= 5.0
    lines = texts[0].splitlines()
    assert lines[0].startswith("# Mixed precision by sensitivity: mobilevlm search ")
    assert f"KL {said['kl']:.4g} nats" in texts[0]
    bundle = tmp_path / "bundle"
    main(["export", *map(str, source), "-o", str(bundle), "--recipe", str(plan), "--no-measure"])
    artifact = open_bundle(bundle).artifact("decoder", "onnx")
    assert artifact.bits_per_weight == pytest.approx(said["bits_per_weight"], abs=1e-4)
    main(["inspect", str(bundle)])
    assert f"{said['bits_per_weight']:.2f}" in capsys.readouterr().out


def test_export_searches_first_when_it_has_a_goal(
    mobilevlm_v2: Fixture, samples: Path, tmp_path: Path
) -> None:
    """The recipe lies beside the bundle, and makes the same bundle again."""
    base = tmp_path / "base.toml"
    base.write_text(
        'tower = "int8"\nprojector = "int8"\ndecoder = "q4"\nlm_head = "q4"\nembeddings = "fp16"\n'
        'calibration = "samples.jsonl"\n'
        "limits = { vision_relative_error = 1.0, decoder_kl = 10.0 }\n"
    )
    source = (str(mobilevlm_v2.checkpoint), "--vision-tower", str(mobilevlm_v2.tower))
    options = ("--recipe", str(base), "--max-kl", "0.5", "--no-measure", "--quiet")
    main(["export", *source, "-o", str(tmp_path / "bundle"), *options])
    plan = tmp_path / "bundle.toml"
    main(["export", *source, "-o", str(tmp_path / "bundle2"), "--recipe", str(plan),
          "--no-measure", "--quiet"])  # fmt: skip
    first, second = (tree_of(tmp_path / name) for name in ("bundle", "bundle2"))
    assert first == second


def test_wrong_goals_are_refused_before_any_work(
    mobilevlm_v2: Fixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (mobilevlm_v2.checkpoint, "--vision-tower", mobilevlm_v2.tower)
    search = ("search", *source, "-o", tmp_path / "plan.toml", "--quiet")
    assert "one goal: --budget or --max-kl" in refusal(capsys, *search)
    assert "expected bits per weight" in refusal(capsys, *search, "--budget", "4.5")
    assert "too small: the candidates" in refusal(capsys, *search, "--budget", "1bpw")
    assert "x>0" in refusal(capsys, *search, "--max-kl", "0")
    export = ("export", *source, "-o", tmp_path / "bundle")
    assert "--plan-out goes with" in refusal(capsys, *export, "--plan-out", "x.toml")
    goal = ("--budget", "5bpw", "--format", "gguf")
    assert "GGUF has a type for all" in refusal(capsys, *export, *goal)
    assert list(tmp_path.iterdir()) == []
