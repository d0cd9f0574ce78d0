"""The authored ONNX graphs through plain ONNX Runtime: fp32 against the official arrays, variants
that no fixture has against the torch reference, KV buffers against themselves."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import (
    FAMILY_FIXTURES,
    FIXTURES,
    FLOAT32,
    MOE_FIXTURES,
    PLAIN_INT4,
    Fixture,
    fixture_named,
    memory_weights,
    relative_error,
)
from numpy.typing import NDArray

from mobilevlm.checkpoint import Weights
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.decoder_spec import DecoderSpec, ExpertsSpec
from mobilevlm.export.graph.author import author_decoder, author_embeddings, author_encoded
from mobilevlm.export.graph.dialects import CENTRED, ELEMENTARY, STANDARD, Dialect
from mobilevlm.export.quantize.gptq import no_hessian
from mobilevlm.export.recipes.layer_formats import restored
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import FixedImage
from mobilevlm.model import Model
from mobilevlm.preparation import prepare
from mobilevlm.recipe import LinearFormat, Recipe
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.spec import ModelSpec, with_image

Array = NDArray[np.float32]
Experts = Literal["fused", "plain"]
CAPACITY = 768
"""Positions in the KV buffers: more than the longest fixture prompt, 658."""


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Decoder:
    """A decoder graph with KV buffers bound as past and present at once."""

    session: onnxruntime.InferenceSession
    buffers: dict[str, onnxruntime.OrtValue]

    def step(self, embeds: Array, start: int) -> Array:
        """Embeddings ``(length, hidden_size)`` at positions ``start …`` to logits of each."""
        length = len(embeds)
        binding = self.session.io_binding()
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds[None]))
        binding.bind_cpu_input("total_length", np.array([start + length], np.int32))
        binding.bind_cpu_input("logits_positions", np.arange(length))
        known = {item.name for item in self.session.get_inputs()}
        if "window_length" in known:  # windows are as long as the other buffers here
            binding.bind_cpu_input("window_length", np.array([start + length], np.int32))
        for name in known & {"image_rows", "image_ends"}:
            binding.bind_cpu_input(name, np.empty(0, np.int64))
        binding.bind_output("logits")
        for name, value in self.buffers.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        self.session.run_with_iobinding(binding)
        logits: Array = binding.get_outputs()[0].numpy()[0]
        return logits


def open_decoder(path: Path, spec: DecoderSpec) -> Decoder:
    shape = (1, spec.num_key_value_heads, CAPACITY, spec.cache_head_dim)
    # Filled with a large number: whatever is read beyond total_length shows.
    buffers = {
        f"{index}.{part}": onnxruntime.OrtValue.ortvalue_from_numpy(np.full(shape, 1e3, np.float32))
        for index in range(spec.num_hidden_layers)
        for part in ("key", "value")
    }
    return Decoder(open_session(path), buffers)


def run_vision(
    path: Path, pixels: NDArray[np.uint8], **further: NDArray[Any]
) -> tuple[Array, Array]:
    """Visual tokens and features."""
    inputs = {name: array[None] for name, array in {"pixels": pixels, **further}.items()}
    tokens, features = open_session(path).run(["visual_tokens", "features"], inputs)
    return tokens[0], features[0]


def kullback_leibler(logits: Array, expected: Array) -> float:
    """Mean over positions of KL(expected ‖ found), in nats."""
    found = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    wanted = torch.log_softmax(torch.from_numpy(expected).double(), -1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@dataclass(frozen=True)
class Authored:
    """The graphs of one fixture at one recipe."""

    fixture: Fixture
    recipe: Recipe
    folder: Path

    @property
    def model(self) -> Model:
        return self.fixture.model

    def vision(self) -> tuple[Array, Array]:
        pixels = prepare(self.fixture.image, self.model.spec.image).arrays[0]["pixels"]
        return run_vision(self.folder / "vision.onnx", pixels, **self.fixture.further)

    def logits(self) -> Array:
        decoder = open_decoder(self.folder / "decoder.onnx", self.model.spec.decoder)
        return decoder.step(self.fixture.arrays["inputs_embeds"][0], 0)


SMALL_BLOCKS = PLAIN_INT4
"""Blocks of 32, rounded to nearest: the integers of llama.cpp's Q4_0."""
_INT8, _HQQ = LinearFormat("int8"), LinearFormat("q4", "hqq", block_size=128)
QUANTIZED = {
    "fp16-weights": RECIPES["fp16-weights"],
    "int8": replace(PLAIN_INT4, decoder=_INT8, lm_head=_INT8),
    "hqq": replace(PLAIN_INT4, decoder=_HQQ, lm_head=_HQQ),
    "q4": SMALL_BLOCKS,
}


