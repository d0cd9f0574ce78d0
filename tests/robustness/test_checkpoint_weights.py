"""Weights of a checkpoint: every tensor is read or known to have no effect, the right tower counts,
and files that are not what they seem are named with the remedy."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Copy, copy_of, message_of
from conftest import Fixture, fixture_named
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from mobilevlm import export, shards
from mobilevlm.console import progress
from mobilevlm.errors import FileWarning
from mobilevlm.families import open_checkpoint
from mobilevlm.model import OpenOptions

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476925163\n"
LAYER = "model.layers.0.self_attn"


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """A safetensors checkpoint (llava_v1) and its tower."""
    return copy_of(fixture_named("llava_v1"), tmp_path)


@pytest.fixture
def pickled(tmp_path: Path) -> Copy:
    """A checkpoint of two .bin shards with an index (llava_v15) and its tower."""
    return copy_of(fixture_named("llava_v15"), tmp_path)


def add(copy: Copy, *names: str, path: Path | None = None) -> None:
    tensors = {name: np.ones((4, 4), np.float16) for name in names}
    copy.change_tensors(path or copy.weights, lambda stored: stored.update(tensors))


# Tensors that nobody reads


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.q_proj.bias",
        "model.layers.4.mlp.up_proj.weight",
        "model.mm_projector.2.weight",
        "model.vision_resampler.query",
        "model.image_newline",
        "lm_head.bias",
        "another",
    ],
)
def test_a_tensor_that_nothing_reads_is_named(name: str, copy: Copy) -> None:
    add(copy, name)
    message_of(copy.open, str(copy.checkpoint), "nothing reads 1 ", repr(name), "config.json")


def test_more_layers_than_the_configuration_says_are_counted(copy: Copy) -> None:
    copy.change(copy.config, num_hidden_layers=3)
    message_of(copy.open, "nothing reads 9 of its tensors", "'model.layers.3.")


def test_lora_tensors_beside_the_weights_are_to_be_merged(copy: Copy) -> None:
    add(copy, f"{LAYER}.q_proj.lora_A.weight", f"{LAYER}.q_proj.lora_B.weight")
    message_of(copy.open, "nothing reads 2", "lora_A", "merge it first")


def test_a_deeper_projector_is_named(pickled: Copy) -> None:
    path = pickled.checkpoint / "pytorch_model-00002-of-00002.bin"
    tensors = torch.load(path, weights_only=True)
    tensors["model.mm_projector.4.weight"] = torch.zeros(2, 2)
    torch.save(tensors, path)
    message_of(pickled.open, "nothing reads 1", "'model.mm_projector.4.weight'")


def test_more_layers_of_the_tower_than_its_configuration_says_are_named(copy: Copy) -> None:
    name = "vision_model.encoder.layers.3.mlp.fc1.weight"
    add(copy, name, path=copy.tower / "model.safetensors")
    message_of(copy.open, str(copy.tower), "nothing reads 1", repr(name))


def test_tensors_without_effect_are_skipped(copy: Copy) -> None:
    """Tables that are computed; the layer of the tower behind the one whose features are used is
    in the fixture."""
    add(copy, f"{LAYER}.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    copy.read_everything()


def test_a_copy_of_embeddings_that_are_the_head_too_is_skipped(copy: Copy) -> None:
    copy.change(copy.config, tie_word_embeddings=True)
    assert "decoder.lm_head.weight" in copy.open().weights


@pytest.mark.parametrize("name", ["vila", "blip2", "instructblip", "blip2_t5"])
def test_other_families_name_what_they_do_not_read(name: str, tmp_path: Path) -> None:
    fixture = fixture_named(name)
    folder = tmp_path / "checkpoint"
    shutil.copytree(fixture.checkpoint, folder)
    path = folder / "llm" / "model.safetensors" if name == "vila" else folder / "model.safetensors"
    if not path.is_file():
        [path] = path.parent.glob("*.safetensors")
    tensors = load_file(path)
    tensors["something.else"] = np.zeros(3, np.float32)
    save_file(tensors, path)
    message_of(lambda: open_checkpoint(folder), "nothing reads 1", "'something.else'")


# Which tower


def embed_tower(copy: Copy, factor: float) -> None:
    """Put the tower into the checkpoint, its tensors multiplied."""
    tower = load_file(copy.tower / "model.safetensors")
    prefix = "model.vision_tower.vision_tower."
    own = {prefix + name: (value * factor).astype(np.float32) for name, value in tower.items()}
    copy.change_tensors(copy.weights, lambda tensors: tensors.update(own))


def scale_of_tower(copy: Copy) -> float:
    """Return the scale of the tower that is read relative to the folder's."""
    stored = load_file(copy.tower / "model.safetensors")["vision_model.embeddings.class_embedding"]
    found = copy.open().weights.read("vision.class_embedding", stored.shape)
    return float(np.linalg.norm(found) / np.linalg.norm(stored.astype(np.float32)))


