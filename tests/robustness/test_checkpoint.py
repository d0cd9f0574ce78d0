"""Broken and foreign checkpoints: one line that names the file or key and what to do."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Copy, copy_of, message_of
from conftest import fixture_named

from mobilevlm.families import open_checkpoint
from mobilevlm.input_spec import FixedImage
from mobilevlm.model import OpenOptions


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """A safetensors checkpoint (llava_v1) and its tower."""
    return copy_of(fixture_named("llava_v1"), tmp_path)


@pytest.fixture
def pickled(tmp_path: Path) -> Copy:
    """A checkpoint of two .bin shards with an index (llava_v15) and its tower."""
    return copy_of(fixture_named("llava_v15"), tmp_path)


def test_the_undamaged_copy_opens(copy: Copy) -> None:
    copy.read_everything()


def test_the_undamaged_pickled_copy_opens(pickled: Copy) -> None:
    pickled.read_everything()


# config.json


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    message_of(lambda: open_checkpoint(tmp_path / "none"), "none", "no such checkpoint folder")


def test_missing_config(copy: Copy) -> None:
    copy.config.unlink()
    message_of(copy.open, str(copy.config), "missing")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"\xff\xfe{}", b'{"a": 1,}', b"[" * 100_000],
    ids=lambda content: repr(content[:8]),
)
def test_config_that_is_not_a_json_object(content: bytes, copy: Copy) -> None:
    copy.config.write_bytes(content)
    message_of(copy.open, str(copy.config), "JSON")


@pytest.mark.parametrize("kind", ["mamba", "kosmos", None, 7, ["llava"]], ids=repr)
def test_unknown_model_type(kind: Any, copy: Copy) -> None:
    copy.change(copy.config, model_type=kind)
    message_of(copy.open, str(copy.config), "model_type", repr(kind), "expected one of", "llava")


def test_a_model_type_of_another_layout(copy: Copy) -> None:
    copy.change(copy.config, model_type="qwen2_vl")
    message_of(copy.open, str(copy.config), "'qwen2_vl', which needs 'vision_config'")
    copy.change(copy.config, model_type="llama")
    message_of(copy.open, "is a language model alone: leave --vision-tower out")


@pytest.mark.parametrize(
    "kind", ["qformer", "mlp2x_relu", "mlpx_gelu", "", 3, ["linear"]], ids=repr
)
def test_unknown_projector(kind: Any, copy: Copy) -> None:
    copy.change(copy.config, mm_projector_type=kind)
    if kind == "":  # as in the official code: nothing named means linear
        copy.open()
        return
    message_of(copy.open, str(copy.config), "mm_projector_type", repr(kind), "ldpnetv2")


@pytest.mark.parametrize("depth", ["mlp0x_gelu", "mlp999x_gelu"])
def test_projector_of_an_impossible_depth(depth: str, copy: Copy) -> None:
    copy.change(copy.config, mm_projector_type=depth)
    message_of(copy.open, "checkpoint", "mm_projector")


def test_a_family_of_the_hub_that_is_not_known_is_named(copy: Copy) -> None:
    parts = {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "x"}}
    copy.config.write_text(json.dumps({"model_type": "kosmos", **parts}))
    message_of(copy.open, str(copy.config), "'kosmos'", "expected one of", "llava")


def test_tiled_images_are_refused(copy: Copy) -> None:
    copy.change(copy.config, image_aspect_ratio="anyres_max_9")
    message_of(copy.open, str(copy.config), "image_aspect_ratio", "anyres_max_9", "'pad'")


def test_unknown_conversation(copy: Copy) -> None:
    options = OpenOptions(copy.tower, conversation="chatml")
    message_of(lambda: open_checkpoint(copy.checkpoint, options), "'chatml'", "llava_v1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", "64"),
        ("hidden_size", -64),
        ("hidden_size", True),
        ("hidden_size", 63),  # not a multiple of the heads
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 5),  # the weights have four
        ("num_attention_heads", 3),
        ("num_key_value_heads", 3),
        ("vocab_size", 1e99),
        ("rms_norm_eps", "tiny"),
        ("hidden_act", "relu"),
        ("attention_bias", True),  # the weights have none
        ("rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", "dynamic"),
        ("max_position_embeddings", None),
        ("mm_vision_select_layer", -9),
        ("mm_vision_select_layer", "last"),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_hidden_size", 1024),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [2, None]),
    ],
    ids=repr,
)
def test_a_wrong_value_is_named_by_its_key(key: str, value: Any, copy: Copy) -> None:
    (copy.checkpoint / "generation_config.json").unlink()
    copy.change(copy.config, **{key: value})
    missing = {("num_hidden_layers", 5): "model.layers.4", ("attention_bias", True): "q_proj.bias"}
    expected = missing.get((key, value), key) if isinstance(value, int) else key
    message_of(copy.open, str(copy.checkpoint), expected)


@pytest.mark.parametrize("eos", ["</s>", [2, "x"], {}, [], 2.5, -1, True], ids=repr)
def test_a_wrong_end_id_is_named(eos: Any, copy: Copy) -> None:
    path = copy.checkpoint / "generation_config.json"
    copy.change(path, eos_token_id=eos)
    message_of(copy.open, "generation_config.json", "eos_token_id")


def test_tokenizer_with_more_pieces_than_the_embedding_has_rows(copy: Copy) -> None:
    copy.change(copy.config, vocab_size=600)
    message_of(copy.open, "vocab_size", "600", "680")


# Weights


def test_no_weights_at_all(copy: Copy) -> None:
    copy.weights.unlink()
    message_of(copy.open, str(copy.checkpoint), "model.safetensors", "pytorch_model.bin")


def test_lora_adapter(copy: Copy) -> None:
    copy.weights.unlink()
    (copy.checkpoint / "adapter_config.json").write_text("{}")
    (copy.checkpoint / "adapter_model.safetensors").write_bytes(b"")
    message_of(copy.open, "LoRA adapter", "--base")


def test_missing_shard(pickled: Copy) -> None:
    (pickled.checkpoint / "pytorch_model-00002-of-00002.bin").unlink()
    message_of(pickled.open, "pytorch_model-00002-of-00002.bin", "missing", "index.json")


@pytest.mark.parametrize(
    "name", ["../secret.bin", "/etc/passwd", "a/b.bin", "..", ".", "", "c:\\x.bin\\..", 7], ids=repr
)
def test_index_that_names_a_file_outside_the_folder(name: Any, pickled: Copy) -> None:
    (pickled.checkpoint.parent / "secret.bin").write_bytes(b"")
    index = pickled.checkpoint / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    message_of(pickled.open, str(pickled.checkpoint))


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"], ids=repr)
def test_index_without_a_map(weight_map: Any, pickled: Copy) -> None:
    index = pickled.checkpoint / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    message_of(pickled.open, str(index), "weight_map")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_truncated_safetensors(keep: int, copy: Copy) -> None:
    copy.weights.write_bytes(copy.weights.read_bytes()[:keep])
    message_of(copy.open, str(copy.weights), "damaged or truncated", "download it again")


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8, 0])
def test_safetensors_header_of_an_absurd_length(length: int, copy: Copy) -> None:
    content = bytearray(copy.weights.read_bytes())
    content[:8] = length.to_bytes(8, "little")
    copy.weights.write_bytes(content)
    message_of(copy.open, str(copy.weights), "damaged or truncated")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F16", "shape": [4, 4], "data_offsets": [0, 10**12]},
        {"dtype": "F16", "shape": [2**62, 2**62], "data_offsets": [0, 32]},
        {"dtype": "F16", "shape": [4, 4], "data_offsets": [32, 0]},
        {"dtype": "X9", "shape": [4, 4], "data_offsets": [0, 32]},
    ],
    ids=repr,
)
def test_safetensors_header_that_lies_about_a_tensor(entry: dict[str, Any], copy: Copy) -> None:
    header = json.dumps({"lm_head.weight": entry}).encode()
    copy.weights.write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    message_of(copy.open, str(copy.weights), "damaged or truncated")


@pytest.mark.parametrize("keep", [0, 10, 1000, 200_000, -1])
def test_truncated_pickle(keep: int, pickled: Copy) -> None:
    path = pickled.checkpoint / "pytorch_model-00001-of-00002.bin"
    path.write_bytes(path.read_bytes()[:keep])
    message_of(pickled.open, str(path), "damaged or truncated", "download it again")


class Payload:
    """Unpickled without care it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "code ran")