def author(
    fixture: Fixture, recipe: str | Recipe, folder: Path, experts: Experts = "fused"
) -> Authored:
    model = fixture.model
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    settings = replace(recipe, experts=experts)
    author_encoded(model.weights, model.spec, settings, folder / "vision.onnx")
    author_decoder(model.weights, model.spec, settings, folder / "decoder.onnx")
    author_embeddings(model.weights, model.spec, settings, folder / "embeddings.onnx")
    return Authored(fixture, settings, folder)


@pytest.fixture(scope="module")
def fixture(any_fixture: Fixture) -> Fixture:
    return any_fixture


@pytest.fixture(
    scope="module",
    params=[
        *((name, "fused") for name in (*FIXTURES, *MOE_FIXTURES, *FAMILY_FIXTURES)),
        *((name, "plain") for name in MOE_FIXTURES),
    ],
    ids=lambda case: "-".join(case),
)
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Authored:
    """The float32 graphs of each fixture, experts in both forms."""
    name, experts = request.param
    return author(fixture_named(name), "fp32", tmp_path_factory.mktemp(name), experts)


# Limits of the float32 graphs: as for the torch reference (test_reference.py).


@pytest.mark.parametrize(
    "dialect", [STANDARD, CENTRED, ELEMENTARY], ids=["standard", "centred", "elementary"]
)
def test_the_vision_graph_in_standard_operators_gives_the_same(
    exact: Authored, dialect: Dialect, tmp_path: Path
) -> None:
    model = exact.model
    path = tmp_path / "vision.onnx"
    author_encoded(model.weights, model.spec, exact.recipe, path, dialect=dialect)
    assert {node.domain for node in ir.load(path).graph} == {""}
    pixels = prepare(exact.fixture.image, model.spec.image).arrays[0]["pixels"]
    # Float32 sums in another order.
    outputs = run_vision(path, pixels, **exact.fixture.further)
    for found, expected in zip(outputs, exact.vision(), strict=True):
        assert relative_error(found, expected) <= 1e-5


def test_fp32_vision_graph_gives_the_official_features_and_visual_tokens(exact: Authored) -> None:
    tokens, features = exact.vision()
    arrays = exact.fixture.arrays
    assert relative_error(features, arrays["vision_features"][0]) <= FLOAT32
    assert relative_error(tokens, arrays["projector_output"][0]) <= FLOAT32


def test_fp32_decoder_graph_gives_the_official_logits(exact: Authored) -> None:
    logits, expected = exact.logits(), exact.fixture.logits
    assert relative_error(logits, expected) <= FLOAT32
    assert (logits.argmax(-1) == expected.argmax(-1)).all()


def test_fp32_graphs_answer_with_the_official_greedy_tokens(exact: Authored) -> None:
    arrays = exact.fixture.arrays
    embed = open_session(exact.folder / "embeddings.onnx")
    decoder = open_decoder(exact.folder / "decoder.onnx", exact.model.spec.decoder)
    embeds, tokens, start = arrays["inputs_embeds"][0], [], 0
    dropped = "logits_nodrop" in arrays  # and so are other tokens in what those logits follow
    for expected in arrays["step_logits"]:
        logits = decoder.step(embeds, start)[-1]
        assert dropped or relative_error(logits, expected) <= FLOAT32
        tokens.append(int(logits.argmax()))
        start += len(embeds)
        embeds = embed.run(None, {"input_ids": np.array([tokens[-1:]])})[0][0]
    assert tokens == exact.fixture.generated_ids