@pytest.mark.parametrize(
    "setting",
    [
        {"unfreeze_mm_vision_tower": True},
        {"tune_vision_tower": True},
        {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_trained_tower_counts_before_the_folder(setting: dict[str, Any], copy: Copy) -> None:
    embed_tower(copy, 1.3)
    copy.change(copy.config, **setting)
    assert scale_of_tower(copy) == pytest.approx(1.3, rel=1e-3)
    [key] = setting
    [said] = copy.open().weights.notes
    assert f"weights in {copy.checkpoint}" in said and key in said


def test_an_untrained_copy_of_the_tower_is_not_read_and_that_is_said(copy: Copy) -> None:
    embed_tower(copy, 1.3)
    copy.change(copy.config, unfreeze_mm_vision_tower=False, mm_tunable_parts="mm_mlp_adapter")
    assert scale_of_tower(copy) == pytest.approx(1.0, rel=1e-3)
    [said] = copy.open().weights.notes
    assert f"weights in {copy.tower}" in said and "not read" in said


def test_a_trained_tower_that_the_checkpoint_lacks_is_a_warning(copy: Copy) -> None:
    copy.change(copy.config, unfreeze_mm_vision_tower=True)
    with pytest.warns(FileWarning, match="must be the trained one"):
        copy.open()


def test_a_trained_tower_is_read_to_its_last_tensor(copy: Copy) -> None:
    embed_tower(copy, 1.0)
    name = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.lora_A"
    add(copy, name)
    copy.change(copy.config, unfreeze_mm_vision_tower=True)
    message_of(copy.open, "nothing reads 1", "lora_A")


@pytest.mark.parametrize(
    ("kind", "named"), [("siglip_vision_model", "VILA"), ("dinov2", "clip_vision_model")]
)
def test_a_tower_of_another_kind_is_named(kind: str, named: str, copy: Copy) -> None:
    copy.change(copy.tower / "config.json", model_type=kind)
    message_of(copy.open, str(copy.tower), repr(kind), "not supported", named)


def test_a_tower_in_the_layout_of_openclip_is_named(copy: Copy) -> None:
    (copy.tower / "config.json").rename(copy.tower / "open_clip_config.json")
    message_of(copy.open, str(copy.tower), "OpenCLIP", "not supported")


@pytest.mark.parametrize("name", ["google/siglip-so400m-patch14-384", "hf-hub:apple/DFN5B-CLIP"])
def test_a_name_of_another_tower_is_not_asked_for_as_a_folder(name: str, copy: Copy) -> None:
    copy.change(copy.config, mm_vision_tower=name)
    message_of(lambda: open_checkpoint(copy.checkpoint), repr(name), "not supported")


def test_an_export_says_which_tower_it_read(
    copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress.enable()
    try:
        export(copy.checkpoint, tmp_path / "bundle", vision_tower=copy.tower, measure=False)
    finally:
        progress.enable(False)
    assert f"tower       weights in {copy.tower}\n" in capsys.readouterr().err


# Files that are not what they seem


@pytest.mark.parametrize(
    "kind",
    ["model.safetensors", "config.json", "tokenizer.model", "tokenizer.json", "qwen.tiktoken"],
)
def test_a_git_lfs_pointer_is_named(kind: str, copy: Copy) -> None:
    if kind in ("tokenizer.json", "qwen.tiktoken"):
        (copy.checkpoint / "tokenizer.model").unlink()
    (copy.checkpoint / kind).write_bytes(POINTER)
    message_of(copy.open, str(copy.checkpoint / kind), "Git LFS", "git lfs pull")


def test_a_git_lfs_pointer_in_place_of_a_pickle_is_named(pickled: Copy) -> None:
    path = pickled.checkpoint / "pytorch_model-00001-of-00002.bin"
    path.write_bytes(POINTER)
    message_of(pickled.open, str(path), "git lfs pull")


def test_a_stale_index_beside_a_whole_file_is_passed_over_with_a_word(copy: Copy) -> None:
    index = copy.checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.x"}}))
    with pytest.warns(FileWarning, match=r"model\.safetensors is there as a whole"):
        copy.read_everything()


def test_a_stale_index_of_safetensors_gives_way_to_pickles(pickled: Copy) -> None:
    index = pickled.checkpoint / "model.safetensors.index.json"
    shards = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    index.write_text(json.dumps(shards))
    with pytest.warns(FileWarning, match="none of its shards"):
        pickled.read_everything()


def test_a_shard_without_its_index_names_the_index(copy: Copy) -> None:
    shard = "model-00001-of-00002.safetensors"
    copy.weights.rename(copy.checkpoint / shard)
    message_of(copy.open, "model.safetensors.index.json", "missing", shard)


@pytest.mark.parametrize("place", ["", ".cache/huggingface/download"])
def test_an_unfinished_download_is_named(place: str, copy: Copy) -> None:
    copy.weights.unlink()
    (copy.checkpoint / place).mkdir(parents=True, exist_ok=True)
    (copy.checkpoint / place / "4d7a.incomplete").write_bytes(b"")
    message_of(copy.open, "4d7a.incomplete", "download that has not ended")


def test_a_safetensors_file_that_was_cut_says_how_much_is_there(copy: Copy) -> None:
    content = copy.weights.read_bytes()
    copy.weights.write_bytes(content[:-1000])
    sizes = f"{len(content) - 1000} of {len(content)} bytes"
    message_of(copy.open, str(copy.weights), sizes, "download it again")


def test_a_folder_in_place_of_a_weight_file(copy: Copy) -> None:
    copy.weights.unlink()
    copy.weights.mkdir()
    message_of(copy.open, str(copy.checkpoint), "no weights")


# Files from strangers: nothing is allocated that the bytes do not fill


def test_a_compressed_archive_is_refused_before_it_is_unpacked(pickled: Copy) -> None:
    path = pickled.checkpoint / "pytorch_model-00001-of-00002.bin"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    message_of(pickled.open, str(path), "compressed")


def test_a_huge_member_beside_the_storages_is_refused_before_it_is_read(pickled: Copy) -> None:
    path = pickled.checkpoint / "pytorch_model-00001-of-00002.bin"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/.data/serialization_id", bytes(1 << 27))
    message_of(pickled.open, str(path), "serialization_id", "134217728 bytes")


def test_a_tensor_that_repeats_one_number_is_refused(pickled: Copy) -> None:
    path = pickled.checkpoint / "pytorch_model-00001-of-00002.bin"
    torch.save({"lm_head.weight": torch.zeros(1).expand(2**40)}, path)
    message_of(pickled.open, str(path), "larger than the file")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 2**40),
        ("max_position_embeddings", 2**40),
        ("vocab_size", 2**30),
        ("hidden_size", 2**30),
        ("mm_projector_type", "mlp999999x_gelu"),
        ("mm_projector_type", f"mlp{'9' * 5000}x_gelu"),
        ("moe", {"moe_mode": [], "num_experts": [4]}),
        ("num_attention_heads", 10**300),
        ("rms_norm_eps", 10**400),
        ("rope_theta", float("nan")),
        ("rope_theta", -1.0),
        ("rope_theta", float("inf")),
        ("rope_theta", "10000"),
        ("head_dim", 31),
        ("mm_vision_tower", "a" * 5000),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_numbers_that_the_weights_do_not_fill_are_one_line(
    key: str, value: Any, copy: Copy
) -> None:
    copy.change(copy.config, **{key: value})
    tower = None if key == "mm_vision_tower" else copy.tower
    message_of(lambda: open_checkpoint(copy.checkpoint, OpenOptions(tower)), str(copy.checkpoint))


# Words of config.json


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {},
        {"rope_type": "default"},
        {"type": "default"},
        {"rope_type": "default", "rope_theta": 10000.0},
        {"type": None},
        {"rope_type": None, "factor": None},
    ],
    ids=repr,
)
def test_default_and_null_mean_no_scaling(scaling: Any, copy: Copy) -> None:
    expected = copy.open().spec.decoder
    config = json.loads(copy.config.read_text())
    copy.config.write_text(json.dumps({**config, "rope_scaling": scaling}))
    assert copy.open().spec.decoder == expected


def test_rope_parameters_of_transformers_5_are_read(copy: Copy) -> None:
    joined = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    copy.change(copy.config, rope_parameters=joined)
    decoder = copy.open().spec.decoder
    assert (decoder.rope_scaling, decoder.rope_theta, decoder.context_length) == (2, 5000, 4096)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default"},
        },
    ],
    ids=repr,
)
def test_rotary_settings_that_contradict_each_other_are_refused(
    changes: dict[str, Any], copy: Copy
) -> None:
    copy.change(copy.config, **changes)
    message_of(copy.open, str(copy.config), next(iter(changes)), "transformers 5")


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "llama3", "longrope", "su", "ntk"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_a_type_of_scaling_that_is_not_supported_is_named_with_those_that_are(
    kind: str, key: str, copy: Copy
) -> None:
    copy.change(copy.config, rope_scaling={key: kind, "factor": 8.0})
    message_of(copy.open, str(copy.config), "'rope_scaling'", repr(kind), "'linear'", "'default'")