def test_code_in_a_pickle_does_not_run(pickled: Copy, tmp_path: Path) -> None:
    path = pickled.checkpoint / "pytorch_model-00001-of-00002.bin"
    torch.save({"lm_head.weight": Payload(tmp_path / "proof")}, path)
    message_of(pickled.open, str(path))
    assert not (tmp_path / "proof").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "proof").exists()  # the payload is a working one


def test_pickle_that_holds_no_dictionary(pickled: Copy) -> None:
    path = pickled.checkpoint / "pytorch_model-00001-of-00002.bin"
    torch.save([torch.zeros(2)], path)
    message_of(pickled.open, str(path), "dictionary", "list")


def test_pickle_without_torch_names_the_extra(
    pickled: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_torch(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == "torch":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    message_of(pickled.open, "pytorch_model-00001-of-00002.bin", "'torch'", "[reference]")


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.mm_projector.bias"]
)
def test_missing_tensor(name: str, copy: Copy) -> None:
    copy.change_tensors(copy.weights, lambda tensors: tensors.pop(name))
    message_of(copy.open, str(copy.checkpoint), repr(name), "missing")


def test_missing_tensor_of_the_tower(copy: Copy) -> None:
    name = "vision_model.encoder.layers.1.mlp.fc1.bias"
    copy.change_tensors(copy.tower / "model.safetensors", lambda tensors: tensors.pop(name))
    message_of(copy.open, str(copy.tower), repr(name), "missing")


def test_tensor_of_a_wrong_shape(copy: Copy) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    copy.change_tensors(copy.weights, lambda tensors: tensors.update({name: tensors[name][1:]}))
    message_of(copy.read_everything, str(copy.checkpoint), repr(name), "[191, 64]", "[192, 64]")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value: float, copy: Copy) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def damage(tensors: dict[str, Any]) -> None:
        tensors[name][3, 5] = value

    copy.change_tensors(copy.weights, damage)
    message_of(copy.read_everything, str(copy.checkpoint), repr(name), "not finite")


