"""Remedies in errors: done as the line says, they work."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refusal

import mobilevlm
from mobilevlm.cli import main
from mobilevlm.errors import MobileVLMError
from mobilevlm.runtime.machine import EXTRAS

LLAMA = [] if os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1" else ["gguf", "hybrid", "ggml"]
Capture = pytest.CaptureFixture[str]
BASE_LACKS = [module for extra in EXTRAS.values() for module in extra] + ["google"]
"""Packages that an install without extras has not."""
WITHOUT = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from mobilevlm.cli import main
main(sys.argv[2:])
"""
"""Runs the program as if packages were not installed."""


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano") / "bundle"
    mobilevlm.export("nano", folder, recipe="int4", measure=False)
    return folder


@pytest.mark.parametrize("engine", ["npu", "ort", *LLAMA])
def test_the_export_that_an_engine_asks_for_makes_its_artifacts(
    engine: str, nano: Path, tmp_path: Path, capsys: Capture
) -> None:
    bundle = shutil.copytree(nano, tmp_path / "bundle")
    line = refusal(capsys, "run", bundle, "--engine", engine, "--prompt", "Who?")
    [command] = re.findall(r"run 'mobilevlm (.*)'", line)
    main([*shlex.split(command.replace("CHECKPOINT", "nano")), "--no-measure"])
    capsys.readouterr()
    main(["run", str(bundle), "--engine", engine, "--prompt", "Who?", "--max-new-tokens", "2"])
    assert capsys.readouterr().out


def test_a_limit_on_experts_is_left_out_where_there_are_none(nano: Path, capsys: Capture) -> None:
    line = refusal(capsys, "run", nano, "--max-resident", "8MB", "--prompt", "Who?")
    assert "no experts: leave it out" in line


def test_bits_of_weights_are_not_asked_for_beside_a_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    bundle = tmp_path / "bundle"
    monkeypatch.setattr("mobilevlm.runtime.engines.opening.int8_weight_bits", lambda: 7)
    mobilevlm.export("nano", bundle, target="rpi5", measure=False)
    with pytest.warns(match="without --target rpi5, with --weight-bits 7"):
        mobilevlm.load(bundle).close()


def test_the_tower_that_is_missing_is_found_where_the_line_says(
    tmp_path: Path, capsys: Capture
) -> None:
    data = Path(__file__).parents[1] / "data" / "llava_v1"
    checkpoint = shutil.copytree(data / "checkpoint", tmp_path / "checkpoint")
    export = ["export", checkpoint, "-o", tmp_path / "bundle", "--no-measure"]
    line = refusal(capsys, *export)
    [name] = re.findall(r"put its folder beside the checkpoint as '(.*?)'", line)
    shutil.copytree(data / "vision_tower", tmp_path / name)
    main(list(map(str, export)))
    with pytest.raises(MobileVLMError, match="not known"):
        mobilevlm.load(tmp_path / "bundle", engine="none")


@pytest.mark.parametrize(
    "command",
    [
        "verify nano nano",
        "search nano -o {0}/x.toml --budget 4bpw",
        "imatrix nano -o {0}/x.gguf",
        "inspect nano",
        "inspect nano-moe --experts",
        "export nano -o {0}/x",
        "export nano -o {0}/x --target ios-coreml",
        "export x.gguf --mmproj y.gguf -o {0}/x",
        "synth tiny -o {0}/x",
        "run {1} --video {1}/manifest.json --prompt Who?",
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(
    command: str, nano: Path, tmp_path: Path
) -> None:
    words = command.format(tmp_path, nano).split()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(BASE_LACKS), *words],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("mobilevlm: error: ") and done.stderr.count("\n") == 1
    assert "pip install 'mobilevlm-edge[" in done.stderr or "x.gguf" in done.stderr
