"""Qwen3.5 beyond the one image of its reference data: states after a prompt, sequences that go back
into them, recipes, text alone, and older versions of onnxruntime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import FLOAT32, BundleOf, Fixture, fixture_named, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from test_hub_families import pieces_of

import mobilevlm
from mobilevlm.errors import BundleError
from mobilevlm.export.graph.reading import OnnxTensors
from mobilevlm.export.quantize.rotation import rotated
from mobilevlm.families import open_checkpoint
from mobilevlm.linear_groups import decoder_groups
from mobilevlm.preparation import prepare
from mobilevlm.reference import delta, load_reference
from mobilevlm.reference.steps import run_steps
from mobilevlm.runtime import VLM
from mobilevlm.runtime.engines.onnx import engine as engines
from mobilevlm.runtime.sequence.session import Fill


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return fixture_named("qwen3_5")


@pytest.fixture(scope="module")
def exact(bundle_of: BundleOf) -> Iterator[VLM]:
    with mobilevlm.load(bundle_of("qwen3_5", "fp32")) as vlm:
        yield vlm


def test_a_prompt_ends_in_the_official_states(
    fixture: Fixture, exact: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The official convolution keeps one input more than it reads."""
    inputs = fixture.arrays["conv_state"][..., 1:].transpose(0, 2, 1)
    states, made = fixture.arrays["recurrent_state"], []
    rule = delta.delta_rule

    def watched(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found, state = rule(*given)
        made.append(state.numpy())
        return found, state

    monkeypatch.setattr(delta, "delta_rule", watched)
    with torch.no_grad():
        reference = load_reference(fixture.model)
        images = [prepare(fixture.image, fixture.model.spec.image)]
        rows = [reference.see(image) for image in images]
        run_steps(reference.decoder_steps(), reference.prompt(pieces_of(fixture, images), rows))
    assert relative_error(np.stack(made), states) <= FLOAT32
    session = exact.new_session()
    session.fill(exact._prepare(fixture.templated_prompt, [fixture.image], raw=True), Fill())
    carried = session._state._carried.past()  # type: ignore[attr-defined]
    for place, layer in enumerate(fixture.arrays["linear_layers"]):
        found = carried[f"past_recurrent.{layer}.state"][0]
        assert relative_error(found, states[place]) <= 1e-4
        found = carried[f"past_recurrent.{layer}.conv"][0]
        assert relative_error(found, inputs[place]) <= 1e-4


def test_going_back_into_a_recurrent_state_gives_the_logits_of_a_fresh_sequence(
    fixture: Fixture, exact: VLM
) -> None:
    """Prompts that share less and less with the one before, each followed by an answer that the
    next goes back behind."""
    whole = Image.open(fixture.image).convert("RGB")
    first, second = (whole.resize(size, Image.Resampling.BOX) for size in ((96, 64), (64, 160)))
    prompts = [
        ("<image> What is in it, and why?", [first], 0),
        ("<image> What is in it, and how?", [first], 1),
        ("<image> Who?", [first], 1),
        ("<image> What is in it, and why?", [second], 0),
        ("Who are you?", [], 0),
        ("<image> What is in it, and why?", [first], 1),
    ]
    session, fresh = exact.new_session(), exact.new_session(reuse_prefix=False)
    for text, images, has_image in prompts:
        prompt, note = exact._prepare(text, images, raw=False), Fill()
        found = session.fill(prompt, note).copy()
        assert np.array_equal(found, fresh.fill(prompt, Fill())), text
        assert (note.reused_tokens > 5) == bool(has_image), text
        assert not session.can_draft
        for _ in range(4):
            token = int(found.argmax())
            found = session.step(token).copy()
            assert np.array_equal(found, fresh.step(token)), text


def test_a_conversation_goes_on_from_its_state(exact: VLM) -> None:
    prompt = exact._prepare("Who?", [], raw=False)
    session, note = exact.new_session(), Fill()
    longer = exact._prepare("Who?", [], raw=False)
    longer.pieces.extend([40, 41])
    session.fill(prompt, Fill())
    logits = session.fill(longer, note)
    assert note.reused_tokens == len(prompt.pieces)
    expected = exact.new_session(reuse_prefix=False).fill(longer, Fill())
    assert relative_error(logits, expected) <= FLOAT32


def test_an_int8_bundle_has_its_figures_and_float_gates(
    fixture: Fixture, bundle_of: BundleOf
) -> None:
    bundle = bundle_of("qwen3_5", "int8", True)
    manifest = json.loads((Path(bundle) / "manifest.json").read_text())
    stages = manifest["quality"]["stages"]
    assert stages["vision"]["figures"]["cosine"] > 0.99
    assert stages["decoder"]["figures"]["kl"] < 0.4  # 0.27: random weights between gates
    [path] = [part["path"] for part in manifest["artifacts"] if part["stage"] == "decoder"]
    model = fixture.model
    turned = rotated(model.weights, model.spec)
    stored = OnnxTensors(Path(bundle) / path, model.spec, model.weights)
    errors = {}
    for group in decoder_groups(model.spec.decoder):
        for layer in group.layers if ".delta." in group.name else ():
            shape = layer.out_size, layer.in_size
            exact = np.asarray(turned.read(f"{layer.name}.weight", shape))
            errors[layer.name] = relative_error(stored.read(f"{layer.name}.weight"), exact)
    assert len(errors) == 3 * 4 and all(1e-4 < error < 0.02 for error in errors.values())
    assert not any("b_proj" in name or "a_proj" in name for name in stored.names)


def test_keys_and_values_in_bytes_leave_the_states_as_they_are(
    fixture: Fixture, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    mobilevlm.export(fixture.checkpoint, bundle, recipe="fp32", kv_cache="int8", measure=False)
    with mobilevlm.load(bundle) as vlm:
        found = vlm.prompt_logits(fixture.templated_prompt, [fixture.image], raw=True)
    assert 1e-5 < relative_error(found, fixture.logits) < 0.1


def test_the_language_model_alone_is_read(fixture: Fixture, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(fixture.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    text = {**config["text_config"], "architectures": ["Qwen3_5ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(text))
    tensors = load_file(folder / "model.safetensors")
    alone = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in tensors.items()
        if ".visual." not in name
    }
    save_file(alone, folder / "model.safetensors")
    model = open_checkpoint(folder)
    assert model.spec.family == "language" and not model.spec.has_images
    assert model.spec.decoder == fixture.model.spec.decoder


def test_an_older_onnxruntime_is_refused_in_one_line(
    bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(*_: object) -> None:
        raise RuntimeError("Fatal error: com.microsoft:LinearAttention(-1) is not a registered")

    monkeypatch.setattr(engines, "Session", lacks)
    monkeypatch.setattr(ort, "__version__", "1.24.4")
    bundle, message = bundle_of("qwen3_5", "fp32"), "layers need onnxruntime 1.25, this is 1.24.4"
    with pytest.raises(BundleError, match=message), mobilevlm.load(bundle) as vlm:
        vlm.generate("Who?", max_new_tokens=1)
