"""``mobilevlm verify``, and the gate of ``export`` that measures by the same functions."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import BundleOf, Fixture, drawn_image, refusal, run_program

import mobilevlm
from mobilevlm.cli import main
from mobilevlm.export.calibration.samples import held_out_samples
from mobilevlm.synth.checkpoints import write_checkpoint

Capture = pytest.CaptureFixture[str]

PLANTED = """\
tower = "int8"
projector = "int8"
decoder = "q8"
lm_head = "q8"
embeddings = "fp16"
[layers]
"{layer}" = "q2"
[limits]
vision_relative_error = {vision}
decoder_kl = {kl}
"""
"""All in 8 bits, but for one layer at 2."""
FIGURES = {
    "vision": ["cosine", "cosine_mean", "relative_error", "features_cosine",
               "features_relative_error"],
    "decoder": ["kl", "kl_p99", "kl_max", "top1_agreement", "top5_agreement"],
    "end_to_end": ["greedy_match", "greedy_exact", "kl", "perplexity", "perplexity_ratio"],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three drawn scenes with answers and a question without image and answer: enough for every
    figure, in seconds."""
    folder = tmp_path_factory.mktemp("data")
    lines = [{"prompt": "What color is a ruby?"}]
    for index, sample in enumerate(held_out_samples("scenes")[:3]):
        drawn_image(sample).save(folder / f"{index}.png")
        lines.append({"image": f"{index}.png", "prompt": sample.prompt, "answer": sample.answer})
    path = folder / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def planted(folder: Path, layer: str, vision: float = 9, kl: float = 9) -> Path:
    path = folder / "planted.toml"
    path.write_text(PLANTED.format(layer=layer, vision=vision, kl=kl))
    return path


def exported_nano(folder: Path, recipe: Path) -> Path:
    bundle = folder / "bundle"
    mobilevlm.export("nano", bundle, recipe=str(recipe), measure=False)
    return bundle


def verified(capsys: Capture, *arguments: object, code: int = 0) -> dict[str, Any]:
    """Return the report of ``verify --json``, which must end with this exit code."""
    capsys.readouterr()  # of the export, if the bundle was made for this test
    try:
        main(["verify", *map(str, arguments), "--json", "--quiet"])
        ended = 0
    except SystemExit as stop:
        ended = int(stop.code or 0)
    printed = capsys.readouterr()
    assert ended == code, printed.err
    result: dict[str, Any] = json.loads(printed.out)
    assert [f"mobilevlm: error: {line}" for line in result["missed"]] == printed.err.splitlines()
    return result


