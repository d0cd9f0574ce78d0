"""FastVLM's own: stages of its tower against the official arrays, both layouts of checkpoints, and
ways in which their weights are stored."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FLOAT32, BundleOf, Fixture, fixture_named, relative_error
from fastvlm import write_apple
from PIL import Image
from safetensors.torch import load_file, save_file

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.conversation import official_ids, render, tokenize, user_message
from mobilevlm.export.gguf.support import check_support
from mobilevlm.families import open_checkpoint
from mobilevlm.image_encoder import ConvEncoder
from mobilevlm.model import Model, OpenOptions
from mobilevlm.preparation import prepare
from mobilevlm.reference import load_reference
from mobilevlm.reference.steps import State

STAGES = ("stem", *(f"stage{index}" for index in range(5)))


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return fixture_named("fast_vlm")


@pytest.fixture
def copy(fixture: Fixture, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixture.checkpoint, tmp_path / "copy"))


def pixels_of(fixture: Fixture) -> np.ndarray:
    pixels: np.ndarray = prepare(fixture.image, fixture.model.spec.image).arrays[0]["pixels"]
    return pixels


@pytest.fixture(scope="module")
def gguf_bundle(fixture: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32 in both formats."""
    folder = tmp_path_factory.mktemp("gguf") / "bundle"
    formats = ("onnx", "gguf")
    mobilevlm.export(fixture.checkpoint, folder, recipe="fp32", formats=formats, measure=False)
    return folder


def check_features(model: Model, fixture: Fixture, limit: float = FLOAT32) -> None:
    reference = load_reference(model)
    features = reference.features(pixels_of(fixture)).numpy()
    assert relative_error(features, fixture.arrays["vision_features"][0]) <= limit


def test_each_stage_of_the_tower_gives_the_official_map(fixture: Fixture) -> None:
    reference = load_reference(fixture.model)
    state = State(torch.from_numpy(fixture.arrays["pixel_values"]))
    found = {}
    for step in reference.vision_steps():
        state = step.run(state)
        _, part, *rest = step.name.split(".")
        found[f"stage{rest[0]}" if rest else part] = state.hidden.numpy()
    for name in STAGES:
        assert relative_error(found[name], fixture.arrays[f"tower_{name}"]) <= FLOAT32, name
    assert list(found)[-1] == "expansion"


def test_the_published_tower_has_the_sizes_of_timms_table(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"].update(model_args={"inference_mode": True}, hidden_size=3072)
    (copy / "config.json").write_text(json.dumps(config))
    processor = json.loads((copy / "preprocessor_config.json").read_text())
    processor |= {"crop_size": {"height": 1024, "width": 1024}, "size": {"shortest_edge": 1024}}
    (copy / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(mobilevlm.MobileVLMError, match=r"stages\.0\.blocks\.1\..* is missing"):
        open_checkpoint(copy)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "branches"])
def test_apples_layout_is_the_same_model(fixture: Fixture, fused: bool, tmp_path: Path) -> None:
    model = open_checkpoint(write_apple(fixture, tmp_path / "apple", fused))
    assert isinstance(model.spec.image.encoder, ConvEncoder)
    assert model.spec.image.encoder == fixture.model.spec.image.encoder
    assert model.spec.decoder == fixture.model.spec.decoder
    # Branches add up in other roundings: weights of the fixture are float16, of branches float32.
    check_features(model, fixture, 1e-4)
    reference = load_reference(model)
    embeds = torch.from_numpy(fixture.arrays["inputs_embeds"][0])
    assert relative_error(reference.logits(embeds).numpy(), fixture.logits) <= FLOAT32


