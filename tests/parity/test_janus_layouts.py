"""Janus in DeepSeek's own layout is the model that the hub's layout has: the spec, tensors, ids,
answers and drawn codes; what it asks for beyond the official models is refused in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import message_of
from conftest import Fixture, fixture_named
from safetensors.torch import load_file

import mobilevlm
from mobilevlm.conversation import render
from mobilevlm.families import open_checkpoint
from mobilevlm.messages import Message

_SPELLED = [
    ("model.vision_model.embeddings.patch_embedding.",
     "vision_model.vision_tower.patch_embed.proj."),
    ("model.vision_model.post_layernorm.", "vision_model.vision_tower.norm."),
    ("model.vision_model.encoder.layers.", "vision_model.vision_tower.blocks."),
    ("model.aligner.fc1.", "aligner.layers.0."),
    ("model.aligner.hidden_layers.0.", "aligner.layers.2."),
    ("model.generation_aligner.fc1.", "gen_aligner.layers.0."),
    ("model.generation_aligner.hidden_layers.0.", "gen_aligner.layers.2."),
    ("model.generation_embeddings.", "gen_embed."),
    ("model.generation_head.proj_out.", "gen_head.output_mlp_projector."),
    ("model.generation_head.vision_head.", "gen_head.vision_head."),
    ("model.vqmodel.", "gen_vision_model."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
]  # fmt: skip
_INSIDE = [
    (".layer_norm1.", ".norm1."), (".layer_norm2.", ".norm2."),
    (".self_attn.projection_layer.", ".attn.proj."), (".decoder.up.", ".decoder.conv_blocks."),
    (".encoder.down.", ".encoder.conv_blocks."), (".block.", ".res."), (".mid.block_1.", ".mid.0."),
    (".mid.attn_1.", ".mid.1."), (".mid.block_2.", ".mid.2."),
]  # fmt: skip


def deepseek_name(name: str) -> str:
    start, ours = next(pair for pair in _SPELLED if name.startswith(pair[0]))
    name = ours + name.removeprefix(start)
    if not name.startswith("language_model."):
        for theirs, own in _INSIDE:
            name = name.replace(theirs, own)
    return name


def deepseek_tensors(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as the official class saves them."""
    positions = stored.pop("model.vision_model.embeddings.position_embedding.weight")
    found = {"vision_model.vision_tower.pos_embed": positions[None]}
    for name in [name for name in stored if ".self_attn.q_proj." in name and "vision" in name]:
        three = [stored.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        joined = deepseek_name(name).replace(".self_attn.q_proj.", ".attn.qkv.")
        found[joined] = torch.cat(three)
    found |= {deepseek_name(name): tensor for name, tensor in stored.items()}
    found["vision_model.vision_tower.attn_pool.latent"] = torch.zeros(1, 1, 32)
    found["gen_vision_model.quantize.codebook_used"] = torch.zeros(8)
    return found


def deepseek_config(text: dict[str, Any]) -> dict[str, Any]:
    """config.json with the official keys; sizes that official models have by name stand in it."""
    tower = {"model_name": "siglip_large_patch16_384", "image_size": 64, "select_feature": "same",
             "select_layer": -1, "width": 32, "layers": 3, "heads": 4}  # fmt: skip
    codes = {"image_token_size": 128, "n_embed": 8, "ch": 32, "decoder_ch_mult": [1, 1, 2],
             "num_res_blocks": 1, "z_channels": 16}  # fmt: skip
    kept = {key: item for key, item in text.items() if not key.endswith("_token_id")}
    mlp = {"depth": 2, "n_embed": 48, "projector_type": "mlp_gelu"}
    return {
        "architectures": ["MultiModalityCausalLM"], "model_type": "multi_modality",
        "language_config": kept,
        "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": tower},
        "aligner_config": {"cls": "MlpProjector", "params": {**mlp, "input_dim": 32}},
        "gen_vision_config": {"cls": "VQ-16", "params": codes},
        "gen_aligner_config": {"cls": "MlpProjector", "params": {**mlp, "input_dim": 8}},
        "gen_head_config": {"cls": "vision_head", "params": {
            "image_token_embed": 48, "image_token_size": 128, "n_embed": 48}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def janus() -> Fixture:
    return fixture_named("janus")


@pytest.fixture(scope="module")
def deepseek(janus: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepseek")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(janus.checkpoint / name, folder / name)
    config = json.loads((janus.checkpoint / "config.json").read_text())
    write(folder / "config.json", deepseek_config(config["text_config"]))
    write(folder / "processor_config.json", {
        "add_special_token": False, "ignore_id": -100, "image_tag": "<image_placeholder>",
        "mask_prompt": True, "num_image_tokens": 16, "processor_class": "VLChatProcessor",
        "sft_format": "deepseek"})  # fmt: skip
    write(folder / "preprocessor_config.json", {
        "background_color": [127] * 3, "do_normalize": True, "image_mean": [0.5] * 3,
        "image_processor_type": "VLMImageProcessor", "image_size": 64, "image_std": [0.5] * 3,
        "min_size": 14, "processor_class": "VLChatProcessor",
        "rescale_factor": 0.00392156862745098})  # fmt: skip
    tensors = deepseek_tensors(load_file(janus.checkpoint / "model.safetensors"))
    torch.save(tensors, folder / "pytorch_model.bin")  # as the hub has them
    return folder


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


def test_both_layouts_give_the_same_spec_tensors_and_prompts(
    janus: Fixture, deepseek: Path
) -> None:
    ours, theirs = open_checkpoint(deepseek), janus.model
    blank = replace(theirs.spec.conversation, chat_template="")
    specs = [
        replace(
            model.spec, name="", conversation=replace(model.spec.conversation, chat_template=""),
            outputs={"image": replace(model.spec.drawing, chat_template="")},
        )
        for model in (ours, theirs)
    ]  # fmt: skip
    assert specs[0].conversation == blank
    assert specs[0] == specs[1]
    assert set(ours.weights) == set(theirs.weights)
    for name, ref in theirs.weights._refs.items():
        shape = ref.files.shape(ref.name)
        assert (ours.weights.read(name, shape) == theirs.weights.read(name, shape)).all(), name
    part, text = {"type": "image"}, {"type": "text", "text": " What is it? "}
    talk: list[Message] = [
        {"role": "user", "content": [part, text]},
        {"role": "assistant", "content": " A house."},
        {"role": "user", "content": [text, part, text]},
    ]
    for messages in (talk[:1], talk, [{"role": "user", "content": "Hello"}]):
        said = [render(model.spec.conversation, messages) for model in (ours, theirs)]  # type: ignore[arg-type]
        assert said[0] == said[1]
    system: list[Message] = [{"role": "system", "content": "Be short."}, *talk[:1]]
    assert render(ours.spec.conversation, system).startswith("Be short.\n\n<|User|>: <image_")


def test_an_fp32_bundle_of_deepseeks_layout_answers_and_draws_as_the_official_class(
    janus: Fixture, deepseek: Path, tmp_path: Path
) -> None:
    mobilevlm.export(deepseek, tmp_path / "bundle", recipe="fp32", formats=("onnx",))
    arrays = janus.arrays
    with mobilevlm.load(tmp_path / "bundle") as vlm:
        [drawn] = vlm.drawn(
            "A small red house near a river, with a road sign.", guidance=5, temperature=0
        )
        assert drawn.codes == arrays["gen_image_ids"].tolist()
        assert (np.asarray(drawn.image) == arrays["gen_pixels"]).all()
        question = janus.expected["user_prompt"][1]["text"]
        image = janus.folder / "image.png"
        answer = vlm.generate(question, [image], max_new_tokens=24, ignore_eos=True)
        assert answer.token_ids == janus.generated_ids


@pytest.mark.parametrize(
    ("part", "changed", "told"),
    [
        ("vision_config", {"model_name": "siglip_so400m"}, "'model_name' is 'siglip_so400m'"),
        ("vision_config", {"select_layer": -2}, "'select_layer' is -2, expected -1"),
        ("aligner_config", {"projector_type": "linear"}, "'projector_type' is 'linear'"),
        ("gen_head_config", {"image_token_size": 64}, "'image_token_size' is 64, expected 128"),
        ("gen_aligner_config", {"n_embed": 64}, "'projection_dim'"),
    ],
)
def test_a_wrong_configuration_is_named(
    deepseek: Path, part: str, changed: dict[str, Any], told: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(deepseek, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config[part]["params"] |= changed
    write(copy / "config.json", config)
    assert told in message_of(lambda: open_checkpoint(copy))


def test_another_conversation_of_the_processor_is_refused(deepseek: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(deepseek, tmp_path / "copy"))
    write(copy / "processor_config.json", {"sft_format": "alpaca"})
    assert "'sft_format' is 'alpaca'" in message_of(lambda: open_checkpoint(copy))
