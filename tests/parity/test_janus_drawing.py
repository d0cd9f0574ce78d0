"""Images that Janus draws against the arrays of the official class: prompts, codes with and without
guidance, logits of the head, and pixels, of the torch reference and of a float32 bundle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA, BundleOf, Fixture, fixture_named, refusal
from numpy.typing import NDArray
from PIL import Image

import mobilevlm
from mobilevlm.bundle import read_manifest
from mobilevlm.bundle_checks import check_manifest
from mobilevlm.cli import main
from mobilevlm.errors import (
    BundleError,
    MemoryLimitError,
    MobileVLMError,
    PromptError,
    TargetError,
)
from mobilevlm.export.quality.drawing import measure_drawing
from mobilevlm.export.targets import find_target
from mobilevlm.export.targets.obstacles import check_drawing, obstacle
from mobilevlm.export.verification.verify import verify
from mobilevlm.plan import Plan, memory_settings
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.runtime import VLM
from mobilevlm.runtime.answer.drawing import unconditional
from mobilevlm.runtime.bench.bench import run_bench
from mobilevlm.runtime.memory.estimate import drawing_bytes, estimate

EXACT = 1e-4
PROMPT = "A small red house near a river, with a road sign."


@pytest.fixture(scope="module")
def janus() -> Fixture:
    return fixture_named("janus")


@pytest.fixture(scope="module")
def arrays(janus: Fixture) -> dict[str, NDArray[Any]]:
    return janus.arrays


@pytest.fixture(scope="module")
def reference(janus: Fixture) -> ReferenceModel:
    return load_reference(janus.model)


@pytest.fixture(scope="module")
def folder(bundle_of: BundleOf) -> Path:
    return bundle_of("janus", "fp32")


@pytest.fixture(scope="module")
def artist(folder: Path) -> Iterator[VLM]:
    with mobilevlm.load(folder) as vlm:
        yield vlm


@torch.no_grad()
def test_codes_and_head_logits_of_the_reference_are_the_official_ones(
    reference: ReferenceModel, arrays: dict[str, NDArray[Any]]
) -> None:
    pair = torch.from_numpy(
        np.concatenate([arrays["gen_input_ids"], arrays["gen_uncond_input_ids"]])
    )
    codes, logits = reference.draw_greedily(pair, 5.0)
    assert codes == arrays["gen_image_ids"].tolist()
    assert np.abs(logits.numpy() - arrays["gen_head_logits"]).max() <= EXACT
    codes, logits = reference.draw_greedily(pair[:1], 1.0)
    assert codes == arrays["gen_noguide_image_ids"].tolist()
    assert np.abs(logits.numpy()[:, 0] - arrays["gen_noguide_head_logits"]).max() <= EXACT


@torch.no_grad()
def test_rows_vectors_and_pixels_of_codes_are_the_official_ones(
    reference: ReferenceModel, arrays: dict[str, NDArray[Any]]
) -> None:
    codes = torch.from_numpy(arrays["gen_image_ids"])[None]
    assert np.abs(reference.codes(codes).numpy() - arrays["gen_token_embeds"]).max() <= EXACT
    vectors = reference.image_decoder.vectors(codes).numpy()
    assert np.abs(vectors - arrays["gen_codebook_vectors"]).max() <= 1e-6
    values = reference.image_decoder(codes)[0].numpy()
    assert np.abs(values - arrays["gen_decoded"]).max() <= EXACT


def test_the_prompt_and_the_unconditional_one_have_the_official_ids(
    artist: VLM, arrays: dict[str, NDArray[Any]]
) -> None:
    ids = artist.drawing_ids(PROMPT)
    assert ids == arrays["gen_input_ids"][0].tolist()
    empty = unconditional(ids, artist.spec.drawing)
    assert empty == arrays["gen_uncond_input_ids"][0].tolist()


@pytest.mark.parametrize("name, scale", [("gen", 5.0), ("gen_noguide", 1.0)])
def test_an_fp32_bundle_draws_the_official_image(
    artist: VLM, arrays: dict[str, NDArray[Any]], name: str, scale: float
) -> None:
    [drawn] = artist.drawn(PROMPT, guidance=scale, temperature=0)
    assert drawn.codes == arrays[f"{name}_image_ids"].tolist()
    assert np.abs(drawn.values - arrays[f"{name}_decoded"]).max() <= EXACT
    assert (np.asarray(drawn.image) == arrays[f"{name}_pixels"]).all()
    stored = {"gen": "generated.png", "gen_noguide": "generated_noguide.png"}[name]
    with Image.open(DATA / "janus" / stored) as official:
        assert drawn.image.tobytes() == official.convert("RGB").tobytes()


def test_a_seed_draws_the_same_image_alone_and_among_others(artist: VLM) -> None:
    seen: list[tuple[int, int]] = []
    first, second = artist.draw(PROMPT, n=2, seed=5, on_progress=lambda *told: seen.append(told))
    [again] = artist.draw(PROMPT, seed=6)
    assert again.tobytes() == second.tobytes() != first.tobytes()
    assert seen == [(count, 32) for count in range(1, 33)]


def test_what_on_progress_raises_ends_the_drawing_and_the_model_goes_on(artist: VLM) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artist.draw(PROMPT, on_progress=stop)
    assert artist.draw(PROMPT, seed=1)[0].size == (16, 16)
    assert artist.generate("What is it?", [DATA / "janus" / "image.png"], max_new_tokens=2).text


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"n": 0}, "n is 0, expected 1 to 64 images"),
        ({"guidance": -1}, "guidance is -1, expected a number of 0 or more"),
        ({"temperature": -1}, "temperature is -1, expected 0 or more"),
        ({"seed": -1}, "seed is -1, expected 0 to"),
    ],
)
def test_values_outside_their_range_are_refused(
    artist: VLM, wrong: dict[str, Any], told: str
) -> None:
    with pytest.raises(MobileVLMError, match=told):
        artist.draw(PROMPT, **wrong)


def test_a_prompt_without_words_or_without_room_for_an_image_is_refused(artist: VLM) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        artist.draw(" ")
    with pytest.raises(PromptError, match="and an image 16, the context holds 16384: shorten it"):
        artist.draw("house " * 16_380)


def test_the_program_draws_files_and_tells_what_it_cannot(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bundle_of: BundleOf
) -> None:
    to, other = tmp_path / "house.png", bundle_of("tiny", "fp32")
    said = ["draw", str(folder), "-p", PROMPT, "-o", str(to), "--temperature", "0"]
    main([*said, "--guidance", "5", "--json"])
    assert json.loads(capsys.readouterr().out)["files"] == [str(to)]
    assert Image.open(to).tobytes() == Image.open(DATA / "janus" / "generated.png").tobytes()
    main([*said, "--n", "2"])
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "house-1.png"),
        str(tmp_path / "house-2.png"),
    ]
    ask = ("draw", folder, "-p", PROMPT, "-o")
    assert "images are PNG files" in refusal(capsys, *ask, tmp_path / "house.jpg")
    assert "no such folder" in refusal(capsys, *ask, tmp_path / "none" / "house.png")
    assert "this model cannot draw" in refusal(capsys, "draw", other, "-p", PROMPT, "-o", to)


def test_numbers_of_the_output_that_contradict_the_files_are_refused(folder: Path) -> None:
    manifest, _ = read_manifest(folder)
    output = manifest.spec.drawing
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_codes": 1 << 30}, "the number of weights that outputs needs"),
        ({"grid": 1 << 20}, "output.grid"),
        ({"decoder": dataclasses.replace(output.decoder, widths=(64,) * 40)}, "output.widths"),
        ({"empty_id": 1 << 20}, "ids of the vocabulary"),
    ]
    for changed, told in cases:
        outputs = {"image": dataclasses.replace(output, **changed)}
        spec = dataclasses.replace(manifest.spec, outputs=outputs)
        with pytest.raises(BundleError, match=told):
            check_manifest(dataclasses.replace(manifest, spec=spec), folder)


def test_verify_measures_the_stages_that_draw(folder: Path, janus: Fixture) -> None:
    stages = verify(folder, janus.checkpoint).stages
    assert stages["image_head"].figures["kl"] <= 1e-6
    assert stages["image_head"].figures["top1_agreement"] == 1
    for name in ("code_embeddings", "image_decoder"):
        assert stages[name].figures["relative_error"] <= 1e-4


def test_a_quantized_bundle_draws_with_a_rotated_decoder(
    bundle_of: BundleOf, reference: ReferenceModel
) -> None:
    with mobilevlm.load(bundle_of("janus", "int8")) as vlm:
        assert vlm.bundle.manifest.recipe.is_rotated
        stages = measure_drawing(fixture_named("janus").model, reference, vlm)
        assert vlm.draw(PROMPT, seed=1)[0].size == (16, 16)
    # Random weights are harder to round than trained ones.
    assert stages["image_head"].figures["kl"] < 0.1
    assert stages["code_embeddings"].figures["relative_error"] < 0.05
    assert stages["image_decoder"].figures["relative_error"] < 2e-3


def test_bench_and_inspect_tell_of_drawing(
    folder: Path, artist: VLM, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {row.name for row in run_bench(artist, None, new_tokens=2, runs=1, codes=3).rows}
    assert {"next code", "codes", "image decoder"} <= rows
    main(["inspect", str(folder)])
    assert "drawing takes" in capsys.readouterr().out


def test_drawing_counts_toward_the_memory_limit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit for drawing by the leanest plan, then one for answers only."""
    manifest, _ = read_manifest(folder)
    answers = {
        setting: estimate(manifest, Plan("onnx", memory=setting)).peak
        for setting in memory_settings("onnx")
    }
    drawing = drawing_bytes(manifest) / 1e6
    alone = drawing_bytes(manifest, sequences=1) / 1e6
    assert drawing > alone > 1
    lean = min(answers.values()) / 1e6
    with mobilevlm.load(folder, max_memory_mb=lean + drawing + 0.01) as vlm:
        assert vlm.plan.memory == "in turn"  # the first that leaves room for drawing
        [drawn] = vlm.drawn(PROMPT, guidance=5, temperature=0)
        assert drawn.codes == fixture_named("janus").arrays["gen_image_ids"].tolist()
    limit = answers["fast"] / 1e6 + 0.01
    assert limit < lean + alone
    with mobilevlm.load(folder, max_memory_mb=limit) as vlm:
        assert vlm.plan.memory == "fast"
        assert vlm.generate("What is it?", max_new_tokens=2).text
        told = (
            rf"drawing takes \d+ MB of memory, the limit is {limit:.0f} MB \(--max-memory\): raise"
        )
        with pytest.raises(MemoryLimitError, match=told):
            vlm.draw(PROMPT)
        assert vlm._drawing is None
    said = ("draw", folder, "-p", PROMPT, "-o", tmp_path / "a.png", "--max-memory", f"{limit}MB")
    assert "draw with guidance 1, or export" in refusal(capsys, *said)


