"""Decoders whose heads are no multiple of 8 channels (OpenLLaMA 3B has 100), in every format.

Attention in ONNX Runtime takes multiples of 8; the graphs pad with zeros, which is exact.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fixture_named, prompt_pieces, relative_error
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.export.finish.system_prompt import PATH
from mobilevlm.export.quality.artifact_weights import artifact_weights
from mobilevlm.families import open_checkpoint
from mobilevlm.model import Model
from mobilevlm.plan import Plan
from mobilevlm.preparation import prepare
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.runtime import VLM
from mobilevlm.runtime.memory.estimate import estimate
from mobilevlm.spec import KVCache
from mobilevlm.synth.checkpoints import CONFIGURATIONS, Configuration, Tower, write_checkpoint

SIZES = {12: 4, 20: 2, 100: 2}
"""Heads of so many channels, and how many of them."""
QUESTION, NEXT = "What is in the image?", "What color is it, and where?"
IMAGE = Path(__file__).parents[1] / "data" / "mobilevlm_v2" / "image.png"
STORED = 0.05
"""Relative error of logits against those of the weights as they are stored: activations have 8
bits."""
INT8_CACHE = 0.044
"""As in test_kv_cache.py."""
HALF_CACHE = 5e-3
"""Engines of GGUF files keep keys and values in half precision."""


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Model]:
    """Random weights with heads of a size, each made once."""

    @cache
    def made(size: int) -> Model:
        heads = SIZES[size]
        names = ("mobilevlm", "MobileLlamaForCausalLM", "ldpnetv2")
        shape = Configuration(
            *names, 512, heads * size, 160, 2, heads, 512, 1e-6, Tower(64, 128, 3, 4),
            num_key_value_heads=heads // 2,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("heads") / "model"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(CONFIGURATIONS, "heads", shape)
            write_checkpoint("heads", folder)
        model = open_checkpoint(folder)
        assert model.spec.decoder.head_dim == size
        return model

    return made


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"heads of {size}")
def exact(
    request: pytest.FixtureRequest,
    model_of: Callable[[int], Model],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Model, Path]:
    """A model and its export in float32, for every engine that is installed."""
    model, folder = model_of(request.param), tmp_path_factory.mktemp("exact")
    formats = ("onnx", "gguf") if find_spec("llama_cpp") else ("onnx",)
    options = {"formats": formats, "gguf_type": "f32", "measure": False}
    return model, exported(model, folder, "fp32", **options)


def exported(model: Model, folder: Path, recipe: str, **options: Any) -> Path:
    mobilevlm.export(model.folder, folder / "bundle", recipe=recipe, **options)
    return folder / "bundle"


@torch.no_grad()
def reference_embeds(reference: ReferenceModel, vlm: VLM, text: str) -> torch.Tensor:
    """Return the reference's embeddings of the prompt that the bundle makes."""
    pixels = prepare(IMAGE, vlm.bundle.manifest.spec.image).arrays[0]["pixels"]
    prompt = vlm._prepare(text, [IMAGE], raw=False)
    return reference.embed(prompt.pieces, [reference.visual_tokens(pixels)])


@torch.no_grad()
def reference_logits(model: Model, vlm: VLM, text: str) -> NDArray[np.float32]:
    reference = load_reference(model)
    logits: NDArray[np.float32] = reference.logits(reference_embeds(reference, vlm, text)).numpy()
    return logits


def test_float_logits_and_tokens_are_the_references(exact: tuple[Model, Path]) -> None:
    model, folder = exact
    with mobilevlm.load(folder, engine="onnx") as vlm:
        for text in (QUESTION, NEXT):
            found = vlm.prompt_logits(text, [IMAGE])
            assert relative_error(found, reference_logits(model, vlm, text)) <= 1e-4
        answer = vlm.generate(QUESTION, [IMAGE], max_new_tokens=12, ignore_eos=True)
        reference = load_reference(model)
        embeds = reference_embeds(reference, vlm, QUESTION)
        with torch.no_grad():
            assert answer.token_ids == reference.greedy(embeds, 12)


