"""GGUF files of families whose images are tiles (SmolVLM, InternVL) in llama.cpp against the
official arrays.

llama.cpp makes tiles of its own: of several grids of one shape it takes the largest, and it
resizes in other numbers. So it is given tiles here, which it takes as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama
import numpy as np
import pytest
from conftest import Fixture, fixture_named, relative_error

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.export.gguf.support import obstacle
from mobilevlm.export.quality.artifact_weights import artifact_weights
from mobilevlm.preparation import prepare
from mobilevlm.runtime import VLM
from mobilevlm.spec import with_image

LIMIT = 1e-2
"""Measured: 6e-4 of the visual tokens and 8e-4 of the logits."""


@pytest.fixture(scope="module", params=["smolvlm2", "idefics3", "internvl3", "internvl35"])
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


@pytest.mark.parametrize("fixture", ["internvl3", "internvl35"], indirect=True)
def test_mtmd_alone_gives_the_official_visual_tokens_of_a_tile(
    fixture: Fixture, bundle: Path
) -> None:
    files = {item.stage: bundle / item.path for item in open_bundle(bundle).manifest.artifacts}
    tiles = prepare(fixture.image, fixture.model.spec.image).arrays
    with llama.opened(files["decoder"]) as decoder:
        for index in (0, len(tiles) - 1):
            found = decoder.encode_image(files["vision"], np.array(tiles[index]["pixels"]))
            assert relative_error(found, fixture.arrays["projector_output"][index]) < LIMIT


def test_the_tokenizer_in_the_file_gives_our_ids(fixture: Fixture, bundle: Path) -> None:
    files = {item.stage: bundle / item.path for item in open_bundle(bundle).manifest.artifacts}
    texts = (fixture.prompt, "It's 1234 o'clock,\n\n  WE'LL go!!", "\t12,5 % caf\u00e9")
    with llama.opened(files["decoder"]) as decoder:
        for text in texts:
            assert decoder.tokenize(text, False) == fixture.model.tokenizer.encode(text).ids


def test_tensors_are_read_back_as_they_were(fixture: Fixture, bundle: Path) -> None:
    """Positions, whose order llama.cpp wants otherwise, and layers with layer scale folded in."""
    model, vision = fixture.model, fixture.model.spec.image.transformer
    stored = artifact_weights(model, open_bundle(bundle), "gguf")
    connector = model.spec.image.connector
    shapes = {
        "vision.position_embedding.weight": (vision.num_positions, vision.hidden_size),
        "vision.layers.0.attn.out_proj.weight": (vision.hidden_size, vision.hidden_size),
        "vision.layers.0.mlp.fc2.bias": (vision.hidden_size,),
        "projector.mlp.0.weight": (connector.out_size, connector.mlp_sizes[0]),
    }
    if vision.post_norm:
        shapes["vision.post_norm.weight"] = (vision.hidden_size,)
    if connector.norm:
        shapes["projector.norm.weight"] = (connector.mlp_sizes[0],)
    for name, shape in shapes.items():
        assert np.array_equal(stored.read(name, shape), model.weights.read(name, shape)), name


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("preparation", {"min_tiles": 5, "max_tiles": 5}, "takes images of one tile"),
        ("preparation", {"thumbnail": False}, "always has the image made small"),
        ("encoder", {"intermediate_size": 32}, "tells the tower's two MLP layers apart"),
        ("encoder", {"hidden_act": "quick_gelu"}, "is InternViT, this is another"),
        ("connector", {"order": "columns"}, "joins patches row by row"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_not_written(
    part: str, changes: dict[str, Any], reason: str
) -> None:
    spec = fixture_named("internvl35").model.spec
    changed = with_image(spec, **{part: replace(getattr(spec.image, part), **changes)})
    assert reason in obstacle(changed)
    assert not obstacle(spec)