def test_apples_layout_marks_images_as_its_code_does(fixture: Fixture, tmp_path: Path) -> None:
    model = open_checkpoint(write_apple(fixture, tmp_path / "apple"))
    conversation = model.spec.conversation
    for prompt in (fixture.prompt, f"<image>\n{fixture.prompt}"):
        text = render(conversation, [user_message(prompt, 1)])
        assert text == fixture.templated_prompt
    ids = official_ids(tokenize(model.tokenizer, text, conversation), model.spec.image.layout)
    expected = fixture.arrays["input_ids"][0].tolist()
    place = expected.index(603)
    assert ids == [*expected[:place], -200, *expected[place + 9 :]]
    assert conversation.eos_token_ids == (602,)


@pytest.mark.parametrize(("aspect", "rows"), [("pad", 24), ("square", 0), (None, 0)])
def test_apples_layout_pads_with_black_where_the_checkpoint_says_so(
    fixture: Fixture, aspect: str | None, rows: int, tmp_path: Path
) -> None:
    folder = write_apple(fixture, tmp_path / "apple", image_aspect_ratio=aspect)
    model = open_checkpoint(folder)
    image = Image.new("RGB", (192, 144), "white")
    pixels = prepare(image, model.spec.image).arrays[0]["pixels"]
    assert pixels.shape == (192, 192, 3)
    dark = (pixels == 0).all(axis=(1, 2))
    assert dark[:rows].all() and dark[192 - rows :].all() and not dark[rows : 192 - rows].any()


def test_apples_layout_answers_through_a_bundle(fixture: Fixture, tmp_path: Path) -> None:
    """Images of the tower's own size are the same padded and cut."""
    image = Image.fromarray(pixels_of(fixture))
    mobilevlm.export(write_apple(fixture, tmp_path / "apple"), tmp_path / "bundle", recipe="fp32")
    with mobilevlm.load(tmp_path / "bundle") as vlm:
        answer = vlm.generate(fixture.prompt, [image], max_new_tokens=24, ignore_eos=True)
    assert answer.token_ids == fixture.generated_ids