def test_opposite_infinities_are_found(copy: Copy) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def damage(tensors: dict[str, Any]) -> None:
        tensors[name][3, 5], tensors[name][3, 6] = np.inf, -np.inf

    copy.change_tensors(copy.weights, damage)
    message_of(copy.read_everything, repr(name), "not finite")


def test_weights_of_an_integer_kind_are_refused(copy: Copy) -> None:
    """A checkpoint quantized by another tool."""
    name = "model.layers.1.mlp.up_proj.weight"
    copy.change_tensors(
        copy.weights, lambda tensors: tensors.update({name: tensors[name].astype(np.int8)})
    )
    message_of(copy.read_everything, str(copy.checkpoint), repr(name), "i8")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_float_kind_is_read_from_safetensors_and_pickles(
    kind: torch.dtype, copy: Copy, tmp_path: Path
) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = {name: value.to(kind) for name, value in load_torch(copy.weights).items()}
    expected = tensors["lm_head.weight"].float().numpy()
    save_torch(tensors, copy.weights)
    assert np.array_equal(copy.open().weights.read("decoder.lm_head.weight", (680, 64)), expected)
    copy.weights.unlink()
    torch.save(tensors, copy.checkpoint / "pytorch_model.bin")
    assert np.array_equal(copy.open().weights.read("decoder.lm_head.weight", (680, 64)), expected)


# The vision tower


def test_missing_tower_says_how_to_give_it(copy: Copy) -> None:
    message_of(lambda: open_checkpoint(copy.checkpoint), "openai/clip-vit-large-patch14",
               "--vision-tower", str(copy.config))  # fmt: skip


