"""SmolVLM's GGUF files in llama.cpp against the official arrays.

llama.cpp resizes in other numbers. So it is given our tiles, ready made, and told not to split
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import llama
import numpy as np
import pytest
from conftest import Fixture, fixture_named, relative_error

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.export.quality.artifact_weights import artifact_weights
from mobilevlm.runtime import VLM

LIMIT = 1e-2
"""Measured: 3e-4 of the visual tokens."""


@pytest.fixture(scope="module", params=["smolvlm2", "idefics3"])
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


@pytest.fixture(scope="module")
def bundle(fixture: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(fixture.name) / "bundle"
    mobilevlm.export(fixture.checkpoint, folder, recipe="fp32", formats=["gguf"], measure=False)
    return folder


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with mobilevlm.load(bundle, engine="gguf") as opened:
        yield opened


def test_llama_cpp_gives_the_official_visual_tokens_logits_and_answer(
    fixture: Fixture, vlm: VLM
) -> None:
    found = vlm.encode_image(fixture.image)
    expected = fixture.arrays["projector_output"].reshape(found.shape)
    assert relative_error(found, expected) < LIMIT
    logits = vlm.prompt_logits(fixture.prompt, fixture.images)
    assert relative_error(logits, fixture.logits) < LIMIT
    assert (logits.argmax(-1) == fixture.logits.argmax(-1)).all()
    answer = vlm.generate(fixture.prompt, fixture.images, max_new_tokens=24, ignore_eos=True)
    assert answer.token_ids == fixture.generated_ids


def test_the_tokenizer_in_the_file_gives_our_ids(fixture: Fixture, bundle: Path) -> None:
    files = {item.stage: bundle / item.path for item in open_bundle(bundle).manifest.artifacts}
    texts = (fixture.prompt, "It's 1234 o'clock,\n\n  WE'LL go!!", "\t12,5 % caf\u00e9")
    with llama.opened(files["decoder"]) as decoder:
        for text in texts:
            assert decoder.tokenize(text, False) == fixture.model.tokenizer.encode(text).ids


def test_tower_and_connector_are_read_back_as_they_were(fixture: Fixture, bundle: Path) -> None:
    model, vision = fixture.model, fixture.model.spec.image.transformer
    stored = artifact_weights(model, open_bundle(bundle), "gguf")
    connector = model.spec.image.connector
    shapes = {
        "vision.position_embedding.weight": (vision.num_positions, vision.hidden_size),
        "vision.post_norm.weight": (vision.hidden_size,),
        "projector.mlp.0.weight": (connector.out_size, connector.mlp_sizes[0]),
    }
    for name, shape in shapes.items():
        assert np.array_equal(stored.read(name, shape), model.weights.read(name, shape))