@pytest.fixture(scope="module")
def nano(data: Path) -> dict[str, Any]:
    """Return the report of nano in int4."""
    done = run_program("verify", "nano", "nano", "--data", data, "--layers", "--json", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_trained_model_in_int4_is_within_the_limits_of_its_recipe(nano: dict[str, Any]) -> None:
    assert nano["passed"] and nano["missed"] == []
    assert {stage: list(figures) for stage, figures in nano["stages"].items()} == FIGURES
    # Measured 0.0018 on 32 scenes; a decoder that is broken has more than 1.
    assert 0 < nano["stages"]["decoder"]["kl"] < 0.02
    assert nano["stages"]["decoder"]["top1_agreement"] > 0.9
    # Measured 1.001 on 32 scenes.
    assert nano["stages"]["end_to_end"]["perplexity_ratio"] == pytest.approx(1, abs=0.05)


def test_the_keys_of_the_json_are_those_of_the_documentation(nano: dict[str, Any]) -> None:
    assert list(nano) == [
        "bundle", "model", "recipe", "engine", "data", "samples", "passed", "stages", "limits",
        "missed", "layers", "states", "suite",
    ]  # fmt: skip
    assert (nano["samples"], nano["data"], nano["suite"]) == (4, "samples.jsonl", None)
    assert set(nano["limits"][0]) == {"stage", "figure", "value", "limit", "sense", "passed"}
    assert set(nano["layers"][0]) == {"layer", "weight_error", "alone"}
    assert set(nano["layers"][0]["alone"]) == {"kl", "top1_agreement", "visual_error"}
    assert set(nano["states"][0]) == {"layer", "error"}
    documented = (Path(__file__).parents[2] / "docs" / "explanation" / "quality.md").read_text()
    assert [key for key in nano if f"`{key}`" not in documented] == []
    figures = {name for stage in nano["stages"].values() for name in stage}
    assert [
        name
        for name in figures
        if f"`{name}`" not in documented and not name.startswith("features_")
    ] == []


def test_errors_of_states_build_up_from_layer_to_layer(nano: dict[str, Any]) -> None:
    errors = {item["layer"]: item["error"] for item in nano["states"]}
    assert 0 < errors["vision.layers.0"] < errors["vision.layers.4"] < 0.1
    assert 0 < errors["decoder.layers.0"] < errors["decoder.layers.3"] < 0.5


def test_a_float32_bundle_is_the_reference(
    fixture: Fixture, bundle_of: BundleOf, data: Path, capsys: Capture
) -> None:
    bundle = bundle_of(fixture.name, "fp32")
    place = (bundle, fixture.checkpoint, "--vision-tower", fixture.tower, "--data", data)
    found = verified(capsys, *place)
    stages = found["stages"]
    assert stages["vision"]["relative_error"] < 1e-4
    assert stages["decoder"]["kl"] < 1e-6 and stages["decoder"]["top1_agreement"] == 1
    assert stages["end_to_end"]["greedy_exact"] == 1
    assert stages["end_to_end"]["perplexity_ratio"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("layer", "limits", "stage", "figure", "label"),
    [
        (
            "decoder.layers.3.attn.q_proj",
            {"kl": 1e-3},
            "decoder",
            "kl",
            "decoder.layers.3.attn.q_proj+k_proj+v_proj",
        ),
        ("projector.mlp.0", {"vision": 0.08}, "vision", "relative_error", "projector.mlp.0"),
    ],
)
def test_a_layer_planted_at_two_bits_is_named_with_stage_figure_and_limit(
    layer: str,
    limits: dict[str, float],
    stage: str,
    figure: str,
    label: str,
    data: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    recipe = planted(tmp_path, layer, **limits)
    bundle = exported_nano(tmp_path, recipe)
    found = verified(capsys, bundle, "nano", "--data", data, code=1)
    (line,) = found["missed"]
    assert line.startswith(f"quality of recipe 'planted': {stage} {figure} is ")
    (limit,) = limits.values()
    assert f"the limit is {limit:.4g}: {label} hurts most (alone " in line
    # The export itself refuses it by the same figures, and leaves no bundle.
    target = tmp_path / "refused"
    message = refusal(capsys, "export", "nano", "-o", target, "--recipe", recipe, "--quiet", code=1)
    assert f"{stage} {figure} is " in message and f"{label} hurts most" in message
    assert not target.exists()


def test_all_missed_limits_are_shown(data: Path, tmp_path: Path, capsys: Capture) -> None:
    bundle = exported_nano(tmp_path, planted(tmp_path, "decoder.lm_head", vision=1e-9, kl=1e-9))
    found = verified(capsys, bundle, "nano", "--data", data, code=1)
    assert len(found["missed"]) == 2
    assert "decoder.lm_head hurts most" in found["missed"][1]


def test_the_table_marks_a_missed_limit(data: Path, tmp_path: Path, capsys: Capture) -> None:
    bundle = exported_nano(tmp_path, planted(tmp_path, "decoder.lm_head", kl=1e-9))
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(bundle), "nano", "--data", str(data), "--quiet"])
    assert stop.value.code == 1
    printed = capsys.readouterr()
    (row,) = [line for line in printed.out.splitlines() if "missed" in line]
    assert re.search(r"decoder +kl +[\d.e-]+ +≤ 1e-09 +missed$", row)
    assert "decoder.lm_head" in printed.out


