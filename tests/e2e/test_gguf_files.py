"""``run model.gguf --mmproj FILE``: GGUF files without the bundle they were made in."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from adb_server import adb_server
from conftest import DATA, fixture_named, refusal, run_program

import mobilevlm
from mobilevlm.errors import MobileVLMError
from mobilevlm.gguf.file import read_gguf
from mobilevlm.gguf.model import model_spec

needs_llama = pytest.mark.skipif(
    os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1", reason="asked to go without llama.cpp"
)
CHECKPOINTS = ("mobilevlm_v2", "mobilevlm_v1", "llava_v15", "llava_v1")
TEXTS = ("hello world", "  two  spaces", "Äöü ▁ 漢字 🙂 \n\t x", "", "a<image>b")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GGUF bundles by checkpoint."""
    base = tmp_path_factory.mktemp("files")
    for name in CHECKPOINTS:
        mobilevlm.export(
            DATA / name / "checkpoint",
            base / name,
            recipe="fp32",
            vision_tower=DATA / name / "vision_tower",
            formats=("gguf",),
            measure=False,
        )
    return {name: base / name for name in CHECKPOINTS}


def files_of(bundle: Path) -> tuple[Path, Path]:
    """Language model and image encoder."""
    encoder = next((bundle / "gguf").glob("mmproj*.gguf"))
    return next(path for path in (bundle / "gguf").iterdir() if path != encoder), encoder


@needs_llama
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_files_alone_answer_like_their_bundle(name: str, bundles: dict[str, Path]) -> None:
    model, mmproj = files_of(bundles[name])
    # Square, since the files do not say whether a picture is padded or cropped.
    picture = np.random.default_rng(0).integers(0, 255, (50, 50, 3)).astype(np.uint8)
    expected = fixture_named(name)
    answers = []
    with (
        mobilevlm.load(model, mmproj=mmproj) as files,
        mobilevlm.load(bundles[name], "gguf") as bundle,
    ):
        prompt = expected.expected["user_prompt"]
        assert files.prompt_ids(prompt, 1) == expected.arrays["input_ids"][0].tolist()
        for text in TEXTS:
            ids = [vlm.tokenizer.encode(text).ids for vlm in (files, bundle)]
            assert ids[0] == ids[1]
        for vlm in (files, bundle):
            answer = vlm.generate(prompt, [picture], max_new_tokens=20, ignore_eos=True)
            answers.append(answer.token_ids)
    assert answers[0] == answers[1]


@needs_llama
def test_run_and_bench_take_the_files(bundles: dict[str, Path], tmp_path: Path) -> None:
    data = fixture_named("mobilevlm_v2")
    model, mmproj = files_of(bundles["mobilevlm_v2"])
    model = Path(shutil.copy(model, tmp_path / "model.gguf"))
    done = run_program(
        "run", model, "--mmproj", mmproj, "--image", data.image,
        "--prompt", data.expected["user_prompt"], "--max-new-tokens", "24",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == data.expected["decoded_text"] + "\n"
    done = run_program(
        "bench", model, "--mmproj", mmproj, "--runs", "1", "--new-tokens", "3", "--format", "md"
    )
    assert done.returncode == 0 and "engine gguf" in done.stdout, done.stderr


@needs_llama
def test_the_files_are_measured_on_a_device(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Both may have the same name."""
    model, mmproj = files_of(bundles["mobilevlm_v2"])
    for name, path in (("model", model), ("encoder", mmproj)):
        (tmp_path / name).mkdir()
        shutil.copy(path, tmp_path / name / "ggml.gguf")
    with adb_server(tmp_path, R58="device") as phone:
        done = run_program(
            "bench", tmp_path / "model" / "ggml.gguf", "--runs", "1", "--new-tokens", "3",
            "--mmproj", tmp_path / "encoder" / "ggml.gguf", "--device", "adb", "--format", "md",
            "--device-python", sys.executable, "--device-folder", tmp_path / "there",
            environment={"ADB_SERVER_SOCKET": f"tcp:127.0.0.1:{phone.port}"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "engine gguf" in done.stdout and "Measured on adb:R58: " in done.stdout


def test_wrong_combinations_are_refused(bundles: dict[str, Path], capsys: Capture) -> None:
    model, mmproj = files_of(bundles["llava_v1"])

    def said(*arguments: object) -> str:
        return refusal(capsys, "run", *arguments, "--prompt", "Who?")

    assert "give it with --mmproj FILE" in said(model)
    assert "a bundle has its encoder" in said(bundles["llava_v1"], "--mmproj", mmproj)
    assert "no such file" in said(model, "--mmproj", "nowhere.gguf")
    assert "no such file" in said("nowhere.gguf", "--mmproj", mmproj)
    assert "not an image encoder" in said(model, "--mmproj", model)
    assert "architecture 'clip', expected 'llama'" in said(mmproj, "--mmproj", mmproj)
    for engine in ("onnx", "hybrid"):
        assert "use --engine gguf" in said(model, "--mmproj", mmproj, "--engine", engine)


def test_a_projector_that_is_not_known_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    model, _ = files_of(bundles["llava_v1"])
    _, other = files_of(bundles["mobilevlm_v2"])
    data = bytearray(other.read_bytes())
    assert data.count(b"ldpv2") == 1
    wrong = tmp_path / "mmproj-wrong.gguf"
    wrong.write_bytes(data.replace(b"ldpv2", b"ldpvX"))
    with pytest.raises(MobileVLMError, match="unknown projector type: ldpvX"):
        mobilevlm.load(model, mmproj=wrong)


def test_the_context_is_bounded(bundles: dict[str, Path]) -> None:
    model, mmproj = (read_gguf(path) for path in files_of(bundles["mobilevlm_v2"]))
    for stated, taken in ((100, 100), (131_072, 4096)):
        changed = {**model.metadata, "llama.context_length": stated}
        spec = model_spec(dataclasses.replace(model, metadata=changed), mmproj)
        assert spec.decoder.context_length == taken
