"""A convolutional image encoder that only has a spec, steps and shapes of its own: streaming,
statistics of activations, sensitivity and layer effects take it as they take CLIP's."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Fixture
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

import mobilevlm.linear_groups
from mobilevlm.checkpoint import Rescaling, TensorFiles, TensorRef
from mobilevlm.export.calibration.reference_states import (
    decoder_states,
    exact_images,
    image_states,
)
from mobilevlm.export.calibration.samples import Sample, sample_arrays, scene_samples
from mobilevlm.export.quality.layer_effects import layer_effects, state_errors
from mobilevlm.export.quality.sensitivity import Change, Probe
from mobilevlm.export.quantize.errors import stacked
from mobilevlm.linear_groups import LinearGroup, linear_groups
from mobilevlm.model import Model
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.reference import model as reference_model
from mobilevlm.reference.steps import Step, Stepped
from mobilevlm.reference.streaming import stream_steps
from mobilevlm.spec import with_image

SAMPLES = [*scene_samples(3), Sample("Hello", "", ())]
LINEARS = {"vision.stages.0.pointwise": (32, 48), "vision.stages.1.pointwise": (48, 64)}
"""Input and output size of each."""


@dataclass(frozen=True)
class ConvEncoder:
    """Sizes between the stages."""

    sizes: tuple[int, ...] = (32, 48, 64)
    num_positions: int = 24 * 24


class Stage(nn.Module):
    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_size, in_size, 3, padding=1, groups=in_size)
        self.pointwise = nn.Linear(in_size, out_size)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = hidden + self.depthwise(hidden).relu()
        rows: Tensor = self.pointwise(mixed.movedim(1, -1))
        return rows.movedim(-1, 1)


class ConvTower(Stepped):
    def __init__(self, spec: ConvEncoder) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(spec.sizes[-1]))
        self.stem = nn.Conv2d(3, spec.sizes[0], 14, stride=14)
        sizes = zip(spec.sizes, spec.sizes[1:], strict=False)
        self.stages = nn.ModuleList(Stage(*pair) for pair in sizes)
        self.norm = nn.LayerNorm(spec.sizes[-1])

    def steps(self) -> Iterator[Step]:
        yield Step.of("stem", self.stem)
        for index, stage in enumerate(self.stages):
            yield Step.of(f"stages.{index}", stage)
        yield Step.of("norm", self.norm, self._rows)

    def _rows(self, hidden: Tensor) -> Tensor:
        rows: Tensor = self.norm(hidden.flatten(2).transpose(1, 2))
        return rows * self.scale


@pytest.fixture
def model(mobilevlm_v2: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A fixture's model with a convolutional encoder of random weights instead of CLIP's."""

    def groups(_: ConvEncoder) -> Iterator[LinearGroup]:
        for name, (in_size, out_size) in LINEARS.items():
            yield LinearGroup((name,), in_size, (out_size,), True)

    monkeypatch.setitem(reference_model.ENCODERS, ConvEncoder, ConvTower)
    monkeypatch.setattr(mobilevlm.linear_groups, "tower_groups", groups)
    torch.manual_seed(0)
    tensors = {
        f"vision.{name}": value for name, value in ConvTower(ConvEncoder()).state_dict().items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    found = mobilevlm_v2.model
    return replace(
        found,
        spec=with_image(found.spec, encoder=ConvEncoder()),
        weights=found.weights.replaced({name: TensorRef(files, name) for name in tensors}),
    )


def visual_tokens(reference: ReferenceModel, model: Model) -> list[Tensor]:
    """Return the visual tokens of each image, each in a pass of its own."""
    with torch.no_grad():
        return [reference.visual_tokens(**arrays) for arrays in sample_arrays(model, SAMPLES)]


def changed(model: Model, name: str) -> NDArray[np.float32]:
    [group] = [group for group in linear_groups(model.spec) if group.name == name]
    return stacked(model.weights, group) * np.float32(1.25)


def test_a_streamed_pass_is_the_whole_model_and_reads_each_weight_once(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = visual_tokens(load_reference(model), model)
    read: Counter[str] = Counter()
    original = type(model.weights).read

    def counted(self: Any, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        read[name] += 1
        return original(self, name, shape)

    monkeypatch.setattr(type(model.weights), "read", counted)
    reference = load_reference(model, streamed=True)
    assert set(read) == {"vision.scale"}  # a parameter outside of all steps
    streamed = [rows.tokens for _, rows in exact_images(model, reference, SAMPLES)]
    assert len(whole) > 1
    assert all(torch.equal(a, b) for a, b in zip(streamed, whole, strict=True))
    parameters = dict(reference.named_parameters())
    names = {name for name in parameters if name.startswith(("vision.", "projector."))}
    assert read == dict.fromkeys(names, 1)
    assert [name for name in names if not parameters[name].is_meta] == ["vision.scale"]


def test_a_stage_is_gone_when_the_next_is_at_work(model: Model) -> None:
    reference = load_reference(model, streamed=True)
    seen = []

    def note(*_: object) -> None:
        parameters = reference.named_parameters()
        loaded = {name.rpartition(".")[0] for name, value in parameters if not value.is_meta}
        seen.append({name.removesuffix(".depthwise").removesuffix(".pointwise") for name in loaded})

    for stage in reference.vision.stages:
        stage.pointwise.register_forward_pre_hook(note)
    stream_steps(reference.vision_steps(), image_states(model, reference, SAMPLES))
    first, second = ({"vision", f"vision.stages.{index}"} for index in range(2))
    assert seen == [first] * (len(seen) // 2) + [second] * (len(seen) // 2) and len(seen) >= 4


@pytest.mark.parametrize("name", LINEARS)
def test_a_change_in_a_stage_has_the_effect_of_whole_passes(model: Model, name: str) -> None:
    probe = Probe(model, SAMPLES)

    def changes(group: LinearGroup) -> list[Change]:
        return [Change("", changed(model, name))] if group.name == name else []

    [(_, _, effect)] = probe.effects(changes)
    reference = load_reference(model)
    exact = torch.cat(visual_tokens(reference, model))
    reference.get_parameter(f"{name}.weight").data *= 1.25
    found = torch.cat(visual_tokens(reference, model))
    assert effect.visual_error is not None
    assert effect.visual_error == pytest.approx(
        float((found - exact).norm() / exact.norm()), rel=1e-4
    )
    assert effect.visual_error > 1e-3 and effect.kl > 0


def test_layer_effects_and_errors_of_states_name_its_stages(model: Model) -> None:
    first, second = LINEARS
    factor = Rescaling(np.full(64, 1.25, np.float32))
    stored = model.weights.changed({f"{second}.weight": factor})
    effects = {item.label: item for item in layer_effects(model, stored, SAMPLES, everything=True)}
    assert effects[first].weight_error == 0 and effects[first].effect is None
    assert effects[second].weight_error == pytest.approx(0.25) and effects[second].is_vision
    effect = effects[second].effect
    assert effect is not None and (effect.visual_error or 0) > 0
    errors = {item.layer: item.error for item in state_errors(model, stored, SAMPLES)}
    stages = [name.removesuffix(".pointwise") for name in LINEARS]
    layers = [f"decoder.layers.{index}" for index in range(model.spec.decoder.num_hidden_layers)]
    assert list(errors) == [*stages, *layers]
    assert errors[stages[0]] == 0 < errors[stages[1]]


def test_the_decoder_reads_its_visual_tokens(model: Model) -> None:
    reference = load_reference(model, streamed=True)
    rows = torch.cat(visual_tokens(load_reference(model), model))
    states = decoder_states(model, reference, SAMPLES)
    hidden = torch.cat([state.hidden[0] for state in states])
    assert all((hidden == row).all(-1).any() for row in rows[::37])


def test_loading_the_reference_does_not_import_torchs_compiler() -> None:
    """Half a dozen seconds, for random weights of modules that read theirs later."""
    code = (
        "import sys\n"
        "from mobilevlm.builtin import WEIGHTS\n"
        "from mobilevlm.families import open_checkpoint\n"
        "from mobilevlm.reference import load_reference\n"
        "load_reference(open_checkpoint(WEIGHTS / 'nano'), streamed=True)\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