@pytest.mark.parametrize("engine", ["gguf", "ggml"])
def test_gguf_logits_are_the_references(exact: tuple[Model, Path], engine: str) -> None:
    pytest.importorskip("llama_cpp")
    model, folder = exact
    with mobilevlm.load(folder, engine=engine) as vlm:
        found = vlm.prompt_logits(QUESTION, [IMAGE])
        assert relative_error(found, reference_logits(model, vlm, QUESTION)) <= HALF_CACHE


def test_t5_with_heads_of_12_gives_the_references_logits(tmp_path: Path) -> None:
    fixture = fixture_named("blip2_t5")
    folder = tmp_path / "checkpoint"
    shutil.copytree(fixture.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["d_kv"] = 12
    (folder / "config.json").write_text(json.dumps(config))
    random, width = np.random.default_rng(3), 12 * config["text_config"]["num_heads"]
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if re.search(r"(Self|EncDec)Attention\.[qkvo]\.weight", name):
            shape = (tensor.shape[0], width) if ".o." in name else (width, tensor.shape[1])
            tensors[name] = random.normal(0, 0.2, shape).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    model = open_checkpoint(folder)
    assert model.spec.decoder.head_dim == 12
    with mobilevlm.load(exported(model, tmp_path, "fp32", measure=False)) as vlm:
        found = vlm.prompt_logits(fixture.prompt, [fixture.image])
        reference = load_reference(model)
        pixels = prepare(fixture.image, model.spec.image).arrays[0]["pixels"]
        pieces = prompt_pieces(model, fixture.templated_prompt)
        with torch.no_grad():
            embeds = reference.embed(pieces, [reference.visual_tokens(pixels)])
            expected = reference.answer_logits(embeds, []).numpy()
            answer = reference.greedy(embeds, 12)
        assert relative_error(found, expected) <= 1e-4
        made = vlm.generate(fixture.prompt, [fixture.image], max_new_tokens=12, ignore_eos=True)
    assert made.token_ids == answer


@pytest.mark.parametrize(
    ("size", "recipe", "weights"),
    [(100, "int8", "int8"), (20, "int4", "int4"), (12, "fast", "int8")],
)
def test_quantized_logits_are_those_of_the_stored_weights(
    size: int, recipe: str, weights: str, model_of: Callable[[int], Model], tmp_path: Path
) -> None:
    """``weights``: the recipe of those that a prompt meets (``fast`` has them beside its own)."""
    model = model_of(size)
    folder = exported(model, tmp_path / "asked", recipe, measure=False)
    other = exported(model, tmp_path / "other", weights, measure=False)
    stored = replace(model, weights=artifact_weights(model, open_bundle(other), "onnx"))
    with mobilevlm.load(folder) as vlm:
        found = vlm.prompt_logits(QUESTION, [IMAGE])
        assert relative_error(found, reference_logits(stored, vlm, QUESTION)) <= STORED
        assert len(vlm.generate(NEXT, [IMAGE], max_new_tokens=4, ignore_eos=True).token_ids) == 4


def test_integer_keys_and_values_and_the_stored_system_prompt_fit(
    model_of: Callable[[int], Model], tmp_path: Path
) -> None:
    """Their sizes, and the memory that is estimated for them, are those of padded heads."""
    model, logits, states = model_of(20), {}, {}
    decoder = model.spec.decoder
    padded = -(-decoder.head_dim // 8) * 8
    kinds: tuple[KVCache, ...] = ("fp32", "int8")
    for kind in kinds:
        folder = exported(model, tmp_path / kind, "fp32", measure=False, kv_cache=kind)
        manifest = open_bundle(folder).manifest
        assert manifest.system_prompt is not None
        values = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * padded
        size = 4 if kind == "fp32" else 1
        assert manifest.files[PATH].size == len(manifest.system_prompt.ids) * values * size
        positions = model.spec.image.connector.num_tokens
        states[kind] = estimate(manifest, Plan("onnx"), positions).states
        assert states[kind] == pytest.approx(positions * values * size)
        with mobilevlm.load(folder) as vlm:
            logits[kind] = vlm.prompt_logits(QUESTION, [IMAGE])
    assert 1e-5 < relative_error(logits["int8"], logits["fp32"]) < INT8_CACHE
