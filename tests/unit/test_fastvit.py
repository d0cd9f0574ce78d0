"""FastViTHD in what knows only steps and linear layers: calibration, folds, effects of layers, the
roofline, the memory estimate, and manifests that contradict themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from comparison.roofline import tower_operations
from conftest import BundleOf, fixture_named, relative_error
from torch import Tensor, nn

from mobilevlm.bundle import open_bundle
from mobilevlm.bundle_checks import check_manifest
from mobilevlm.checkpoint import Rescaling, TensorRef
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.export.calibration.encoder_layers import watch_encoder
from mobilevlm.export.calibration.samples import scene_samples
from mobilevlm.export.calibration.stages import calibrate
from mobilevlm.export.fixed_shapes.vision import author_qdq
from mobilevlm.export.graph.author import author_encoded
from mobilevlm.export.graph.dialects import CENTRED, CPU, ELEMENTARY, STANDARD, Dialect
from mobilevlm.export.graph.reading import OnnxTensors
from mobilevlm.export.quality.layer_effects import layer_effects, state_errors
from mobilevlm.export.quantize.folding import find_folds, fold
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.families.fastvit import TOWERS
from mobilevlm.image_encoder import ConvEncoder, TransformerEncoder
from mobilevlm.input_spec import FixedImage, InputSpec
from mobilevlm.linear_groups import tower_groups
from mobilevlm.model import Model
from mobilevlm.plain_types import from_dict, to_dict
from mobilevlm.plan import Plan
from mobilevlm.preparation import prepare
from mobilevlm.recipe import LinearFormat
from mobilevlm.reference import load_reference
from mobilevlm.reference.fastvit import FastVit, MapAttention
from mobilevlm.runtime.memory.estimate import estimate
from mobilevlm.spec import with_image

SAMPLES = scene_samples(3)
FIXTURE = fixture_named("fast_vlm")


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Model:
    return FIXTURE.model


@pytest.fixture(scope="module")
def tower(model: Model) -> ConvEncoder:
    assert isinstance(model.spec.image.encoder, ConvEncoder)
    return model.spec.image.encoder


def features(model: Model) -> np.ndarray:
    pixels = prepare(FIXTURE.image, model.spec.image).arrays[0]["pixels"]
    found: np.ndarray = load_reference(model).features(pixels).numpy()
    return found


@pytest.mark.parametrize("spec", [FIXTURE.model.spec.image.encoder, *TOWERS.values()])
def test_its_linear_groups_are_the_linear_layers_of_the_reference(spec: ConvEncoder) -> None:
    with torch.device("meta"):
        reference = FastVit(spec)
    modules = {f"vision.{name}": module for name, module in reference.named_modules()}
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    found = {}
    for group in tower_groups(spec):
        for name, shape in group.shapes.items():
            assert (linear[name].bias is not None) == group.biased
            found[name] = shape
    assert found == {name: tuple(module.weight.shape) for name, module in linear.items()}


def test_the_published_tower_has_256_features_of_3072_channels() -> None:
    spec = TOWERS["fastvit_mci3"]
    assert (spec.hidden_size, spec.grid, spec.num_features, spec.stride) == (3072, 16, 256, 64)
    assert (spec.squeeze_size, spec.mlp_size(2), spec.stage_grid(0)) == (192, 1536, 256)
    # The stem's map is the largest: 256 × 256 × 96, as 2048 vectors of 3072.
    assert spec.num_positions == 2048


def test_the_roofline_counts_what_the_reference_multiplies(tower: ConvEncoder) -> None:
    found = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal found
        if isinstance(module, nn.Conv2d):
            found += 2 * output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            found += 2 * output.numel() * module.weight.shape[1]
        elif isinstance(module, MapAttention):
            _, length, width = inputs[0].shape
            found += 4 * length * length * width

    reference = FastVit(tower)
    for module in reference.modules():
        module.register_forward_hook(count)
    reference(torch.zeros(1, 3, tower.image_size, tower.image_size))
    assert tower_operations(tower) == found


def test_calibration_sees_the_inputs_of_every_linear_layer_of_the_tower(
    model: Model, tower: ConvEncoder
) -> None:
    blocks = list(watch_encoder(model, SAMPLES, lambda name: name.startswith("vision."), True))
    found = {name: statistics for block in blocks for name, statistics in block.items()}
    images = sum(len(sample.images) for sample in SAMPLES)
    for group in tower_groups(tower):
        for name in group.names:
            statistics = found[name]
            assert statistics.hessian is not None
            assert statistics.hessian.shape == (group.in_size, group.in_size)
    grid = tower.stage_grid(2)
    assert found["vision.stages.2.blocks.1.mlp.fc1"].count == images * grid * grid
    assert found["vision.expansion.squeeze"].count == images


def test_folds_leave_the_function_as_it_was(model: Model) -> None:
    folds = [item for item in find_folds(model.spec) if item.producer.startswith("vision.")]
    producers = {item.producer for item in folds}
    assert "vision.stages.0.blocks.0.mlp.conv" in producers
    assert {f"vision.stages.4.blocks.0.{name}" for name in ("norm", "attn.v_proj")} <= producers
    random = np.random.default_rng(0)
    factors = {item: random.uniform(0.25, 4, item.in_size).astype(np.float32) for item in folds}
    changed = replace(model, weights=fold(model.weights, factors))
    assert relative_error(features(changed), features(model)) <= 1e-5


def test_a_calibrated_recipe_makes_a_graph_whose_weights_are_read_back(
    model: Model, tmp_path: Path
) -> None:
    layers = LinearFormat("q8", scaling="awq", quantizer="gptq")
    recipe = replace(RECIPES["int8"], tower=layers)
    ready = calibrate(model, recipe, SAMPLES, "vision")
    author_encoded(
        ready.weights, model.spec, recipe, tmp_path / "vision.onnx", hessian=ready.hessian
    )
    stored = OnnxTensors(tmp_path / "vision.onnx", model.spec, model.weights)
    assert {name for name in model.weights if name.startswith("vision.stages.")} <= {*stored.names}
    assert "vision.stem.conv.weight" not in stored  # the pixels' scale is in it
    refs = {name: TensorRef(stored, name) for name in stored.names}
    rounded = replace(model, weights=model.weights.replaced(refs))
    # 8 bits in blocks: less than a hundredth; a fold read on one side only would be far off.
    assert 0 < relative_error(features(rounded), features(model)) <= 0.01


@pytest.mark.parametrize(
    "dialect",
    [CPU, STANDARD, CENTRED, ELEMENTARY],
    ids=["cpu", "standard", "centred", "elementary"],
)
def test_its_graph_gives_the_features_of_the_reference_whatever_the_pixels_mean(
    model: Model, dialect: Dialect, tmp_path: Path
) -> None:
    """The border of zeros is added after the mean is taken away."""
    square = replace(model.spec.image.square, mean=(0.48, 0.4, 0.3), std=(0.27, 0.3, 0.2))
    other = replace(model, spec=with_image(model.spec, preparation=square))
    author_encoded(
        other.weights, other.spec, RECIPES["fp32"], tmp_path / "vision.onnx", dialect=dialect
    )
    pixels = prepare(FIXTURE.image, other.spec.image).arrays[0]["pixels"]
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx")
    [found] = session.run(["features"], {"pixels": pixels[None]})
    assert relative_error(found[0], features(other)) <= 1e-5


def test_in_fixed_point_it_stays_near_the_official_features(
    tmp_path: Path,
) -> None:
    """Measured on this image: 0.037 of visual tokens, below 0.03 of features."""
    recipe = RECIPES["a16w8"]
    author_qdq(SAMPLES, FIXTURE.model.weights, FIXTURE.model.spec, recipe, tmp_path / "v.onnx")
    pixels = prepare(FIXTURE.image, FIXTURE.model.spec.image).arrays[0]["pixels"]
    session = onnxruntime.InferenceSession(tmp_path / "v.onnx")
    tokens, found = session.run(["visual_tokens", "features"], {"pixels": pixels[None]})
    arrays = FIXTURE.arrays
    assert relative_error(found, arrays["vision_features"]) <= 0.03
    assert relative_error(tokens, arrays["projector_output"]) <= 0.045


def test_effects_and_errors_of_states_name_the_tower_s_blocks(model: Model) -> None:
    name = "vision.stages.2.blocks.1.mlp.fc2"
    factor = Rescaling(rows=np.full(32, 1.25, np.float32))
    stored = model.weights.changed({f"{name}.weight": factor})
    effects = {item.label: item for item in layer_effects(model, stored, SAMPLES, everything=True)}
    assert effects[name].weight_error == pytest.approx(0.25)
    effect = effects[name].effect
    assert effect is not None and effect.visual_error is not None and effect.visual_error > 0
    errors = {item.layer: item.error for item in state_errors(model, stored, SAMPLES)}
    assert errors["vision.stages.2.blocks.0"] == 0 < errors["vision.stages.2.blocks.1"]


def test_the_memory_estimate_is_that_of_the_stage_with_the_largest_maps(
    bundle_of: BundleOf, tower: ConvEncoder
) -> None:
    manifest = open_bundle(bundle_of("fast_vlm", "fp32")).manifest
    small = estimate(manifest, Plan("onnx")).working
    wider = replace(tower, mlp_ratios=(4, *tower.mlp_ratios[1:]))
    large = estimate(replace(manifest, spec=with_image(manifest.spec, encoder=wider)), Plan("onnx"))
    assert large.working - small == 4 * 48 * 48 * 5 * 2 * 8


def test_an_encoder_without_a_kind_is_a_transformer(model: Model) -> None:
    """Manifests of bundles that are older than convolutional encoders."""
    image = fixture_named("llava_v1").model.spec.image
    data = to_dict(image)
    del data["encoder"]["kind"]
    assert from_dict(InputSpec, data, "image") == image
    assert isinstance(image.encoder, TransformerEncoder)
    conv = model.spec.image
    assert from_dict(InputSpec, to_dict(conv), "image") == conv
    data = to_dict(conv)
    data["encoder"]["kind"] = "recurrent"
    with pytest.raises(MobileVLMError, match="expected the kind 'transformer' or 'conv'"):
        from_dict(InputSpec, data, "image")
    with pytest.raises(MobileVLMError, match="needs a vision transformer"):
        _ = conv.transformer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": ()}, "widths"),
        ({"widths": (8,) * 40}, "1 to 16 stages"),
        ({"depths": (1, 2, 2, 1)}, "depths"),
        ({"depths": (1, 2, 2, 1, 10**6)}, "depths"),
        ({"mlp_ratios": (2, 2, 2, 2, 0)}, "mlp_ratios"),
        ({"mlp_ratios": (2, 2, 2, 2, 10**6)}, "number of weights"),
        ({"image_size": 200}, "image_size"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": 48}, "widths"),
        ({"expansion": 0}, "expansion"),
        ({"squeeze_ratio": 1000}, "squeeze_ratio"),
        ({"attention_stages": (4, 3)}, "attention_stages"),
        ({"attention_stages": (5,)}, "attention_stages"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
        ({"widths": (8, 20, 32, 64, 128)}, "widths"),
    ],
    ids=str,
)
def test_a_manifest_whose_tower_contradicts_itself_is_one_line(
    changes: dict[str, Any], message: str, bundle_of: BundleOf, tower: ConvEncoder
) -> None:
    bundle = bundle_of("fast_vlm", "fp32")
    manifest = open_bundle(bundle).manifest
    spec = with_image(manifest.spec, encoder=replace(tower, **changes))
    if "image_size" in changes:
        square = spec.image.preparation
        assert isinstance(square, FixedImage)
        spec = with_image(spec, preparation=replace(square, size=200, shortest_edge=200))
    with pytest.raises(BundleError) as caught:
        check_manifest(replace(manifest, spec=spec), bundle)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
