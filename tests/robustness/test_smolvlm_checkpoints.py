"""SmolVLM checkpoints in every form that they come in, and those that contradict themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import message_of
from conftest import BundleOf, fixture_named, refusal
from PIL import Image
from safetensors.torch import load_file, save_file

from mobilevlm.families import open_checkpoint
from mobilevlm.input_spec import Tiles
from mobilevlm.model import Model, OpenOptions
from mobilevlm.reference import load_reference

FIXTURE = fixture_named("smolvlm2")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE.checkpoint, tmp_path / "copy"))


def change(path: Path, part: str = "", **changes: Any) -> None:
    """Set keys of a JSON file, or of one of its parts; ``None`` removes one."""
    data = json.loads(path.read_text("utf-8"))
    target = data[part] if part else data
    target.update(changes)
    for key in [key for key, value in target.items() if value is None]:
        del target[key]
    path.write_text(json.dumps(data), encoding="utf-8")


def assert_same(found: Model, expected: Model) -> None:
    assert found.spec.inputs == expected.spec.inputs
    assert found.spec.decoder == expected.spec.decoder
    ours, theirs = (load_reference(model).state_dict() for model in (found, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("form", ["renamed", "fp32", "bf16", "sharded"])
def test_other_names_types_and_shards_are_the_same_model(form: str, copy: Path) -> None:
    expected = FIXTURE.model
    tensors = load_file(copy / "model.safetensors")
    if form == "renamed":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    elif form == "sharded":
        (copy / "model.safetensors").unlink()
        shards = [f"model-{index:05}-of-00002.safetensors" for index in (1, 2)]
        places = {name: shards["vision" in name] for name in tensors}
        for shard in shards:
            save_file({n: tensors[n] for n in tensors if places[n] == shard}, copy / shard)
        index = {"weight_map": places}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    elif form == "bf16":  # fewer digits than the fixture's float16: compare with the same
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        exact = copy.parent / "exact"
        shutil.copytree(copy, exact)
        save_file({n: tensor.float() for n, tensor in tensors.items()}, exact / "model.safetensors")
        expected = open_checkpoint(exact)
    else:
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if form != "sharded":
        save_file(tensors, copy / "model.safetensors")
    assert_same(open_checkpoint(copy), expected)


def test_a_processor_inside_the_processor_s_file_is_read(copy: Path) -> None:
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    change(copy / "processor_config.json", image_processor=settings)
    assert open_checkpoint(copy).spec.inputs == FIXTURE.model.spec.inputs


def test_what_the_tower_s_configuration_leaves_out_is_the_official_default(copy: Path) -> None:
    keys = ("layer_norm_eps", "hidden_act", "num_channels")
    change(copy / "config.json", "vision_config", **dict.fromkeys(keys))
    assert open_checkpoint(copy).spec.inputs == FIXTURE.model.spec.inputs
    change(copy / "config.json", "vision_config", intermediate_size=None)
    assert open_checkpoint(copy).spec.image.transformer.intermediate_size == 3072


def test_splitting_that_is_off_in_the_checkpoint_is_off_here(copy: Path) -> None:
    change(copy / "preprocessor_config.json", do_image_splitting=False)
    preparation = open_checkpoint(copy).spec.image.preparation
    assert isinstance(preparation, Tiles) and preparation.max_tiles == 1


CONFIG: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("", {"scale_factor": 3}, ("a multiple of 'scale_factor': found 8 and 3",)),
    ("", {"scale_factor": 0}, ("'scale_factor' is 0", "positive")),
    ("", {"image_token_id": 9999}, ("'image_token_id' is 9999, which the tokenizer lacks",)),
    ("", {"image_token_id": None}, ("'image_token_id' is missing",)),
    ("vision_config", {"num_channels": 1}, ("'num_channels' is 1, expected 3",)),
    ("vision_config", {"num_attention_heads": 5}, ("'hidden_size' 48", "multiple")),
    ("vision_config", {"hidden_act": "relu"}, ("'hidden_act' is 'relu'",)),
    ("text_config", {"model_type": "mamba"}, ("model_type 'mamba'", "llama")),
    ("text_config", {"use_resampler": True}, ("'use_resampler' in 'text_config'", "supported")),
    ("text_config", {"qk_layer_norms": True}, ("'qk_layer_norms' in 'text_config'",)),
    ("text_config", {"hidden_act": "gelu"}, ("'hidden_act' is 'gelu'", "silu")),
]
PROCESSOR: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"size": {"longest_edge": 640}}, ("'size' is 640, which is more than 8 tiles of 64",)),
    ({"size": {"height": 64, "width": 64}}, ("'size'", "expected 'longest_edge'")),
    ({"max_image_size": {"longest_edge": 32}}, ("'max_image_size' is 32", "takes 64 pixels")),
    ({"resample": 3}, ("'resample' is 3, expected 1 (lanczos)",)),
    ({"do_resize": False}, ("'do_resize' is false, expected true",)),
    ({"do_normalize": False}, ("'do_normalize' is false, expected true",)),
    ({"do_image_splitting": "yes"}, ("'do_image_splitting' is 'yes', expected bool",)),
    ({"rescale_factor": 1.0}, ("'rescale_factor' is 1.0, expected 1 / 255",)),
    ({"image_std": [0.5, 0.5, 0.0]}, ("'image_std'", "three numbers")),
]


@pytest.mark.parametrize(("part", "changes", "told"), CONFIG, ids=lambda value: str(value)[:60])
def test_a_configuration_that_is_not_supported_is_one_line(
    part: str, changes: dict[str, Any], told: tuple[str, ...], copy: Path
) -> None:
    change(copy / "config.json", part, **changes)
    message_of(lambda: open_checkpoint(copy), str(copy / "config.json"), *told)


@pytest.mark.parametrize(("changes", "told"), PROCESSOR, ids=lambda value: str(value)[:60])
def test_an_image_processor_that_is_not_supported_is_one_line(
    changes: dict[str, Any], told: tuple[str, ...], copy: Path
) -> None:
    change(copy / "preprocessor_config.json", **changes)
    message_of(lambda: open_checkpoint(copy), str(copy / "preprocessor_config.json"), *told)


def without_token(folder: Path, text: str) -> None:
    """Take a token from the tokenizer's files."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    data["added_tokens"] = [one for one in data["added_tokens"] if one["content"] != text]
    path.write_text(json.dumps(data), encoding="utf-8")
    change(folder / "tokenizer_config.json", added_tokens_decoder=None)