def test_embedding_graph_gives_the_rows_of_the_table(exact: Authored, tmp_path: Path) -> None:
    ids = exact.fixture.arrays["input_ids"][0]
    decoder = exact.model.spec.decoder
    ids = ids[(ids >= 0) & (ids < decoder.vocab_size)]
    shape = (decoder.vocab_size, decoder.hidden_size)
    rows = exact.model.weights.read("decoder.embed_tokens.weight", shape)[ids]
    session = open_session(exact.folder / "embeddings.onnx")
    assert np.array_equal(session.run(None, {"input_ids": ids[None]})[0][0], rows)
    # Stored as float16 the table stays exact: the fixtures' weights are float16.
    half = PLAIN_INT4
    author_embeddings(exact.model.weights, exact.model.spec, half, tmp_path / "half.onnx")
    session = open_session(tmp_path / "half.onnx")
    assert np.array_equal(session.run(None, {"input_ids": ids[None]})[0][0], rows)


# Relative error of visual tokens and of logits, and KL of the logits. Measured (largest): on the
# five dense fixtures fp16-weights 3e-6, 8e-7, 2e-12, since they are stored in float16 already; int8
# 0.042, 0.067, 0.013; q4 0.042, 0.33, 0.30; hqq 0.042, 0.33, 0.31. On the three sparse ones, where
# up to a quarter of the tokens then choose another expert, int8 0.034, 0.113, 0.014; q4 0.034,
# 0.55, 0.33; hqq 0.034, 0.61, 0.39. On the other families int8 0.063 (a tower and a Q-Former of
# four layers), 0.103, 0.012; q4 0.063, 0.57 (VILA's four layers), 0.36; hqq 0.063, 0.60, 0.41.
# Gaussian weights lose 9% in every 4-bit product, trained ones
# less. The limits leave a quarter for other processors; that the error is rounding and nothing else
# is what the next test shows.
LIMITS = {
    ("fp16-weights", "dense"): (1e-4, 1e-4, 1e-6),
    ("fp16-weights", "sparse"): (1e-4, 1e-4, 1e-6),
    ("int8", "dense"): (0.055, 0.085, 0.02),
    ("fp16-weights", "family"): (1e-4, 1e-4, 1e-6),
    ("int8", "sparse"): (0.055, 0.14, 0.02),
    ("int8", "family"): (0.08, 0.13, 0.02),
    ("q4", "dense"): (0.055, 0.42, 0.40),
    ("q4", "sparse"): (0.055, 0.69, 0.41),
    ("q4", "family"): (0.08, 0.71, 0.45),
    ("hqq", "dense"): (0.055, 0.42, 0.40),
    ("hqq", "sparse"): (0.055, 0.76, 0.49),
    ("hqq", "family"): (0.08, 0.75, 0.51),
}


def kind_of(fixture: Fixture) -> str:
    if fixture.name in FAMILY_FIXTURES:
        return "family"
    return "sparse" if fixture.name in MOE_FIXTURES else "dense"


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_quantized_graphs_stay_near_the_official_values(
    fixture: Fixture, recipe: str, tmp_path: Path
) -> None:
    authored = author(fixture, QUANTIZED[recipe], tmp_path)
    tokens_limit, logits_limit, kl_limit = LIMITS[recipe, kind_of(fixture)]
    logits, arrays = authored.logits(), fixture.arrays
    assert relative_error(authored.vision()[0], arrays["projector_output"][0]) <= tokens_limit
    assert relative_error(logits, fixture.logits) <= logits_limit
    assert kullback_leibler(logits, fixture.logits) <= kl_limit


class RoundedWeights(Weights):
    """The weights as a quantized graph holds them."""

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__(model.weights._refs)
        self.recipe, self.spec = recipe, model.spec.decoder

    def read(self, name: str, shape: tuple[int, ...]) -> Array:
        weight = super().read(name, shape)
        layer, _, kind = name.rpartition(".")
        if not re.search(r"decoder\..*(_proj|fc\d|lm_head)$", layer) or kind != "weight":
            return weight
        layers = self.recipe.format_of(layer)
        if ".experts." in name:  # the operator for all of them: blocks that divide, 8 bits only so
            size = math.gcd(layers.block_size, self.spec.hidden_size, self.spec.intermediate_size)
            precision = "q8" if layers.precision == "int8" else layers.precision
            layers = replace(layers, precision=precision, block_size=size)
        return restored(weight, layers, layer, no_hessian)