FORMS = {
    "older names": lambda name: (
        name.replace("model.vision_tower.", "vision_tower.")
        .replace("model.multi_modal_projector.", "multi_modal_projector.")
        .replace("model.language_model.", "language_model.model.")
        .replace("lm_head.", "language_model.lm_head.")
    ),
    "nested": lambda name: name.replace("model.language_model.", "language_model."),
}


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_of_names_are_read(fixture: Fixture, form: str, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file(
        {FORMS[form](name): value for name, value in tensors.items()}, copy / "model.safetensors"
    )
    model = open_checkpoint(copy)
    check_features(model, fixture)
    embeds = torch.from_numpy(fixture.arrays["inputs_embeds"][0])
    assert relative_error(load_reference(model).logits(embeds).numpy(), fixture.logits) <= FLOAT32


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_weights_of_other_types_in_shards_are_read(
    fixture: Fixture, kind: torch.dtype, copy: Path
) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    places, total = dict[str, str](), 3
    for number in range(total):
        file = f"model-{number + 1:05}-of-{total:05}.safetensors"
        part = {
            name: value.to(kind) if value.is_floating_point() else value
            for index, (name, value) in enumerate(sorted(tensors.items()))
            if index % total == number
        }
        save_file(part, copy / file)
        places |= dict.fromkeys(part, file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    # bfloat16 has 8 bits of each number; the fixture's have 11.
    check_features(open_checkpoint(copy), fixture, 0.05 if kind == torch.bfloat16 else FLOAT32)


def test_a_tied_head_is_the_embedding_table(fixture: Fixture, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (copy / "config.json").write_text(json.dumps(config))
    model = open_checkpoint(copy)
    decoder = model.spec.decoder
    assert decoder.tie_word_embeddings
    shape = (decoder.vocab_size, decoder.hidden_size)
    table = model.weights.read("decoder.embed_tokens.weight", shape)
    assert np.array_equal(model.weights.read("decoder.lm_head.weight", shape), table)


def test_an_adapter_changes_layers_before_they_are_fused(fixture: Fixture, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    block = "model.vision_tower.timm_model.stages.3.blocks.0"
    places = {
        "model.language_model.layers.0.self_attn.q_proj": ("decoder.layers.0.attn.q_proj", 64, ()),
        f"{block}.token_mixer.proj": ("vision.stages.3.blocks.0.attn.out_proj", 64, ()),
        f"{block}.mlp.fc1": ("vision.stages.3.blocks.0.mlp.fc1", 128, (1, 1)),
    }
    tensors, changes = {}, {}
    for theirs, (ours, out, edges) in places.items():
        a, b = (random.standard_normal(shape, np.float32) for shape in ((4, 64), (out, 4)))
        name = f"base_model.model.{theirs}"
        tensors[f"{name}.lora_A.weight"] = torch.from_numpy(a.reshape(4, 64, *edges))
        tensors[f"{name}.lora_B.weight"] = torch.from_numpy(b.reshape(out, 4, *edges))
        changes[ours] = 2 * b @ a
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    adapted = open_checkpoint(folder, OpenOptions(base=fixture.checkpoint))
    scale = load_file(fixture.checkpoint / "model.safetensors")[f"{block}.layer_scale_1.gamma"]
    for ours, change in changes.items():
        names = f"{ours}.weight", change.shape
        expected = change * (scale.float().numpy()[:, :, 0] if "out_proj" in ours else 1)
        found = adapted.weights.read(*names) - fixture.model.weights.read(*names)
        assert np.abs(found - expected).max() <= 1e-5
    tensors[f"base_model.model.{block}.mlp.fc9.lora_A.weight"] = torch.zeros(4, 64)
    tensors[f"base_model.model.{block}.mlp.fc9.lora_B.weight"] = torch.zeros(64, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(mobilevlm.MobileVLMError, match="fc9"):
        open_checkpoint(folder, OpenOptions(base=fixture.checkpoint))


@pytest.mark.skipif(
    os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1", reason="asked to go without llama.cpp"
)
@pytest.mark.parametrize("engine", ["hybrid", "ggml"])
def test_the_decoder_alone_is_a_gguf_file_that_llama_cpp_runs_behind_the_onnx_tower(
    fixture: Fixture, engine: str, gguf_bundle: Path
) -> None:
    formats = {(part.stage, part.format) for part in open_bundle(gguf_bundle).manifest.artifacts}
    assert ("decoder", "gguf") in formats and ("vision", "gguf") not in formats
    with mobilevlm.load(gguf_bundle, engine) as vlm:
        found = vlm.prompt_logits(fixture.prompt, [fixture.image])
        assert relative_error(found, fixture.logits) <= 1e-2
        assert (found.argmax(-1) == fixture.logits.argmax(-1)).all()
        answer = vlm.generate(fixture.prompt, [fixture.image], max_new_tokens=24, ignore_eos=True)
    assert answer.token_ids == fixture.generated_ids


def test_llama_cpp_has_no_such_tower(fixture: Fixture, gguf_bundle: Path) -> None:
    with pytest.raises(mobilevlm.MobileVLMError, match="no image encoder of the kind conv"):
        check_support(fixture.model.spec)
    with pytest.raises(mobilevlm.MobileVLMError, match="gguf"):
        mobilevlm.load(gguf_bundle, "gguf")


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_quantized_bundles_stay_near_the_official_values_and_tell_their_figures(
    fixture: Fixture, recipe: str, bundle_of: BundleOf
) -> None:
    """Measured: 0.050 of visual tokens (8-bit products of 8 to 128 channels)."""
    bundle = bundle_of(fixture.name, recipe, measure=True)
    quality = open_bundle(bundle).manifest.quality
    assert quality.measured and set(quality.stages) == {"vision", "decoder", "end_to_end"}
    assert quality.stages["vision"].figures["relative_error"] <= 0.065
    with mobilevlm.load(bundle) as vlm:
        tokens = vlm.encode_image(fixture.image)
    assert relative_error(tokens, fixture.arrays["projector_output"][0]) <= 0.065
