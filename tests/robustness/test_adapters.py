"""Adapters that cannot be merged: one line that names the folder, key or tensor and what to do; and
exports of those that can."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA, Fixture, refusal, tree_of
from safetensors.numpy import load_file, save_file

import mobilevlm
from mobilevlm.adapters.adapter import folder_kind
from mobilevlm.cli import main
from mobilevlm.errors import CheckpointError
from mobilevlm.families import open_checkpoint
from mobilevlm.model import Model, OpenOptions

LORA = DATA / "llava_lora"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


class Adapter:
    """A copy of a LoRA folder (LLaVA's layout) that a test damages, and its base."""

    def __init__(self, fixture: Fixture, folder: Path) -> None:
        self.fixture, self.base = fixture, fixture.checkpoint
        self.folder = shutil.copytree(LORA / "llava", folder / "adapter")
        self.config = self.folder / "adapter_config.json"
        self.weights = self.folder / "adapter_model.safetensors"

    def set(self, **changes: Any) -> None:
        self.config.write_text(json.dumps({**json.loads(self.config.read_text()), **changes}))

    def change(self, change: Callable[[dict[str, Any]], object]) -> None:
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights)

    def open(self, base: Path | None = None) -> Model:
        return open_checkpoint(self.folder, OpenOptions(self.fixture.tower, base=base or self.base))

    def message(self, *expected: str, base: Path | None = None) -> None:
        with pytest.raises(CheckpointError) as caught:
            self.open(base)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 600, message
        for part in expected:
            assert part in message, f"{part!r} not in {message!r}"


@pytest.fixture
def adapter(llava_v1: Fixture, tmp_path: Path) -> Adapter:
    return Adapter(llava_v1, tmp_path)


# Without --base


def test_each_kind_of_folder_is_named_with_what_to_do(
    adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    projector = tmp_path / "projector"
    projector.mkdir()
    shutil.copy(adapter.base / "config.json", projector)
    torch.save({"model.mm_projector.weight": torch.zeros(64, 96)}, projector / "mm_projector.bin")
    delta = shutil.copytree(adapter.base, tmp_path / "llava-delta-v1-1")
    whole = load_file(delta / "model.safetensors")
    save_file({k: v * np.float16(0.01) for k, v in whole.items()}, delta / "model.safetensors")
    for folder, kind, words in (
        (adapter.folder, "lora", ("LoRA adapter", "'vicuna-tiny-v1.3'")),
        (projector, "projector", ("projector alone", "mm_projector.bin")),
        (delta, "delta", ("delta weights",)),
    ):
        assert folder_kind(folder) == kind
        for verb in (("export", "-o", tmp_path / "bundle"), ("inspect",)):
            line = refusal(capsys, *verb, folder)
            assert str(folder) in line and "--base" in line
            assert all(word in line for word in words), line
    assert folder_kind(adapter.base) is None


def test_a_projector_beside_weights_that_have_none(adapter: Adapter, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter.base, tmp_path / "both")
    tensors = load_file(folder / "model.safetensors")
    parts = {name: tensors.pop(name) for name in list(tensors) if "mm_projector" in name}
    save_file(tensors, folder / "model.safetensors")
    torch.save({k: torch.from_numpy(v) for k, v in parts.items()}, folder / "mm_projector.bin")
    with pytest.raises(
        CheckpointError, match=r"beside it in mm_projector.bin.*same folder.*--base"
    ):
        open_checkpoint(folder, OpenOptions(adapter.fixture.tower))


def test_a_whole_model_beside_an_adapter(adapter: Adapter) -> None:
    shutil.copy(adapter.base / "model.safetensors", adapter.folder)
    adapter.message("model.safetensors", "adapter_config.json", "a folder of its own")


# A wrong --base


def test_a_base_for_a_whole_checkpoint(
    adapter: Adapter, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(
        capsys, "export", adapter.base, "-o", adapter.folder / "x", "--base", adapter.base
    )
    assert "not an adapter" in line and "leave --base" in line


def test_a_base_that_is_not_there_or_an_adapter_itself(adapter: Adapter) -> None:
    adapter.message("no such folder", "--base", base=adapter.folder / "none")
    adapter.message("--base is a LoRA adapter itself", base=LORA / "rslora")


def test_a_base_of_another_shape(adapter: Adapter, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter.base, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-8].copy()
    save_file(tensors, folder / "model.safetensors")
    adapter.message(name, "[184, 64]", "[192, 4]", "another model", base=folder)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    adapter.message(name, "does not have", "another model", base=folder)


def test_delta_weights_of_another_base(adapter: Adapter, tmp_path: Path) -> None:
    delta, base = (shutil.copytree(adapter.base, tmp_path / name) for name in ("delta", "base"))
    tensors = load_file(delta / "model.safetensors")
    save_file({k: v * np.float16(0.01) for k, v in tensors.items()}, delta / "model.safetensors")
    options = OpenOptions(adapter.fixture.tower, base=base)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-8].copy()
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.norm.weight'.*another model"):
        open_checkpoint(delta, options)
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is missing.*another model"):
        open_checkpoint(delta, options)


# adapter_config.json


@pytest.mark.parametrize(
    "kind", ["IA3", "PREFIX_TUNING", "LOHA", "ADALORA", "VERA", None, 3, "x" * 5000], ids=str
)
def test_other_kinds_of_adapters_are_refused_by_name(kind: Any, adapter: Adapter) -> None:
    adapter.set(peft_type=kind)
    adapter.message("peft_type", repr(kind)[:20], "merge_and_unload")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("trainable_token_indices", [5, 6]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"router_temperature": 1.0}),
        ("ensure_weight_tying", True),
        ("invented_by_a_later_version", 0.5),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", ["gaussian"]),
    ],
)
def test_variants_that_change_the_arithmetic_are_refused_by_name(
    key: str, value: Any, adapter: Adapter
) -> None:
    adapter.set(**{key: value})
    adapter.message(key, "merge_and_unload")