# What is left when the weights are equal is the rounding of activations to 8 bits: half a step of
# 1/127 of the largest of 32 (q4), of 128 (hqq), or 1/255 of the range of the whole tensor (int8),
# in each of three layers. Measured (largest): 0.022, 0.026 and 0.048; of the sparse fixtures, where
# it changes the experts of a few tokens, 0.064, 0.139 and 0.087; in VILA's four layers 0.043, 0.050
# and 0.051 (with float activations 1.2e-6).
@pytest.mark.parametrize(
    ("recipe", "limits"),
    [
        ("q4", {"dense": 0.03, "sparse": 0.08, "family": 0.055}),
        ("hqq", {"dense": 0.033, "sparse": 0.175, "family": 0.063}),
        ("int8", {"dense": 0.06, "sparse": 0.11, "family": 0.065}),
    ],
)
def test_quantized_decoder_graph_equals_the_reference_with_its_rounded_weights(
    fixture: Fixture, recipe: str, limits: dict[str, float], tmp_path: Path
) -> None:
    logits = author(fixture, QUANTIZED[recipe], tmp_path).logits()
    rounded = replace(fixture.model, weights=RoundedWeights(fixture.model, QUANTIZED[recipe]))
    with torch.no_grad():
        embeds = torch.from_numpy(fixture.arrays["inputs_embeds"][0])
        expected = load_reference(rounded).logits(embeds).numpy()
    assert relative_error(logits, expected) <= limits[kind_of(fixture)]


@pytest.mark.parametrize("name", MOE_FIXTURES)
@pytest.mark.parametrize("layer", [0, 2])
def test_experts_in_one_operator_and_one_by_one_are_the_same_integers(
    name: str, layer: int, tmp_path: Path
) -> None:
    tensors: dict[str, NDArray[np.uint8]] = {}
    for form in ("fused", "plain"):
        (tmp_path / form).mkdir()
        author(fixture_named(name), SMALL_BLOCKS, tmp_path / form, form)
        graph = ir.load(tmp_path / form / "decoder.onnx").graph
        for key, value in graph.initializers.items():
            if key.startswith(f"decoder.layers.{layer}.mlp.experts."):
                assert value.const_value is not None
                tensors[key.split(".experts.", 1)[1]] = value.const_value.numpy()
    for expert in range(4):
        for fused, plain in (("first", ("gate_up", "fc1")), ("second", ("down_proj", "fc2"))):
            for part, theirs in (("table", "weight"), ("scales", "scale")):
                [apart] = [
                    tensors[key]
                    for linear in plain
                    if (key := f"experts.{expert}.{linear}.{theirs}") in tensors
                ]
                together = tensors[f"{fused}.{part}"][expert]
                if f"experts.{expert}.gate_up.{theirs}" in tensors and fused == "first":
                    together = np.concatenate([together[0::2], together[1::2]])  # in turns
                assert np.array_equal(together, apart.reshape(together.shape)), (expert, fused)


