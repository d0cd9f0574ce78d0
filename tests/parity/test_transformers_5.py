"""Configurations of the hub's families as transformers 5 writes them: ``rope_parameters`` in place
of ``rope_theta`` and ``rope_scaling``, ``dtype`` in place of ``torch_dtype``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FLOAT32, HUB_FIXTURES, fixture_named, relative_error

from mobilevlm.conversation import official_ids, tokenize
from mobilevlm.families import open_checkpoint
from mobilevlm.preparation import prepare
from mobilevlm.prompt import expand
from mobilevlm.reference import load_reference

WHOLE = [name for name in HUB_FIXTURES if not fixture_named(name).suffix]
"""Fixtures of whole checkpoints, each once."""
USUAL_BASE = 10000.0
"""Rotary base of a file that names none."""
GEMMA_BASE = 1e6
"""The same of Gemma's layers that see the whole text."""


def of_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the newer keys."""
    if "text_config" not in config:  # Qwen2.5-VL's older files
        outer = {key: config.pop(key) for key in ("architectures", "model_type", "vision_config")}
        shared = {key: config[key] for key in config if key.endswith("_token_id")}
        config = {**outer, **shared, "text_config": {**config, "model_type": "qwen2_5_vl_text"}}
    text = config["text_config"]
    scaling = text.pop("rope_scaling", None) or {"rope_type": "default"}
    if scaling.pop("type", None):
        scaling["rope_type"] = "default"
    rope = {**scaling, "rope_theta": text.pop("rope_theta", USUAL_BASE)}
    if config["model_type"] == "gemma3":
        rope["rope_theta"] = GEMMA_BASE
        sliding = {"rope_type": "default", "rope_theta": text.pop("rope_local_base_freq", 10000.0)}
        rope = {"full_attention": rope, "sliding_attention": sliding}
    text.setdefault("rope_parameters", rope)  # newer models have no other files
    parts = (config, text, config["vision_config"])
    for part in parts:
        if "torch_dtype" in part:
            part["dtype"] = part.pop("torch_dtype")
    assert any("dtype" in part for part in parts)
    return config


@pytest.mark.parametrize("name", WHOLE)
def test_newer_keys_are_the_same_model_with_the_official_ids_and_logits(
    name: str, tmp_path: Path
) -> None:
    fixture = fixture_named(name)
    folder = Path(shutil.copytree(fixture.checkpoint, tmp_path / fixture.checkpoint.name))
    path = folder / "config.json"
    path.write_text(json.dumps(of_transformers_5(json.loads(path.read_text()))))
    model = open_checkpoint(folder, fixture.options)
    assert model.spec == fixture.model.spec
    image, conversation = model.spec.image, model.spec.conversation
    shown = [prepare(source, image, images=len(fixture.images)) for source in fixture.images]
    tokens = tokenize(model.tokenizer, fixture.templated_prompt, conversation)
    ids = official_ids(tokens, image.layout, [one.pieces for one in shown])
    assert ids == fixture.arrays["input_ids"][0].tolist()
    reference = load_reference(model)
    with torch.no_grad():
        seen = [reference.see(one) for one in shown]
        prompt = reference.prompt(expand(tokens, [one.pieces for one in shown]), seen)
        logits = reference.logits(prompt).numpy()
    assert relative_error(logits, fixture.logits) <= FLOAT32


@pytest.mark.parametrize("name", ["smolvlm2", "internvl35", "llava_onevision", "fast_vlm"])
def test_the_rotary_base_is_read_from_the_newer_place(name: str, tmp_path: Path) -> None:
    fixture = fixture_named(name)
    folder = Path(shutil.copytree(fixture.checkpoint, tmp_path / name))
    path = folder / "config.json"
    config = of_transformers_5(json.loads(path.read_text()))
    config["text_config"]["rope_parameters"] |= {"rope_theta": 5e5}
    path.write_text(json.dumps(config))
    assert open_checkpoint(folder, fixture.options).spec.decoder.rope_theta == 5e5
