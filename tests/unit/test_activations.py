"""Statistics of activations against those computed here, and what stays in memory."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QWEN_FIXTURES, Fixture, fixture_named
from numpy.typing import NDArray
from torch import nn

from mobilevlm.errors import MobileVLMError
from mobilevlm.export.calibration import decoder_layers, encoder_layers
from mobilevlm.export.calibration import statistics as watching
from mobilevlm.export.calibration.data import find_samples
from mobilevlm.export.calibration.decoder_layers import watch_decoder
from mobilevlm.export.calibration.encoder_layers import watch_encoder
from mobilevlm.export.calibration.samples import Sample, sample_pieces, scene_samples
from mobilevlm.export.calibration.statistics import Block
from mobilevlm.linear_groups import decoder_groups
from mobilevlm.preparation import prepare
from mobilevlm.reference import load_reference
from mobilevlm.runtime.engines.onnx import engine


def everything(name: str) -> bool:
    return True


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return scene_samples(3)


def inputs_of(fixture: Fixture, samples: list[Sample]) -> dict[str, list[NDArray[np.float32]]]:
    """Inputs of all linear layers, whole passes of the reference at a time."""
    found: dict[str, list[NDArray[np.float32]]] = {}
    model = fixture.model
    with torch.no_grad():
        reference = load_reference(model)
        for name, module in reference.named_modules():
            if isinstance(module, nn.Linear):
                found[name] = []
                module.register_forward_pre_hook(
                    lambda _, given, name=name: found[name].append(
                        given[0].reshape(-1, given[0].shape[-1]).numpy().copy()
                    )
                )
        for sample in samples:
            seen = [reference.see(prepare(item, model.spec.image)) for item in sample.images]
            reference.logits(reference.prompt(sample_pieces(model, sample), seen))
    return found


@pytest.mark.parametrize("fixture", ["mobilevlm_v2", *QWEN_FIXTURES])
@pytest.mark.parametrize("stage", ["vision", "decoder"])
def test_statistics_are_those_of_whole_passes(
    fixture: str, samples: list[Sample], stage: str
) -> None:
    watch = watch_encoder if stage == "vision" else watch_decoder
    found: Block = {}
    for block in watch(fixture_named(fixture).model, samples, everything, True):
        found |= block
    expected = inputs_of(fixture_named(fixture), samples)
    if fixture == "mobilevlm_v2":  # its pooling commutes with that layer, and comes before
        expected["projector.mlp.1"] = [
            rows.reshape(-1, 12, 2, 12, 2, rows.shape[-1]).mean((2, 4)).reshape(-1, rows.shape[-1])
            for rows in expected["projector.mlp.1"]
        ]
    names = [name for name in expected if (name.startswith("decoder")) == (stage == "decoder")]
    assert sorted(found) == sorted(names)
    for name, statistics in found.items():
        rows = np.concatenate(expected[name]).astype(np.float64)
        assert statistics.count == len(rows)
        assert np.allclose(statistics.maximum, np.abs(rows).max(axis=0), rtol=1e-4)
        assert np.allclose(statistics.mean_square, np.square(rows).mean(axis=0), rtol=1e-4)
        assert statistics.hessian is not None
        exact = rows.T @ rows / len(rows)
        assert np.linalg.norm(statistics.hessian - exact) <= 1e-4 * np.linalg.norm(exact)


def test_only_wanted_layers_are_watched_and_no_hessian_is_kept(
    mobilevlm_v2: Fixture, samples: list[Sample]
) -> None:
    blocks = list(
        watch_decoder(mobilevlm_v2.model, samples, lambda name: name.endswith("o_proj"), False)
    )
    layers = mobilevlm_v2.model.spec.decoder.num_hidden_layers
    assert [list(block) for block in blocks] == [
        [f"decoder.layers.{index}.attn.o_proj"] for index in range(layers)
    ]
    assert all(item.hessian is None for block in blocks for item in block.values())


def test_weights_of_a_layer_are_gone_when_the_next_is_at_work(
    mobilevlm_v2: Fixture, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[Any]] = []
    folders: list[Path] = []

    def open_session(path: Path, threads: int) -> Any:
        session = engine.open_session(path, threads)
        opened.append(weakref.ref(session))
        folders.append(path.parent)
        return session

    monkeypatch.setattr(decoder_layers, "open_session", open_session)
    blocks: Iterator[Block] = watch_decoder(mobilevlm_v2.model, samples, everything, False)
    for _ in blocks:
        assert not [session for session in opened if session() is not None]
        assert not any(folder.exists() for folder in folders)
    assert len(opened) == mobilevlm_v2.model.spec.decoder.num_hidden_layers


@pytest.mark.parametrize(
    "name", ["moe_llava_phi2", "moe_llava_qwen", "blip2", "fast_vlm", "gemma4"]
)
def test_statistics_of_other_decoders_are_those_of_the_reference(name: str) -> None:
    """Experts, biases, partial rotary, learned positions, heads of odd sizes."""
    fixture = fixture_named(name)
    samples = scene_samples(2)
    expected = inputs_of(fixture, samples)
    found: Block = {}
    for block in watch_decoder(fixture.model, samples, everything, True):
        found |= block
    decoder = fixture.model.spec.decoder
    names = {name for group in decoder_groups(decoder) for name in group.names}
    sparse = [index for index in range(decoder.num_hidden_layers) if decoder.num_experts(index)]
    assert set(found) == names | {f"decoder.layers.{index}.mlp.router" for index in sparse}
    for name, statistics in found.items():
        rows = np.concatenate(expected[name]).astype(np.float64)
        assert statistics.count == len(rows)
        if len(rows):
            assert statistics.hessian is not None
            exact = rows.T @ rows / len(rows)
            assert np.linalg.norm(statistics.hessian - exact) <= 1e-4 * np.linalg.norm(exact)
            assert np.allclose(statistics.maximum, np.abs(rows).max(axis=0), rtol=1e-4, atol=1e-5)


def test_the_number_of_positions_is_bounded(
    mobilevlm_v2: Fixture, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "MAX_POSITIONS", 200)
    block = next(watch_decoder(mobilevlm_v2.model, samples, everything, False))
    assert next(iter(block.values())).count == len(
        np.concatenate(inputs_of(mobilevlm_v2, samples[:1])["decoder.lm_head"])
    )
    monkeypatch.setattr(encoder_layers, "MOST_POSITIONS", {False: 1})
    block = next(watch_encoder(mobilevlm_v2.model, samples, everything, False))
    assert (
        next(iter(block.values())).count
        == mobilevlm_v2.model.spec.image.transformer.num_patches + 1
    )


def test_text_alone_says_nothing_about_the_tower(mobilevlm_v2: Fixture, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"prompt": "Hello"}))
    found = find_samples(str(path), mobilevlm_v2.model)
    with pytest.raises(MobileVLMError, match="no sample has an image or a sound"):
        next(watch_encoder(mobilevlm_v2.model, found, everything, False))
    assert next(watch_decoder(mobilevlm_v2.model, found, everything, False))
