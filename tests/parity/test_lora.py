"""Merged adapters against PEFT's own merge (tests/data/llava_lora), and against a whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, Fixture, fixture_named, relative_error
from safetensors.numpy import load_file, save_file

from mobilevlm.checkpoint import TensorFiles
from mobilevlm.families import open_checkpoint
from mobilevlm.model import Model, OpenOptions
from mobilevlm.prompt import Run
from mobilevlm.reference import load_reference

ADAPTERS = DATA / "llava_lora"
PEFT = 1e-5
"""Error relative to the largest logit that two float32 merges may differ by. PEFT's merged and
unmerged logits differ by 2e-6; another scale (alpha / r for alpha / √r) makes 0.3."""


@pytest.fixture(scope="module")
def base() -> Fixture:
    return fixture_named("llava_v1")


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(ADAPTERS / "expected.npz") as stored:
        return dict(stored)


def merged(adapter: Path, base: Path) -> Model:
    return open_checkpoint(adapter, OpenOptions(fixture_named("llava_v1").tower, base=base))


def last_logits(model: Model, base: Fixture) -> np.ndarray:
    """Return those of the prompt's last positions, from the official tower's features."""
    reference = load_reference(model)
    features = torch.from_numpy(base.arrays["vision_features"])
    ids = base.arrays["input_ids"][0].tolist()
    with torch.no_grad():
        tokens = reference.projector(features)[0]
        pieces = [Run(len(tokens)) if token < 0 else token for token in ids]
        logits: np.ndarray = reference.logits(reference.embed(pieces, [tokens]))[-12:].numpy()
    return logits


def check(model: Model, base: Fixture, logits: np.ndarray) -> None:
    found = last_logits(model, base)
    assert np.abs(found - logits).max() <= PEFT * np.abs(logits).max()


@pytest.mark.parametrize("name", ["llava", "rslora", "modules_to_save", "lora_bias"])
def test_merged_logits_are_those_of_peft(
    name: str, base: Fixture, expected: dict[str, np.ndarray]
) -> None:
    check(merged(ADAPTERS / name, base.checkpoint), base, expected[name])


def test_a_language_model_without_projector_is_a_base_for_llavas_lora_folder(
    base: Fixture, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    language_model(base, tmp_path / "vicuna")
    check(merged(ADAPTERS / "llava", tmp_path / "vicuna"), base, expected["llava"])


def test_an_embedding_that_the_adapter_saved_too_is_the_one_that_is_changed(
    base: Fixture, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """As PEFT saves it with ``save_embedding_layers``; the base's own is then another."""
    folder = shutil.copytree(ADAPTERS / "modules_to_save", tmp_path / "adapter")
    other = shutil.copytree(base.checkpoint, tmp_path / "base")
    tensors, whole = load_file(folder / "adapter_model.safetensors"), load_file(weights(other))
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors[name] = whole["model.embed_tokens.weight"]
    save_file(tensors, folder / "adapter_model.safetensors")
    save_file(whole | {"model.embed_tokens.weight": -tensors[name]}, weights(other))
    check(merged(folder, other), base, expected["modules_to_save"])


def test_names_as_older_versions_of_peft_wrote_them(
    base: Fixture, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    folder = shutil.copytree(ADAPTERS / "modules_to_save", tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"

    def old(name: str) -> str:
        if "lora_" in name:
            return name.replace(".weight", ".default.weight")
        module, _, part = name.rpartition(".")
        return f"{module}.modules_to_save.default.{part}"

    save_file({old(name): value for name, value in load_file(path).items()}, path)
    check(merged(folder, base.checkpoint), base, expected["modules_to_save"])


def test_fan_in_fan_out_has_no_effect_on_a_linear_as_in_peft(
    base: Fixture, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    folder = shutil.copytree(ADAPTERS / "rslora", tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": True}))
    check(merged(folder, base.checkpoint), base, expected["rslora"])


def test_a_projector_alone_takes_the_rest_from_its_base(base: Fixture, tmp_path: Path) -> None:
    folder = language_model(base, tmp_path / "vicuna")
    adapter = tmp_path / "pretrain"
    adapter.mkdir()
    shutil.copy(base.checkpoint / "config.json", adapter)
    projector = {
        name: torch.from_numpy(value)
        for name, value in load_file(base.checkpoint / "model.safetensors").items()
        if "mm_projector" in name
    }
    torch.save(projector, adapter / "mm_projector.bin")
    found, whole = last_logits(merged(adapter, folder), base), last_logits(base.model, base)
    assert (found == whole).all()
    shutil.copy(adapter / "mm_projector.bin", folder)
    shutil.copy(base.checkpoint / "config.json", folder)
    assert (last_logits(merged(folder, folder), base) == whole).all()


def test_delta_weights_are_added_to_their_base(tmp_path: Path) -> None:
    """Also where the base has fewer tokens, as LLaVA's ``<im_start>`` adds some."""
    whole = fixture_named("llava_v1_im_start_end")
    files, random = TensorFiles(whole.checkpoint), np.random.default_rng(0)
    tensors = {name: np.array(files.read(name)) for name in files}
    parts = shutil.ignore_patterns("pytorch_model*")
    base = shutil.copytree(whole.checkpoint, tmp_path / "llama", ignore=parts)
    start = {
        name: value + 0.05 * random.standard_normal(value.shape, np.float32)
        for name, value in tensors.items()
        if "mm_projector" not in name
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        start[name] = start[name][:-3].copy()
    save_file(start, weights(base))
    delta = shutil.copytree(whole.checkpoint, tmp_path / "llava-delta", ignore=parts)
    for name, value in start.items():
        tensors[name][: len(value)] -= value
    save_file(tensors, weights(delta))
    options = OpenOptions(whole.tower, base=base)
    found = last_logits(open_checkpoint(delta, options), whole)
    assert relative_error(found, last_logits(whole.model, whole)) < 1e-5


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def language_model(base: Fixture, folder: Path) -> Path:
    """The fixture's language model alone, as a base of LLaVA is published."""
    shutil.copytree(base.checkpoint, folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    kept = {key: value for key, value in settings.items() if not key.startswith("mm_")}
    path.write_text(json.dumps({**kept, "model_type": "llama"}))
    tensors = load_file(weights(folder))
    save_file({k: v for k, v in tensors.items() if "mm_projector" not in k}, weights(folder))
    return folder