def test_authoring_twice_gives_the_same_bytes(mobilevlm_v2: Fixture, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        author(mobilevlm_v2, PLAIN_INT4, tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert "vision.onnx_data" in names
    for name in names:
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("first", "second"))
        assert first == second, name


# Variants that no fixture has, with random weights against the torch reference.

IMAGE = fixture_named("mobilevlm_v2").model.spec.image.preparation


def vision_spec(
    kind: Literal["mlp", "ldp", "ldpv2", "mlp_downsample"],
    patches: int,
    out_grid: int,
    border: int = 0,
    depth: int = 2,
    **connector: Any,
) -> ModelSpec:
    """A small tower of ``patches`` per edge and a projector; the rest as in a fixture."""
    size = patches * 14 + border
    vision = TransformerEncoder(32, 64, 2, 4, size, 14, "gelu", 1e-5)
    projector = ConnectorSpec(kind, 32, 48, depth, patches, out_grid, **connector)
    spec = fixture_named("mobilevlm_v2").model.spec
    assert isinstance(IMAGE, FixedImage)
    image = replace(IMAGE, size=size, shortest_edge=size)
    decoder = replace(spec.decoder, hidden_size=48, head_dim=12)
    spec = with_image(spec, encoder=vision, connector=projector, preparation=image)
    return replace(spec, decoder=decoder)


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        reference = ReferenceModel(spec)
    return {name: tuple(value.shape) for name, value in reference.named_parameters()}


def in_memory(spec: ModelSpec, folder: Path) -> Model:
    weights = memory_weights(parameter_shapes(spec), folder)
    if spec.decoder.tie_word_embeddings:
        refs = weights._refs
        weights = Weights({**refs, "decoder.lm_head.weight": refs["decoder.embed_tokens.weight"]})
    return replace(fixture_named("mobilevlm_v2").model, spec=spec, weights=weights)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(vision_spec("ldpv2", 16, 12), id="ldpv2 bins overlap (grid 16)"),
        pytest.param(vision_spec("ldpv2", 10, 12), id="ldpv2 grid smaller than its output"),
        pytest.param(vision_spec("ldpv2", 36, 12), id="ldpv2 bins of 3 x 3 (grid 36)"),
        pytest.param(vision_spec("ldp", 15, 8), id="ldp odd grid (15 to 8)"),
        pytest.param(vision_spec("ldp", 16, 8), id="ldp even grid"),
        pytest.param(vision_spec("mlp", 6, 6), id="mlp"),
        pytest.param(vision_spec("mlp", 6, 3), id="mlp after pooling"),
        pytest.param(
            vision_spec("mlp_downsample", 8, 2, depth=1, factor=4, norm=False, bias=False),
            id="mlp_downsample as Idefics3 has it",
        ),
        pytest.param(vision_spec("mlp_downsample", 7, 3, factor=3), id="squares of 3, padded"),
        pytest.param(vision_spec("mlp", 6, 6, border=5), id="border narrower than a patch"),
    ],
)
def test_vision_graph_of_an_unusual_grid_equals_the_reference(
    spec: ModelSpec, tmp_path: Path
) -> None:
    model = in_memory(spec, tmp_path)
    author_encoded(model.weights, spec, RECIPES["fp32"], tmp_path / "vision.onnx")
    edge = spec.image.square.size
    pixels = np.random.default_rng(1).integers(0, 256, (edge, edge, 3), np.uint8)
    tokens, features = run_vision(tmp_path / "vision.onnx", pixels)
    with torch.no_grad():
        reference = load_reference(model)
        assert relative_error(features, reference.features(pixels).numpy()) <= FLOAT32
        expected = reference.visual_tokens(pixels).numpy()
    assert expected.shape == (spec.image.connector.num_tokens, 48)
    assert relative_error(tokens, expected) <= FLOAT32


def decoder_spec(**changes: Any) -> ModelSpec:
    spec = fixture_named("mobilevlm_v2").model.spec
    decoder = replace(spec.decoder, vocab_size=97, hidden_size=128, intermediate_size=96,
                      num_attention_heads=8, num_key_value_heads=8, head_dim=16)  # fmt: skip
    projector = replace(spec.image.connector, out_size=128)
    spec = with_image(spec, connector=projector)
    return replace(spec, decoder=replace(decoder, **changes))


def sparse_spec(
    top_k: int = 2, renormalize: bool = True, use_residual: bool = False, **changes: object
) -> ModelSpec:
    """With experts, a different number in each layer."""
    layers = fixture_named("mobilevlm_v2").model.spec.decoder.num_hidden_layers
    counts = tuple(3 + index for index in range(layers))
    experts = ExpertsSpec(tuple(range(layers)), counts, top_k, renormalize, use_residual)
    return decoder_spec(experts=experts, **changes)