@pytest.mark.parametrize("name", ["ios-coreml", "android-xnnpack"])
def test_targets_of_accelerators_refuse_a_model_that_draws(janus: Fixture, name: str) -> None:
    with pytest.raises(TargetError, match="draws images, and the stages that do are not made for"):
        check_drawing(find_target(name), janus.model.spec)
    check_drawing(find_target("cpu-arm64"), janus.model.spec)


def test_other_runtimes_and_pages_have_no_place_for_a_model_that_draws(janus: Fixture) -> None:
    assert obstacle(janus.model.spec) == "images that it draws"


def test_an_int4_bundle_goes_through_verify_and_draws(
    bundle_of: BundleOf, janus: Fixture, artist: VLM
) -> None:
    folder = bundle_of("janus", "int4")
    report = verify(folder, janus.checkpoint)
    stages = report.stages
    assert {"vision", "decoder", "image_head", "code_embeddings", "image_decoder"} <= set(stages)
    # 4 bits of random weights: the next code is near, the pixels of given codes are the same.
    assert stages["image_head"].figures["kl"] < 1
    assert stages["code_embeddings"].figures["relative_error"] < 0.2
    assert stages["image_decoder"].figures["relative_error"] < 2e-3
    with mobilevlm.load(folder) as vlm:
        assert vlm.bundle.manifest.recipe.decoder.precision == "q4"
        assert vlm.draw(PROMPT, seed=1)[0].size == artist.draw(PROMPT, seed=1)[0].size
