"""LLaVA-NeXT's GGUF files in llama.cpp against the official arrays, and LLaVA-OneVision's decoder.

llama.cpp puts no newlines between rows of tiles and does not leave padding out. So tiles are made
and put together here, and it encodes them one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Fixture, fixture_named, relative_error

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.conversation import user_message
from mobilevlm.errors import BundleError
from mobilevlm.export.quality.artifact_weights import artifact_weights
from mobilevlm.messages import Message
from mobilevlm.runtime import VLM

LIMIT = 1e-2
"""Measured: 6e-4 of the visual tokens and 4e-4 of the logits."""
NEAR = 0.01
"""Logits of a position nearer than this are a tie: llama.cpp's are up to 0.006 off."""


def said(fixture: Fixture) -> list[Message]:
    system: list[Message] = [{"role": "system", "content": fixture.system}]
    asked = user_message(fixture.prompt, len(fixture.images))
    return [*system, asked] if fixture.system else [asked]


@pytest.fixture(scope="module")
def next_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, fixture = tmp_path_factory.mktemp("next") / "bundle", fixture_named("llava_next")
    mobilevlm.export(fixture.checkpoint, folder, recipe="fp32", formats=["gguf"], measure=False)
    return folder


@pytest.fixture(scope="module")
def vlm(next_bundle: Path) -> Iterator[VLM]:
    with mobilevlm.load(next_bundle, engine="gguf") as opened:
        yield opened


def test_llama_cpp_gives_the_official_visual_tokens_logits_and_answer(vlm: VLM) -> None:
    fixture = fixture_named("llava_next")
    found = vlm.encode_image(fixture.image)
    assert relative_error(found, fixture.arrays["projector_output"]) < LIMIT
    logits = vlm.prompt_logits(said(fixture), fixture.images)
    assert relative_error(logits, fixture.logits) < LIMIT
    second, first = np.sort(fixture.logits, axis=-1)[:, -2:].T
    clear = first - second > NEAR
    assert (logits.argmax(-1) == fixture.logits.argmax(-1))[clear].all() and clear.mean() > 0.95
    answer = vlm.generate(said(fixture), fixture.images, max_new_tokens=24, ignore_eos=True)
    assert answer.token_ids == fixture.generated_ids


def test_the_newline_is_in_the_file(next_bundle: Path) -> None:
    model, bundle = fixture_named("llava_next").model, open_bundle(next_bundle)
    stored = artifact_weights(model, bundle, "gguf")
    shape = (model.spec.decoder.hidden_size,)
    found = stored.read("projector.newline", shape)
    assert (found == model.weights.read("projector.newline", shape)).all()


def test_a_file_without_the_newline_is_refused(next_bundle: Path, tmp_path: Path) -> None:
    from mobilevlm.gguf.file import read_gguf
    from mobilevlm.runtime.engines.llama.gguf_check import check_mmproj

    bundle = open_bundle(next_bundle)
    (artifact,) = [part for part in bundle.manifest.artifacts if part.stage == "vision"]
    content = bundle.path(artifact.path).read_bytes()
    damaged = tmp_path / "mmproj.gguf"
    damaged.write_bytes(content.replace(b"v.image_newline", b"v.image_newlinf"))
    with pytest.raises(BundleError, match="image_newline"):
        check_mmproj(read_gguf(damaged), bundle.manifest.spec)


@pytest.mark.parametrize("name", ["llava_onevision", "llava_onevision_multi"])
def test_onevision_has_its_decoder_as_gguf_and_sees_by_onnx(name: str, tmp_path: Path) -> None:
    fixture = fixture_named(name)
    formats = ["onnx", "gguf"]
    bundle = tmp_path / "bundle"
    mobilevlm.export(fixture.checkpoint, bundle, recipe="fp32", formats=formats, measure=False)
    with mobilevlm.load(bundle, engine="hybrid") as vlm:
        logits = vlm.prompt_logits(said(fixture), fixture.images)
        assert relative_error(logits, fixture.logits) < LIMIT
        answer = vlm.generate(said(fixture), fixture.images, max_new_tokens=24, ignore_eos=True)
    assert answer.token_ids == fixture.generated_ids