@pytest.mark.parametrize("value", [None, False, [], {}])
def test_variants_that_are_switched_off_are_not(value: Any, adapter: Adapter) -> None:
    adapter.set(invented_by_a_later_version=value, init_lora_weights="gaussian")
    adapter.open()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", "4"),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", [8]),
        ("lora_alpha", 1e300),
        ("use_rslora", "yes"),
        ("use_dora", 1),
        ("fan_in_fan_out", "x"),
        ("lora_bias", 2),
        ("bias", "some"),
        ("modules_to_save", "mm_projector"),
        ("modules_to_save", [3]),
        ("rank_pattern", [4]),
        ("rank_pattern", {"q_proj": -1}),
        ("alpha_pattern", {"q_proj": "8"}),
    ],
)
def test_values_of_another_kind_name_the_key(key: str, value: Any, adapter: Adapter) -> None:
    adapter.set(**{key: value})
    inner = next(iter(value)) if isinstance(value, dict) else key
    adapter.message(str(adapter.config), inner, "expected")


@pytest.mark.parametrize(
    "pattern", ["(", "(a+)+", "(a|a)(a|a)", ".*.*.*.*", "a{2,}", "(?=x)", "x" * 300, "[", "", "a**"]
)
def test_patterns_that_could_take_for_ever_are_refused(pattern: str, adapter: Adapter) -> None:
    adapter.set(rank_pattern={pattern: 4})
    adapter.message("pattern", pattern[:20], "rank_pattern")


def test_a_rank_that_the_tensors_do_not_have(adapter: Adapter) -> None:
    adapter.set(r=5)
    adapter.message("lora_A", "[4, ", "rank is 5", "adapter_config.json")


def test_a_saved_module_without_its_tensors(adapter: Adapter) -> None:
    adapter.set(modules_to_save=["lm_head"])
    adapter.message("modules_to_save", "'lm_head'", "download")


# Tensors


def test_half_a_pair(adapter: Adapter) -> None:
    adapter.change(lambda tensors: tensors.pop(FIRST))
    adapter.message(FIRST.replace("lora_A", "lora_B"), "partner")


def test_two_adapters_in_one_file(adapter: Adapter) -> None:
    other = FIRST.replace(".weight", ".other.weight")
    adapter.change(lambda tensors: tensors.update({other: tensors[FIRST]}))
    adapter.message(FIRST, other, "one adapter")


@pytest.mark.parametrize("part", ["lora_magnitude_vector", "lora_E", "lora_ranknum"])
def test_tensors_of_other_variants(part: str, adapter: Adapter) -> None:
    name = f"base_model.model.model.layers.0.self_attn.q_proj.{part}"
    adapter.change(lambda tensors: tensors.update({name: np.zeros(4, np.float32)}))
    adapter.message(name, "merge_and_unload")


@pytest.mark.parametrize(
    "name", ["model.layers.9.mlp.up_proj.weight", "base_model.model.score.weight", "model.mm.bias"]
)
def test_a_tensor_that_nothing_reads_is_named(name: str, adapter: Adapter) -> None:
    adapter.change(lambda tensors: tensors.update({name: np.zeros(4, np.float32)}))
    adapter.message(name, "not read", "another model")
    path = adapter.folder / "non_lora_trainables.bin"
    shutil.copy(LORA / "llava" / adapter.weights.name, adapter.weights)
    torch.save(torch.load(path) | {name: torch.zeros(4)}, path)
    adapter.message(name, "not read", "another model")


@pytest.mark.parametrize("shape", [(), (4,), (4, 1), (4, 64, 1), (0, 64)])
def test_an_adapter_of_another_shape(shape: tuple[int, ...], adapter: Adapter) -> None:
    adapter.set(rank_pattern={}, alpha_pattern={}, r=4)
    tensors = {
        FIRST: np.zeros(shape, np.float32),
        FIRST.replace("_A", "_B"): np.zeros((64, 4), "f"),
    }
    save_file(tensors, adapter.weights)
    adapter.message("lora_A")


