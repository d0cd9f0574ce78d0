"""Pairs of GGUF files whose images are tiles, as the source of an export: SmolVLM and InternVL."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Fixture, fixture_named
from pairs import Pair, internvl_pair, smolvlm_pair
from strings import seeded_strings

import mobilevlm
from mobilevlm.console.progress import ignore
from mobilevlm.export.gguf.decoder import write_decoder
from mobilevlm.export.gguf.mmproj import write_mmproj
from mobilevlm.export.gguf.source import open_gguf
from mobilevlm.runtime import VLM

NAMES = ("smolvlm2", "idefics3", "internvl3", "internvl35")
LIMIT = 1e-3
"""Largest error of logits. Measured: 2e-5."""
CONTEXT = 8192
"""Positions at most of a context from GGUF files."""


@pytest.fixture(scope="module", params=NAMES)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


@pytest.fixture(scope="module")
def pair(fixture: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The checkpoint as our own export writes it, in float32."""
    folder = tmp_path_factory.mktemp(fixture.name)
    decoder, mmproj = folder / "decoder.gguf", folder / "mmproj.gguf"
    write_decoder(fixture.model, "f32", decoder, ignore)
    write_mmproj(fixture.model, "f32", mmproj, ignore)
    return decoder, mmproj


def test_the_files_are_the_checkpoint_again(fixture: Fixture, pair: Pair) -> None:
    model, expected = open_gguf(*pair), fixture.model
    ours, theirs = expected.spec.image, model.spec.image
    length = min(expected.spec.decoder.context_length, CONTEXT)
    for found_part, expected_part in (
        (model.spec.decoder, dataclasses.replace(expected.spec.decoder, context_length=length)),
        (theirs.encoder, ours.encoder),
        (theirs.connector, ours.connector),
        (theirs.preparation, ours.preparation),
        (theirs.layout, ours.layout),
        (model.spec.conversation, expected.spec.conversation),
    ):
        found = dataclasses.asdict(found_part)
        for key, value in dataclasses.asdict(expected_part).items():
            rounded = isinstance(value, float) or key in ("mean", "std")  # float32 in the file
            assert found[key] == (pytest.approx(value, rel=1e-6) if rounded else value), key
    assert set(model.weights) == set(expected.weights)
    for name in expected.weights:
        ref = model.weights._refs[name]
        shape = ref.files.shape(ref.name)
        found_values, exact = (each.weights.read(name, shape) for each in (model, expected))
        np.testing.assert_array_equal(found_values, exact, name)
    for text in list(seeded_strings(4))[:300]:
        assert model.tokenizer.encode(text).ids == expected.tokenizer.encode(text).ids


def check_answers(vlm: VLM, fixture: Fixture) -> None:
    asked = fixture.prompt, fixture.images
    assert vlm.prompt_ids(*asked) == fixture.arrays["input_ids"][0].tolist()
    logits = vlm.prompt_logits(*asked)
    assert np.abs(logits - fixture.logits).max() < LIMIT
    assert (logits.argmax(-1) == fixture.logits.argmax(-1)).all()
    answer = vlm.generate(*asked, max_new_tokens=24, ignore_eos=True)
    assert answer.token_ids == fixture.generated_ids


def test_a_bundle_from_our_files_gives_the_official_logits_and_answer(
    fixture: Fixture, pair: Pair, tmp_path: Path
) -> None:
    decoder, mmproj = pair
    mobilevlm.export(decoder, tmp_path / "bundle", recipe="fp32", mmproj=mmproj, measure=False)
    with mobilevlm.load(tmp_path / "bundle", "onnx") as vlm:
        check_answers(vlm, fixture)


@pytest.fixture(params=["smolvlm2", "internvl35"])
def stock(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Fixture, Pair]]:
    """A checkpoint as llama.cpp's converter writes it: no whole tokenizer, layer scale apart, the
    class token's position first."""
    build = {"smolvlm2": smolvlm_pair, "internvl35": internvl_pair}[request.param]
    yield fixture_named(request.param), build(tmp_path)


def test_a_bundle_from_llama_cpps_files_gives_the_official_logits_and_answer(
    stock: tuple[Fixture, Pair], tmp_path: Path
) -> None:
    fixture, (decoder, mmproj) = stock
    mobilevlm.export(decoder, tmp_path / "bundle", recipe="fp32", mmproj=mmproj, measure=False)
    with mobilevlm.load(tmp_path / "bundle", "onnx") as vlm:
        check_answers(vlm, fixture)