def test_tower_inside_the_checkpoint_stands_in_only_where_its_size_fits(tmp_path: Path) -> None:
    """MobileVLM V2 carries its tower, so config.json's name alone tells the published size."""
    copy = copy_of(fixture_named("mobilevlm_v2"), tmp_path)
    message_of(lambda: open_checkpoint(copy.checkpoint), "1024", "mm_hidden_size", "--vision-tower")


def test_given_tower_that_is_not_there(copy: Copy) -> None:
    shutil.rmtree(copy.tower)
    message_of(copy.open, str(copy.tower), "config.json")


def test_tower_of_another_size(copy: Copy) -> None:
    copy.change(copy.tower / "config.json", hidden_size=1024, num_attention_heads=16)
    message_of(copy.open, str(copy.tower), "1024", "96", "--vision-tower")


def test_tower_whose_weights_have_another_size(copy: Copy) -> None:
    copy.change(copy.tower / "config.json", image_size=336)
    copy.change(copy.tower / "preprocessor_config.json", crop_size=336, size=336)
    message_of(
        copy.read_everything, str(copy.tower), "position_embedding", "[257, 96]", "[577, 96]"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("num_attention_heads", 5),
        ("image_size", "big"),
        ("patch_size", 500),  # larger than the picture: no patch at all
        ("hidden_act", "relu"),
        ("num_hidden_layers", 1.5),
    ],
    ids=repr,
)
def test_a_wrong_value_of_the_tower_is_named(key: str, value: Any, copy: Copy) -> None:
    copy.change(copy.tower / "config.json", **{key: value})
    message_of(copy.open, str(copy.tower), key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("crop_size", 448),
        ("size", {"shortest_edge": "x"}),
        ("size", {}),
        ("size", -1),
        ("size", True),
        ("resample", 2),
        ("image_mean", [0.5]),
        ("image_mean", ["a", "b", "c"]),
        ("image_std", [1.0, 0.0, 1.0]),
        ("image_std", "x"),
    ],
    ids=repr,
)
def test_a_wrong_value_of_the_image_processor_is_named(key: str, value: Any, copy: Copy) -> None:
    copy.change(copy.tower / "preprocessor_config.json", **{key: value})
    if value == {}:
        image = copy.open().spec.image.preparation
        assert isinstance(image, FixedImage)
        assert image.shortest_edge == 224  # nothing said: the tower's size
        return
    message_of(copy.open, str(copy.tower), "preprocessor_config.json", key)


def test_sizes_as_numbers_and_as_objects_mean_the_same(copy: Copy) -> None:
    expected = copy.open().spec.image.preparation
    copy.change(
        copy.tower / "preprocessor_config.json",
        size={"shortest_edge": 224},
        crop_size={"height": 224, "width": 224},
    )
    assert copy.open().spec.image.preparation == expected


def test_tower_beside_the_checkpoint_or_inside_is_found_by_itself(copy: Copy) -> None:
    beside = copy.checkpoint.parent / "clip-vit-large-patch14"
    shutil.copytree(copy.tower, beside)
    assert "vision.class_embedding" in open_checkpoint(copy.checkpoint).weights
    beside.rename(copy.checkpoint / "vision_tower")
    assert "vision.class_embedding" in open_checkpoint(copy.checkpoint).weights


def test_whole_clip_folder_is_taken_as_a_tower(copy: Copy) -> None:
    """Text tensors and integer position_ids beside the vision model; a nested vision_config."""
    tower = json.loads((copy.tower / "config.json").read_text())
    whole = {"model_type": "clip", "text_config": {"hidden_size": 7}, "vision_config": tower}
    (copy.tower / "config.json").write_text(json.dumps(whole))
    extra = {
        "text_model.embeddings.token_embedding.weight": np.zeros((3, 7), np.float16),
        "vision_model.embeddings.position_ids": np.arange(257)[None],
        "logit_scale": np.zeros((), np.float16),
    }
    copy.change_tensors(copy.tower / "model.safetensors", lambda tensors: tensors.update(extra))
    copy.read_everything()
