"""LLaVA's line in other layouts and forms than the fixtures': same numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FLOAT32, fixture_named, relative_error
from llava import write_own_layout
from safetensors.torch import load_file, save_file

import mobilevlm
from mobilevlm.conversation import official_ids, render, tokenize, user_message
from mobilevlm.families import open_checkpoint
from mobilevlm.image import normalize
from mobilevlm.input_spec import AnyResolution
from mobilevlm.messages import Message
from mobilevlm.model import Model
from mobilevlm.preparation import prepare
from mobilevlm.prompt import expand
from mobilevlm.reference import load_reference

NEXT, ONEVISION = fixture_named("llava_next"), fixture_named("llava_onevision")


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_llavas_own_layout_of_1_6_gives_the_hubs_numbers(tmp_path: Path) -> None:
    model = open_checkpoint(write_own_layout(tmp_path))
    spec = model.spec.image
    assert isinstance(spec.preparation, AnyResolution) and not spec.preparation.rounding
    image = prepare(NEXT.image, spec)
    pixels = np.stack([normalize(run["pixels"], spec.preparation) for run in image.arrays])
    assert np.abs(pixels - NEXT.arrays["pixel_values"][0]).max() <= 1e-6
    reference = load_reference(model)
    rows = reference.image_rows(image)
    assert relative_error(rows.numpy(), NEXT.arrays["projector_output"]) <= FLOAT32
    hub = NEXT.model
    tokens = tokenize(hub.tokenizer, NEXT.templated_prompt, hub.spec.conversation)
    logits = reference.logits(reference.embed(expand(tokens, [image.pieces]), [rows])).numpy()
    assert relative_error(logits, NEXT.logits) <= FLOAT32


def test_llavas_own_layout_says_vicunas_words_and_marks_an_image_once(tmp_path: Path) -> None:
    model = open_checkpoint(write_own_layout(tmp_path))
    text = render(model.spec.conversation, [user_message("What is it?", 1)])
    assert text.endswith(" USER: <image>\nWhat is it? ASSISTANT:")
    tokens = tokenize(model.tokenizer, text, model.spec.conversation)
    assert official_ids(tokens, model.spec.image.layout).count(-200) == 1


def test_mistral_in_llavas_own_layout_has_its_own_words_and_slides_as_it_says(
    tmp_path: Path,
) -> None:
    given = {"model_type": "llava_mistral", "num_key_value_heads": 8}
    model = open_checkpoint(write_own_layout(tmp_path, **given, sliding_window=16))
    assert model.spec.decoder.window(0) == 16
    said: list[Message] = [
        {"role": "system", "content": "Be brief."},
        user_message("What is it?", 1),
        {"role": "assistant", "content": "A sign."},
        user_message("What does <image> show?", 1),
    ]
    assert render(model.spec.conversation, said) == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A sign. </s>"
        "[INST] What does <image> show? [/INST]"
    )
    assert model.spec.conversation.eos_token_ids == (2,)


def test_a_decoder_all_of_whose_layers_slide_runs_as_onnx_and_gguf(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(NEXT.checkpoint, tmp_path / "llava_next"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"model_type": "mistral", "sliding_window": 16}
    (folder / "config.json").write_text(json.dumps(config))
    exact, bundle = logits_of(open_checkpoint(folder)).numpy(), tmp_path / "bundle"
    formats = ["onnx", "gguf"]
    mobilevlm.export(folder, bundle, recipe="fp32", formats=formats, measure=False)
    for engine in ("onnx", "ggml"):
        with mobilevlm.load(bundle, engine=engine) as vlm:
            found = vlm.prompt_logits(NEXT.templated_prompt, NEXT.images, raw=True)
        assert relative_error(found, exact) <= (1e-4 if engine == "onnx" else 1e-2), engine


def test_sizes_of_llavas_own_layout_are_width_first_and_may_be_a_text(tmp_path: Path) -> None:
    model = open_checkpoint(write_own_layout(tmp_path, image_grid_pinpoints="[(168, 112)]"))
    assert isinstance(model.spec.image.preparation, AnyResolution)
    assert model.spec.image.preparation.grids == ((2, 3),)


def test_a_newline_that_is_not_used_is_left_aside(tmp_path: Path) -> None:
    model = open_checkpoint(write_own_layout(tmp_path, image_aspect_ratio="pad"))
    assert model.spec.image.preparation.kind == "fixed_image"
    assert not model.spec.image.connector.newline


def test_llavas_own_layout_runs_as_onnx(tmp_path: Path) -> None:
    checkpoint = write_own_layout(tmp_path)
    bundle = tmp_path / "bundle"
    mobilevlm.export(checkpoint, bundle, recipe="fp32", measure=False)
    with mobilevlm.load(bundle) as vlm:
        rows = vlm.encode_image(NEXT.image)
        assert relative_error(rows, NEXT.arrays["projector_output"]) <= 1e-4
        answer = vlm.generate("What is it?", [NEXT.image], max_new_tokens=4)
        assert answer.visual_tokens == len(rows)


NEW_NAMES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
}


def new_name(name: str) -> str:
    start = next(start for start in NEW_NAMES if name.startswith(start))
    return NEW_NAMES[start] + name.removeprefix(start)


def logits_of(model: Model) -> torch.Tensor:
    reference, fixture = load_reference(model), fixture_named(model.folder.name)
    image = prepare(fixture.image, model.spec.image)
    tokens = tokenize(model.tokenizer, fixture.templated_prompt, model.spec.conversation)
    pieces = expand(tokens, [image.pieces])
    return reference.logits(reference.embed(pieces, [reference.image_rows(image)]))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_names_shards_and_other_types_give_the_same_numbers(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(fixture_named(name).checkpoint, tmp_path / name))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    renamed = {new_name(key): tensor.to(dtype) for key, tensor in tensors.items()}
    names, index = sorted(renamed), dict[str, str]()
    for shard in range(2):
        file = f"model-0000{shard + 1}-of-00002.safetensors"
        save_file({key: renamed[key] for key in names[shard::2]}, folder / file)
        index |= dict.fromkeys(names[shard::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = logits_of(open_checkpoint(folder)).numpy()
    limit = FLOAT32 if dtype == torch.float32 else 0.05
    assert relative_error(found, fixture_named(name).logits) <= limit


def test_a_head_of_its_own_is_read_where_onevision_has_one(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ONEVISION.checkpoint, tmp_path / "llava_onevision"))
    tensors = load_file(folder / "model.safetensors")
    tied = tensors["language_model.model.embed_tokens.weight"]
    tensors["language_model.lm_head.weight"] = tied.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    found = logits_of(open_checkpoint(folder)).numpy()
    assert relative_error(found[:, ::-1], ONEVISION.logits) <= FLOAT32


@pytest.mark.parametrize(
    ("given", "window"), [({}, 4096), ({"sliding_window": None}, 0), ({"sliding_window": 8}, 8)]
)
def test_mistral_slides_in_all_layers_unless_its_window_is_null(
    given: dict[str, int | None], window: int, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(NEXT.checkpoint, tmp_path / "llava_next"))
    config = json.loads((folder / "config.json").read_text())
    text = {**config["text_config"], "model_type": "mistral", "max_position_embeddings": 32768}
    config["text_config"] = {**text, **given}
    (folder / "config.json").write_text(json.dumps(config))
    model = open_checkpoint(folder)
    layers = tuple(range(model.spec.decoder.num_hidden_layers)) if window else ()
    assert (model.spec.decoder.sliding_window, model.spec.decoder.sliding_layers) == (
        window,
        layers,
    )
    same = relative_error(logits_of(model).numpy(), NEXT.logits) <= FLOAT32
    assert same == (window != 8)