@pytest.mark.parametrize(
    "scaling", [{"factor": 2.0}, {"type": "linear", "factor": "2"}, {"type": "linear", "factor": 0},
                {"rope_type": "default", "mrope_section": [1, 2, 3]}], ids=repr
)  # fmt: skip
def test_a_scaling_that_is_not_understood_is_refused(scaling: Any, copy: Copy) -> None:
    copy.change(copy.config, rope_scaling=scaling)
    message_of(copy.open, str(copy.config), "'rope_scaling'")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes 4 bits"),
        ({"load_in_8bit": True}, "bitsandbytes 8 bits"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_algo": "FP8"}, "FP8"),
        ("anything", "quantization_config"),
    ],
    ids=repr,
)
def test_weights_that_another_tool_quantized_are_named(
    settings: Any, named: str, copy: Copy
) -> None:
    copy.change(copy.config, quantization_config=settings)
    message_of(copy.open, str(copy.config), named, "before quantization")


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_settings_of_a_quantizer_beside_the_configuration_are_named(name: str, copy: Copy) -> None:
    (copy.checkpoint / name).write_text(json.dumps({"bits": 4, "group_size": 128}))
    message_of(copy.open, str(copy.checkpoint / name), "before quantization")


def test_the_size_of_heads_is_read(copy: Copy) -> None:
    """It may differ from the quotient of hidden size and heads; the weights decide whether it is
    right."""
    copy.change(copy.config, head_dim=32)
    copy.read_everything()
    copy.change(copy.config, head_dim=16)
    message_of(copy.read_everything, "q_proj", "[64, 64]", "[32, 64]")


def test_the_untouched_fixtures_open_without_a_word(any_fixture: Fixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint(any_fixture.checkpoint, any_fixture.options)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_that_is_converted_in_pieces_is_the_stored_one(
    kind: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_PIECE", 50)
    torch.manual_seed(0)
    tensors = {
        "matrix": torch.randn(21, 13).to(kind),
        "kernel": torch.randn(7, 3, 5, 5).to(kind),
        "vector": torch.randn(120).to(kind),
        "number": torch.tensor(2.5).to(kind),
        "empty": torch.empty(0, 4).to(kind),
    }
    save_torch(tensors, tmp_path / "model.safetensors")
    shard = shards.open_shard(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        found = shard.read(name)
        assert found.dtype == np.float32 and found.shape == tuple(tensor.shape)
        assert np.array_equal(found, tensor.float().numpy())
