"""SPEC.toml of ``export-matrix``: its jobs, what is done of them, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal

from mobilevlm.bundle import MANIFEST
from mobilevlm.errors import MobileVLMError
from mobilevlm.export import matrix
from mobilevlm.export.matrix import Matrix, jobs_of, read_matrix, run_matrix, table_lines

SPEC = """\
checkpoints = ["nano", "models/a"]
recipes = ["fp32", "own.toml"]
export = ["--no-measure"]
bench = ["--runs", "2"]
origins = { "models/a" = ["--vision-tower", "tower"] }
"""
EXPORTED = {"bytes": 2_000_000, "quality": {"stages": {"decoder": {"figures": {"kl": 0.5}}}}}
VERIFIED = {"stages": {"decoder": {"kl": 0.25}, "vision": {"relative_error": 0.1}}}
MEASURED = {"rows": [{"name": "decode", "unit": "tokens/s", "p50": 12.5}], "peak_memory_mb": 99.0}
OUTPUTS = {"export": EXPORTED, "verify": VERIFIED, "bench": MEASURED}


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.toml"
    path.write_text(SPEC)
    (tmp_path / "own.toml").write_text("# a recipe")
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Verbs that were run. In their place: output as theirs, and failures of ``broken`` ones."""
    said: list[list[str]] = []

    def run(verb: str, options: tuple[str, ...], folder: str) -> tuple[str, str]:
        said.append([verb, *options])
        if verb == "bench" and broken in options[0]:
            return "", "no room"
        if verb == "export":
            bundle = Path(options[2])
            bundle.mkdir(parents=True, exist_ok=True)
            (bundle / MANIFEST).touch()
        return json.dumps(OUTPUTS[verb]), ""

    broken = "a-own"
    monkeypatch.setattr(matrix, "_run_verb", run)
    return said


def test_each_checkpoint_is_exported_by_each_recipe_verified_and_measured(
    spec: Path, asked: list[list[str]]
) -> None:
    home = spec.parent
    rows = run_matrix(spec)
    assert [(row.checkpoint, row.recipe) for row in rows] == [
        ("nano", "fp32"), ("nano", "own.toml"), ("models/a", "fp32"), ("models/a", "own.toml"),
    ]  # fmt: skip
    bundle = str(home / "bundles/nano-fp32")
    assert asked[:3] == [
        ["export", "nano", "-o", bundle, "--recipe", "fp32", "--no-measure"],
        ["verify", bundle, "nano"],
        ["bench", bundle, "--runs", "2"],
    ]
    source, recipe = str(home / "models/a"), str(home / "own.toml")
    tower = ["--vision-tower", "tower"]
    assert asked[9][:2] == ["export", source] and asked[9][4:] == [
        "--recipe", recipe, *tower, "--no-measure",
    ]  # fmt: skip
    assert asked[10][2:] == [source, *tower]
    assert rows[0].megabytes == 2 and rows[0].error == ""
    assert rows[0].figures == {"decoder.kl": 0.25, "vision.relative_error": 0.1}
    assert (rows[3].failed, rows[3].error) == ("bench", "no room")
    table = table_lines(rows)
    assert table[2] == "| nano | fp32 |  | 2 | 0.25 | 0.1 |  | 12.5 | 99 |  |"
    assert table[5] == "| models/a | own.toml |  | 2 | 0.25 | 0.1 |  |  |  | bench: no room |"


def test_what_is_done_is_not_done_again_and_what_failed_is(
    spec: Path, asked: list[list[str]]
) -> None:
    first = run_matrix(spec)
    asked.clear()
    again = run_matrix(spec)
    assert [words[0] for words in asked] == ["export", "verify", "bench"]
    assert again[:3] == first[:3] and (first[3].attempt, again[3].attempt) == (0, 1)
    asked.clear()
    (spec.parent / "own.toml").write_text("# another recipe")
    (spec.parent / "bundles/nano-fp32" / MANIFEST).unlink()
    run_matrix(spec)
    exported = [Path(words[3]).name for words in asked if words[0] == "export"]
    assert exported == ["nano-fp32", "nano-own", "a-own"]


def test_steps_may_be_left_out_and_targets_settle_recipes() -> None:
    jobs = jobs_of(Matrix(("nano",), targets=("x86", "arm"), verify=None, bench=None), Path("/h"))
    assert [job.commands for job in jobs] == [
        (("export", ("nano", "-o", f"/h/bundles/nano-{name}", "--target", name)),)
        for name in ("x86", "arm")
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('checkpoints = ["nano"]', "recipes or targets"),
        ('recipes = ["int8"]', "checkpoints"),
        ('checkpoints = ["nano"]\nrecipes = ["int8"]\ntargets = ["rpi5"]', "leave recipes or"),
        ('checkpoints = ["nano"]\nrecipes = ["int8"]\ncolour = 3', "colour"),
        ('checkpoints = "nano"\nrecipes = ["int8"]', "checkpoints"),
        ('checkpoints = ["nano"]\nrecipes = ["int8", "int8"]', "two jobs would write"),
        ('checkpoints = ["nano"]\nrecipes = ["int8"]\norigins = {a = []}', "'a' is no checkpoint"),
        ("checkpoints = [", "spec.toml"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_one_line(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "spec.toml"
    path.write_text(text)
    assert told in refusal(capsys, "export-matrix", path)


def test_verify_false_leaves_it_out(spec: Path) -> None:
    spec.write_text(f"{SPEC}verify = false\n")
    assert read_matrix(spec).verify is None


def test_a_verbs_error_and_signal_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, error = matrix._run_verb(
        "export", ("nowhere", "-o", "x", "--recipe", "int8"), str(tmp_path)
    )
    assert output == "" and "nowhere" in error and "mobilevlm: error" not in error

    class Done:
        returncode, stdout, stderr = -9, "", ""

    monkeypatch.setattr("subprocess.run", lambda *words, **more: Done())
    assert matrix._run_verb("bench", ("x",), ".") == ("", "it was ended by signal 9")


def test_the_journal_is_of_one_run_at_a_time(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilevlm.runtime.journal.PATIENCE", 0.0)

    def run(job: Any) -> Any:
        run_matrix(spec)

    monkeypatch.setattr(matrix, "run_job", run)
    with pytest.raises(MobileVLMError, match="another process is writing this output"):
        run_matrix(spec)