class _Resources(HTMLParser):
    """All that a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.images = 0
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                self.images += tag == "img"
                self.links.append((name, value or ""))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_report_holds_all_that_it_shows(data: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = planted(tmp_path, "decoder.layers.0.mlp.down_proj", kl=1e-9)
    bundle = exported_nano(tmp_path, recipe)
    html = tmp_path / "report.html"
    found = verified(capsys, bundle, "nano", "--data", data, "--html", html, code=1)
    page = html.read_text(encoding="utf-8")
    read = _Resources()
    read.feed(page)
    for name, link in read.links:
        if name == "href":
            assert link.startswith("#") or (html.parent / link).is_file()
        else:
            assert link.startswith("data:image/png;base64,"), name
    assert f"{bundle.name}/manifest.json" in {link for _, link in read.links}
    assert "url(" not in page and "@import" not in page
    assert read.images == 3, "each picture of the four samples"
    text = " ".join(" ".join(read.text).split())
    for fact in ("date", "machine", "checkpoint nano", "recipe", "engine onnx"):
        assert fact in text
    assert "limit missed" in text and "decoder.layers.0.mlp.down_proj" in text
    assert found["missed"][0] in text
    assert "What color is a ruby?" in text
    for layer in found["layers"]:
        assert f"{layer['layer']}: " in text, "in a plot"
    assert not list(tmp_path.glob("*.partial"))


def test_a_suite_compares_right_answers_with_the_reference(data: Path, capsys: Capture) -> None:
    asked = ("--suite", "scenes", "--questions", 12)
    found = verified(capsys, "nano", "nano", "--data", data, *asked)
    figures = found["stages"]["end_to_end"]
    loss = figures["reference_accuracy"] - figures["accuracy"]
    assert figures["accuracy_loss"] == pytest.approx(loss, abs=2e-4)
    # 12 questions: nano answers about 97 % of them.
    assert figures["reference_accuracy"] > 0.6
    assert found["suite"]["bundle"]["overall"]["asked"] == 12


def test_a_bundle_of_another_model_is_refused(
    mobilevlm_v2: Fixture, bundle_of: BundleOf, capsys: Capture
) -> None:
    bundle = bundle_of("mobilevlm_v2", "int8")
    message = refusal(capsys, "verify", bundle, "nano", "--quiet")
    assert "is not a bundle of" in message and "in the checkpoint" in message


def test_a_bundle_of_other_weights_is_refused(
    tiny_checkpoint: Path, bundle_of: BundleOf, tmp_path: Path, capsys: Capture
) -> None:
    other = tmp_path / "tiny"
    write_checkpoint("tiny", other, seed=1)
    message = refusal(capsys, "verify", bundle_of("tiny", "int4"), other, "--quiet")
    assert "the shapes agree, the weights of no layer do" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--data", "none.jsonl"), "none.jsonl: no such file"),
        (("--questions", "20"), "--questions goes with --suite"),
        (("--html", "no/such/folder/report.html"), "no such folder no/such/folder: make it first"),
        (("--engine", "gguf"), "engine gguf lacks the GGUF artifact"),
    ],
)
def test_wrong_options_end_with_one_line(
    arguments: tuple[str, ...], expected: str, bundle_of: BundleOf, tiny_checkpoint: Path,
    capsys: Capture,
) -> None:  # fmt: skip
    bundle = bundle_of("tiny", "int4")
    message = refusal(capsys, "verify", bundle, tiny_checkpoint, "--quiet", *arguments)
    assert expected in message


def test_a_damaged_bundle_is_refused(
    tiny_checkpoint: Path, bundle_of: BundleOf, tmp_path: Path, capsys: Capture
) -> None:
    bundle = Path(shutil.copytree(bundle_of("tiny", "int4"), tmp_path / "bundle"))
    path = bundle / "onnx" / "decoder_model_merged_q4.onnx_data"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert "sha256 mismatch" in refusal(capsys, "verify", bundle, tiny_checkpoint, "--quiet")
