"""Language models without inputs beside text: checkpoints and GGUF files alone become bundles that
answer, and images are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, FLOAT32, refusal, relative_error, run_program
from language import write_gemma_text

import mobilevlm
from mobilevlm.bundle import Manifest, open_bundle
from mobilevlm.errors import PromptError
from mobilevlm.families import open_checkpoint
from mobilevlm.reference import load_reference
from mobilevlm.runtime import VLM

QUESTION = "What is unusual about this image?"
IMAGE = DATA / "gemma3" / "image.png"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language") / "gemma"
    write_gemma_text(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("fp32")
    mobilevlm.export(checkpoint, folder, recipe="fp32", formats=("onnx", "gguf"), gguf_type="f32")
    return folder


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with mobilevlm.load(bundle, engine="onnx") as opened:
        yield opened


def manifest_of(bundle: Path) -> Manifest:
    return open_bundle(bundle).manifest


def test_a_text_checkpoint_answers_as_the_reference_does(checkpoint: Path, vlm: VLM) -> None:
    model = open_checkpoint(checkpoint)
    assert model.spec.inputs == {} and model.spec.family == "language"
    prompt = vlm._prepare(QUESTION, (), raw=False)
    with torch.no_grad():
        reference = load_reference(model)
        state = reference.prompt(prompt.pieces, [])
        expected, answer = reference.logits(state).numpy(), reference.greedy(state, 24)
    assert relative_error(vlm.prompt_logits(QUESTION), expected) <= FLOAT32
    found = vlm.generate(QUESTION, max_new_tokens=24, ignore_eos=True)
    assert found.token_ids == answer and found.visual_tokens == 0
    assert vlm.prompt_ids(QUESTION) == prompt.pieces


def test_the_artifacts_are_those_of_a_decoder(bundle: Path) -> None:
    manifest = manifest_of(bundle)
    stages = {(part.stage, part.format) for part in manifest.artifacts}
    assert stages == {("embeddings", "onnx"), ("decoder", "onnx"), ("decoder", "gguf")}
    assert manifest.quality.measured
    assert manifest.quality.stages["decoder"].figures["kl"] < 1e-6
    assert manifest.quality.stages["decoder_gguf"].figures["kl"] < 1e-6


@pytest.mark.parametrize("engine", ["gguf", "ggml", "hybrid"])
def test_other_engines_give_the_same_tokens(bundle: Path, vlm: VLM, engine: str) -> None:
    expected = vlm.generate(QUESTION, max_new_tokens=24, ignore_eos=True).token_ids
    with mobilevlm.load(bundle, engine=engine) as other:
        assert other.generate(QUESTION, max_new_tokens=24, ignore_eos=True).token_ids == expected
        found = other.prompt_logits(QUESTION)
    # llama.cpp keeps keys and values in float16
    assert relative_error(found, vlm.prompt_logits(QUESTION)) <= (
        2e-5 if engine == "ggml" else 1e-3
    )


def test_a_gguf_file_alone_becomes_a_bundle(bundle: Path, vlm: VLM, tmp_path: Path) -> None:
    [name] = [part.path for part in manifest_of(bundle).artifacts if part.format == "gguf"]
    expected = vlm.prompt_logits(QUESTION)
    mobilevlm.export(bundle / name, tmp_path / "again", recipe="fp32", measure=False)
    with mobilevlm.load(tmp_path / "again") as again:
        assert again.spec.inputs == {}
        assert np.array_equal(again.prompt_logits(QUESTION), expected)


def test_images_are_refused_with_one_line(
    bundle: Path, vlm: VLM, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PromptError, match="gemma: this model takes no images: leave them out"):
        vlm.generate("<image>What is it?", [IMAGE])
    with pytest.raises(PromptError, match="takes no images"):
        parts = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What?"}]
        vlm.generate([{"role": "user", "content": parts}])  # type: ignore[typeddict-item]
    said = refusal(capsys, "run", bundle, "--image", IMAGE, "-p", "What is it?")
    assert "this model takes no images: leave them out" in said
    for raw in (False, True):
        with pytest.raises(PromptError, match="takes no images"):
            vlm.generate("What is <image>?", raw=raw)
    video = [{"role": "user", "content": [{"type": "video", "video": IMAGE}]}]
    with pytest.raises(PromptError, match="takes no images"):
        vlm.generate(video)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="takes no images"):
        vlm.prepare_video(IMAGE)
    mark = "What is <image>?"
    assert vlm.generate(mark, special_tokens=False, max_new_tokens=1).prompt_tokens > 0


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_recipes_are_measured_on_text(checkpoint: Path, tmp_path: Path, recipe: str) -> None:
    manifest = mobilevlm.export(
        checkpoint, tmp_path / "b", recipe=recipe, kv_cache="int8", limits={"decoder_kl": 0.6}
    )
    assert 0 < manifest.quality.stages["decoder"].figures["kl"] < 0.6
    assert "vision" not in manifest.quality.stages
    with mobilevlm.load(tmp_path / "b") as opened:
        assert opened.generate(QUESTION, max_new_tokens=4, ignore_eos=True).token_ids


def test_a_person_runs_and_inspects_it(bundle: Path) -> None:
    done = run_program("run", bundle, "-p", QUESTION, "--max-new-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    done = run_program("inspect", bundle)
    assert done.returncode == 0, done.stderr
    done = run_program("bench", bundle, "--runs", "1", "--text-tokens", "8", "--new-tokens", "4")
    assert done.returncode == 0, done.stderr
    done = run_program("verify", bundle)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_graphs_for_npus_are_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ("export", checkpoint, "-o", tmp_path / "b", "--format", "npu", "--recipe", "fp32")
    told = refusal(capsys, *said, "--no-measure", "--quiet")
    assert "no graphs for NPUs of language models without images yet" in told