DENSE = {
    "grouped-query attention": decoder_spec(num_key_value_heads=2),
    "multi-query attention": decoder_spec(num_key_value_heads=1),
    "tied embeddings": decoder_spec(tie_word_embeddings=True),
    "linear rope scaling": decoder_spec(rope_scaling=4.0),
    "another rope base": decoder_spec(rope_theta=1e6),
    "one layer": decoder_spec(num_hidden_layers=1),
    "norm epsilon that matters": decoder_spec(norm_eps=0.1),
    "layer norms": decoder_spec(norm="layer"),
    "partial rotary in attention": decoder_spec(head_dim=64, rotary_dim=16),
    "partial rotary before it": decoder_spec(rotary_dim=6, num_key_value_heads=2),
    "heads of 12": decoder_spec(head_dim=12),
    "heads of 20, grouped": decoder_spec(head_dim=20, num_key_value_heads=2, qkv_bias=True),
    "heads of 100": decoder_spec(head_dim=100, num_attention_heads=2, num_key_value_heads=2),
    "heads of 20, partial rotary": decoder_spec(head_dim=20, rotary_dim=16),
    "heads of 28, partial rotary in attention": decoder_spec(head_dim=28, rotary_dim=16),
    "heads of 24, partial rotary": decoder_spec(head_dim=24, rotary_dim=16),
    "heads of 12, partial rotary before it": decoder_spec(head_dim=12, rotary_dim=6),
    "heads of 3 without rotary": decoder_spec(
        head_dim=3, rotary_dim=0, learned_positions=True, num_key_value_heads=4
    ),
    "biases": decoder_spec(qkv_bias=True, o_bias=True, mlp_bias=True),
    "bias of the head": decoder_spec(lm_head_bias=True),
    "plain MLP with GELU": decoder_spec(mlp="plain", hidden_act="gelu_new", mlp_bias=True),
    "gated GELU": decoder_spec(hidden_act="gelu_new"),
    "parallel residual": decoder_spec(parallel_residual=True),
}
SPARSE = {
    "experts": sparse_spec(),
    "experts with gate and biases": sparse_spec(mlp_bias=True),
    "one expert by its probability": sparse_spec(top_k=1, renormalize=False),
    "three experts": sparse_spec(top_k=3),
    "experts beside a dense MLP": sparse_spec(use_residual=True),
    "experts beside attention": sparse_spec(
        parallel_residual=True, mlp="plain", hidden_act="gelu_new"
    ),
}


@pytest.mark.parametrize(
    ("spec", "experts"),
    [
        *(pytest.param(spec, "fused", id=name) for name, spec in (DENSE | SPARSE).items()),
        *(pytest.param(spec, "plain", id=f"plain {name}") for name, spec in SPARSE.items()),
    ],
)
def test_decoder_graph_of_a_variant_equals_the_reference(
    spec: ModelSpec, experts: Experts, tmp_path: Path
) -> None:
    model = in_memory(spec, tmp_path)
    recipe = replace(RECIPES["fp32"], experts=experts)
    author_decoder(model.weights, spec, recipe, tmp_path / "decoder.onnx")
    embeds = np.random.default_rng(2).standard_normal((70, 128), np.float32)
    logits = open_decoder(tmp_path / "decoder.onnx", spec.decoder).step(embeds, 0)
    with torch.no_grad():
        expected = load_reference(model).logits(torch.from_numpy(embeds)).numpy()
    assert relative_error(logits, expected) <= FLOAT32


# KV buffers. 1e-5: sums in another order, nothing else.


@pytest.fixture
def decoder(exact: Authored) -> Decoder:
    return open_decoder(exact.folder / "decoder.onnx", exact.model.spec.decoder)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prefill_in_chunks_equals_prefill_in_one_piece(
    exact: Authored, decoder: Decoder, chunk: int
) -> None:
    embeds = embeds_of(exact, 150)
    whole = decoder.step(embeds, 0)
    again = open_decoder(exact.folder / "decoder.onnx", exact.model.spec.decoder)
    pieces = [again.step(embeds[i : i + chunk], i) for i in range(0, len(embeds), chunk)]
    assert relative_error(np.concatenate(pieces), whole) <= 1e-5


def embeds_of(exact: Authored, length: int) -> Array:
    """The prompt's, over and over where it is shorter."""
    embeds = exact.fixture.arrays["inputs_embeds"][0]
    return np.resize(embeds, (length, embeds.shape[1]))


def test_going_back_by_total_length_forgets_what_came_after(
    exact: Authored, decoder: Decoder
) -> None:
    embeds = embeds_of(exact, 95)
    decoder.step(embeds[:30], 0)
    expected = decoder.step(embeds[30:50], 30)
    decoder.step(embeds[60:95], 30)  # something else in the same place, and longer
    assert relative_error(decoder.step(embeds[30:50], 30), expected) <= 1e-5


def test_logits_of_chosen_positions_are_those_of_all(exact: Authored, decoder: Decoder) -> None:
    embeds = embeds_of(exact, 40)
    everywhere = decoder.step(embeds, 0)
    feeds = {f"past_key_values.{name}": value.numpy() for name, value in decoder.buffers.items()}
    chosen = decoder.session.run(
        ["logits"],
        {
            "inputs_embeds": embeds[None],
            "total_length": np.array([40], np.int32),
            "logits_positions": np.array([39, 3]),
            **feeds,
        },
    )[0]
    assert relative_error(chosen[0], everywhere[[39, 3]]) <= 1e-5