FILES: list[tuple[str, Callable[[Path], object], tuple[str, ...]]] = [
    (
        "no image processor",
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        ("processor_config.json",),
    ),
    (
        "no chat template",
        lambda folder: (folder / "chat_template.json").unlink(),
        ("no chat template",),
    ),
    (
        "another number of tokens of a tile",
        lambda folder: change(folder / "processor_config.json", image_seq_len=64),
        ("'image_seq_len' is 64, but tower and connector make 4",),
    ),
    (
        "a token around images that the tokenizer lacks",
        lambda folder: without_token(folder, "<fake_token_around_image>"),
        ("lacks '<fake_token_around_image>'",),
    ),
]


@pytest.mark.parametrize(
    ("damage", "told"), [case[1:] for case in FILES], ids=[c[0] for c in FILES]
)
def test_a_checkpoint_with_files_missing_or_of_another_model_is_one_line(
    damage: Callable[[Path], object], told: tuple[str, ...], copy: Path
) -> None:
    damage(copy)
    message_of(lambda: open_checkpoint(copy), str(copy), *told)


def test_a_vision_tower_that_nobody_reads_is_refused(copy: Path) -> None:
    options = OpenOptions(fixture_named("llava_v1").tower)
    message_of(lambda: open_checkpoint(copy, options), str(copy), "leave --vision-tower out")


def test_a_tensor_that_nobody_reads_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.connector.perceiver.latents"] = torch.zeros(3)
    save_file(tensors, copy / "model.safetensors")
    message_of(lambda: open_checkpoint(copy), "model.connector.perceiver.latents")


def test_more_images_than_fit_are_refused_with_how_many_would(
    copy: Path, tmp_path: Path, bundle_of: BundleOf, capsys: pytest.CaptureFixture[str]
) -> None:
    """The context of 8192 holds about 70 square images of 17 tiles."""
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "black.png")
    images = ["--image", tmp_path / "black.png"] * 100
    bundle = bundle_of("smolvlm2", "fp32")
    message = refusal(capsys, "run", bundle, "--prompt", "Who?", *images)
    assert "8192" in message and "of the 100 images" in message