def test_values_that_are_not_finite_are_found_when_they_are_read(adapter: Adapter) -> None:
    adapter.change(lambda tensors: tensors.update({FIRST: tensors[FIRST] * np.float32(np.inf)}))
    weights = adapter.open().weights
    with pytest.raises(CheckpointError, match=r"q_proj.*not finite"):
        weights.read("decoder.layers.0.attn.q_proj.weight", (64, 64))


def test_files_that_are_missing_or_damaged(adapter: Adapter) -> None:
    adapter.weights.write_bytes(adapter.weights.read_bytes()[:100])
    adapter.message(str(adapter.weights), "damaged")
    adapter.weights.unlink()
    adapter.message("adapter_model.safetensors or adapter_model.bin", "missing")
    adapter.config.unlink()
    shutil.copy(LORA / "llava" / adapter.weights.name, adapter.weights)
    adapter.message(str(adapter.config), "missing")


def test_a_tensor_that_is_read_twice_is_changed_once(llava_v1: Fixture, tmp_path: Path) -> None:
    """A float32 pickle is mapped: what is read is a view of the file."""
    base = shutil.copytree(llava_v1.checkpoint, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    whole = {name: torch.from_numpy(value.astype(np.float32)) for name, value in tensors.items()}
    torch.save(whole, base / "pytorch_model.bin")
    weights = open_checkpoint(LORA / "rslora", OpenOptions(llava_v1.tower, base=base)).weights
    name = "decoder.layers.0.attn.q_proj.weight"
    first = weights.read(name, (64, 64)).copy()
    assert (weights.read(name, (64, 64)) == first).all()
    assert (first != whole["model.layers.0.self_attn.q_proj.weight"].numpy()).any()


# Exports


def test_export_of_an_adapter_is_that_of_the_merged_checkpoint(
    llava_v1: Fixture, tmp_path: Path
) -> None:
    """The same bytes, in both formats; the keys are the adapter's own."""
    options = {"vision_tower": llava_v1.tower, "measure": False, "recipe": "int4"}
    given: dict[str, Any] = {**options, "formats": ("onnx", "gguf")}
    ours, again, whole = (tmp_path / name for name in ("ours", "again", "whole"))
    adapter = LORA / "modules_to_save"
    first = mobilevlm.export(adapter, ours, base=llava_v1.checkpoint, **given)
    merged = shutil.copytree(llava_v1.checkpoint, tmp_path / adapter.name)
    model = open_checkpoint(adapter, OpenOptions(llava_v1.tower, base=llava_v1.checkpoint))
    files = model.weights._refs["decoder.norm.weight"].files
    save_file(
        {name: files.read(name) for name in load_file(merged / "model.safetensors")},
        merged / "model.safetensors",
    )
    second = mobilevlm.export(merged, whole, **given)
    mobilevlm.export(adapter, again, base=llava_v1.checkpoint, **given)
    trees = [tree_of(folder) for folder in (ours, again, whole)]
    assert trees[0] == trees[1]
    names = {part.stage for part in first.artifacts}
    assert {"decoder", "vision", "embeddings"} <= names
    assert all(
        trees[0][name] == content for name, content in trees[2].items() if name != "manifest.json"
    )
    for here, there in zip(first.artifacts, second.artifacts, strict=True):
        assert here.key != there.key, here.path


def test_another_adapter_on_the_same_base_is_not_taken_over(
    llava_v1: Fixture, tmp_path: Path
) -> None:
    folder = shutil.copytree(LORA / "rslora", tmp_path / "adapter")
    config = folder / "adapter_config.json"
    bundle = tmp_path / "bundle"
    given: dict[str, Any] = {"vision_tower": llava_v1.tower, "measure": False, "recipe": "fp32"}
    first = mobilevlm.export(folder, bundle, base=llava_v1.checkpoint, **given)
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 5}))
    second = mobilevlm.export(folder, bundle, base=llava_v1.checkpoint, **given)
    keys = [{part.stage: part.key for part in each.artifacts} for each in (first, second)]
    assert keys[0]["decoder"] != keys[1]["decoder"]


def test_verbs_that_take_a_checkpoint_take_a_base(
    adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    given = [str(adapter.folder), "--base", str(adapter.base)]
    given += ["--vision-tower", str(adapter.fixture.tower)]
    main(["export", *given, "-o", str(bundle), "--recipe", "fp32", "--no-measure", "--quiet"])
    main(["inspect", *given, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["spec"]["name"] == "adapter"
    sample = {"image": str(adapter.fixture.image), "prompt": "What?", "answer": "A cat."}
    data = tmp_path / "samples.jsonl"
    data.write_text(json.dumps(sample))
    main(["verify", str(bundle), *given, "--data", str(data), "--json", "--quiet"])
    figures = json.loads(capsys.readouterr().out)["stages"]
    assert max(stage.get("kl", 0) for stage in figures.values()) < 1e-6
