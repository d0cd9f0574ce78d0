"""InternVL's checkpoints in every form that they come in hold the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BundleOf, fixture_named, relative_error
from internvl import as_original, read_json
from safetensors.torch import load_file, save_file

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.conversation import render, tokenize, user_message
from mobilevlm.export.quality.artifact_weights import artifact_weights
from mobilevlm.families import open_checkpoint
from mobilevlm.linear_groups import tower_groups
from mobilevlm.messages import Message
from mobilevlm.model import Model
from mobilevlm.preparation import prepare
from mobilevlm.prompt import Mark, expand
from mobilevlm.reference import load_reference
from mobilevlm.tokenizers.tokenizer import read_tokenizer


def assert_same(found: Model, expected: Model) -> None:
    assert found.spec.inputs == expected.spec.inputs
    assert found.spec.decoder == expected.spec.decoder
    ours, theirs = (load_reference(model).state_dict() for model in (found, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(params=["internvl3", "internvl35"])
def model(request: pytest.FixtureRequest) -> Model:
    return fixture_named(request.param).model


def test_the_original_layout_is_the_same_model(model: Model, tmp_path: Path) -> None:
    found = open_checkpoint(as_original(model.folder, tmp_path / "original"))
    assert_same(found, model)
    assert found.spec.family == "internvl_chat"


def test_the_original_conversation_begins_with_its_system_message(tmp_path: Path) -> None:
    model = fixture_named("internvl3").model
    found = open_checkpoint(as_original(model.folder, tmp_path / "original"))
    text = render(found.spec.conversation, [user_message("What is written on the sign?", 1)])
    system, user, answer = text.split("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\n你是书生·万象，英文名是InternVL，")
    assert user == "<|im_start|>user\n<IMG_CONTEXT>\nWhat is written on the sign?"
    assert answer == "<|im_start|>assistant\n"
    placed = render(found.spec.conversation, [user_message("A <image> and <image>?", 2)])
    assert "user\nA <IMG_CONTEXT> and <IMG_CONTEXT>?<|im_end|>" in placed
    tokens = tokenize(found.tokenizer, placed, found.spec.conversation)
    assert tokens.count(Mark()) == 2
    own: list[Message] = [{"role": "system", "content": "Be brief."}, user_message("Why?", 0)]
    begun = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?"
    assert render(found.spec.conversation, own).startswith(begun)


def test_version_one_of_the_pixel_shuffle_gives_tokens_column_by_column(tmp_path: Path) -> None:
    folder = as_original(fixture_named("internvl3").checkpoint, tmp_path / "original")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "ps_version": "v1"}))
    assert open_checkpoint(folder).spec.image.connector.order == "columns"


def test_vocab_and_merges_split_text_as_the_whole_tokenizer_does(
    model: Model, tmp_path: Path
) -> None:
    folder = shutil.copytree(model.folder, tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    found = read_tokenizer(folder, ready=True)
    for text in ("It's 1234 o'clock,\n\n  WE'LL go!!", "a cafe\u0301 <img> x\r\n", "\t12,5 %"):
        assert found.encode(text).ids == model.tokenizer.encode(text).ids


@pytest.mark.parametrize("form", ["renamed", "fp16", "fp32", "sharded"])
def test_other_names_types_and_shards_are_the_same_model(form: str, tmp_path: Path) -> None:
    model = fixture_named("internvl35").model
    folder = shutil.copytree(model.folder, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    if form == "renamed":
        renamed = {
            "model." + name.replace("language_model.model.", "language_model."): tensor
            for name, tensor in tensors.items()
        }
        renamed["lm_head.weight"] = renamed.pop("model.language_model.lm_head.weight")
        save_file(renamed, folder / "model.safetensors")
    elif form == "sharded":
        (folder / "model.safetensors").unlink()
        shards = [f"model-{index:05}-of-00002.safetensors" for index in (1, 2)]
        # Layer scale in another shard than what it is folded into.
        places = {name: shards["lambda" in name] for name in tensors}
        for shard in shards:
            part = {name: tensors[name] for name in tensors if places[name] == shard}
            save_file(part, folder / shard)
        index = {"weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        kind = torch.float16 if form == "fp16" else torch.float32
        save_file(
            {name: item.to(kind) for name, item in tensors.items()}, folder / "model.safetensors"
        )
        if form == "fp16":  # numbers below its range are rounded: compare with the same
            again = {name: item.to(kind).float() for name, item in tensors.items()}
            exact = shutil.copytree(folder, tmp_path / "exact")
            save_file(again, exact / "model.safetensors")
            model = open_checkpoint(exact)
    assert_same(open_checkpoint(folder), model)


def test_a_tied_head_is_the_embedding_table(tmp_path: Path) -> None:
    model = fixture_named("internvl3").model
    folder = shutil.copytree(model.folder, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    found = open_checkpoint(folder)
    assert found.spec.decoder.tie_word_embeddings
    assert not model.spec.decoder.tie_word_embeddings
    head = load_reference(found).decoder.lm_head.weight
    assert torch.equal(head, tensors["language_model.model.embed_tokens.weight"].float())


def test_weights_read_back_from_a_bundle_have_layer_scale_once(bundle_of: BundleOf) -> None:
    model = fixture_named("internvl3").model
    stored = artifact_weights(model, open_bundle(bundle_of("internvl3", "fp32")), "onnx")
    for name in ("attn.out_proj", "mlp.fc2"):
        for group in tower_groups(model.spec.image.transformer):
            if group.name.endswith(name):
                place = f"{group.name}.weight"
                shape = group.out_size, group.in_size
                assert np.array_equal(stored.read(place, shape), model.weights.read(place, shape))


def test_features_of_an_earlier_layer_leave_the_later_ones_unread(tmp_path: Path) -> None:
    folder = shutil.copytree(fixture_named("internvl3").checkpoint, tmp_path / "copy")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "vision_feature_layer": -2}))
    found = open_checkpoint(folder)
    assert found.spec.image.transformer.num_hidden_layers == 2
    assert not any(name.startswith("vision.layers.2.") for name in found.weights)


@torch.no_grad()
def test_two_images_stand_in_a_run_each(bundle_of: BundleOf) -> None:
    model = fixture_named("internvl35").model
    shapes = {(20, 240): 13, (30, 30): 1}
    """Height and width, and tiles with the small whole."""
    images = [np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    text = "Is <image> or <image> brighter?"
    with mobilevlm.load(bundle_of("internvl35", "fp32")) as vlm:
        ids = vlm.prompt_ids(text, images)
        logits = vlm.prompt_logits(text, images)
    layout = model.spec.image.layout
    assert layout.row_id is not None
    marked = [index for index in ids if index in (*layout.begin_ids, *layout.end_ids)]
    assert marked == [*layout.begin_ids, *layout.end_ids] * 2
    starts = [place for place, index in enumerate(ids) if index == layout.begin_ids[0]]
    for start, tiles in zip(starts, shapes.values(), strict=True):
        stop = start + 1 + 4 * tiles
        assert ids[start + 1 : stop + 1] == [layout.row_id] * (4 * tiles) + [*layout.end_ids]
    reference = load_reference(model)
    prepared = [prepare(image, model.spec.image) for image in images]
    rows = [reference.visual_tokens(**arrays) for image in prepared for arrays in image.arrays]
    prompt = render(model.spec.conversation, [user_message(text, 2)])
    tokens = tokenize(model.tokenizer, prompt, model.spec.conversation)
    pieces = expand(tokens, [image.pieces for image in prepared])
    expected = reference.logits(reference.embed(pieces, rows)).numpy()
    assert relative_error(logits, expected) <= 1e-4
