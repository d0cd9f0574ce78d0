"""Formats of single layers: which key stands for which layer, and what the layers take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from conftest import FIXTURES, MOE_FIXTURES, PLAIN_INT4, Fixture, fixture_named, relative_error

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.graph.author import author_decoder
from mobilevlm.export.graph.reading import OnnxTensors
from mobilevlm.export.recipes.file import find_recipe
from mobilevlm.export.recipes.layer_formats import bits_per_weight, expand_layers, stored_bytes
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.linear_groups import LinearGroup, linear_groups
from mobilevlm.recipe import LinearFormat, Recipe
from mobilevlm.spec import ModelSpec

Q8, Q4, Q2 = LinearFormat("q8"), LinearFormat("q4", "hqq"), LinearFormat("q2", symmetric=False)
QKV = tuple(f"decoder.layers.0.attn.{part}_proj" for part in "qkv")


def expanded(fixture: Fixture, **layers: LinearFormat) -> Recipe:
    """int4 with these layers, ``__`` for a dot."""
    named = {key.replace("__", "."): value for key, value in layers.items()}
    return expand_layers(replace(PLAIN_INT4, layers=named), fixture.model.spec)


@pytest.mark.parametrize("name", (*FIXTURES, *MOE_FIXTURES))
def test_the_groups_are_the_products_of_the_graphs(name: str, tmp_path: Path) -> None:
    """Authoring a stage reports the error of each product by the names of its layers."""
    from mobilevlm.export.graph.author import author_decoder, author_encoded

    model, recipe = fixture_named(name).model, PLAIN_INT4
    errors: dict[str, float] = {}
    for author in (author_encoded, author_decoder):
        path = tmp_path / f"{author.__name__}.onnx"
        errors |= author(model.weights, model.spec, recipe, path).errors
    assert sorted(errors) == sorted(",".join(group.names) for group in linear_groups(model.spec))


def test_any_layer_of_a_product_stands_for_all_of_it(mobilevlm_v2: Fixture) -> None:
    recipe = expanded(mobilevlm_v2, decoder__layers__0__attn__v_proj=Q8)
    assert recipe.layers == dict.fromkeys(QKV, Q8)
    assert all(recipe.format_of(name) is Q8 for name in QKV)
    assert recipe.format_of("decoder.layers.1.attn.q_proj") is recipe.decoder


def test_names_go_before_patterns_and_the_last_pattern_counts(mobilevlm_v2: Fixture) -> None:
    layers = {QKV[0]: Q8, "decoder.layers.*": Q2, "*.attn.*": Q4}
    recipe = expand_layers(replace(PLAIN_INT4, layers=layers), mobilevlm_v2.model.spec)
    assert recipe.format_of(QKV[2]) is Q8
    assert recipe.format_of("decoder.layers.1.attn.k_proj") is Q4
    assert recipe.format_of("vision.layers.0.attn.out_proj") is Q4
    assert recipe.format_of("decoder.layers.1.mlp.down_proj") is Q2
    assert recipe.format_of("decoder.lm_head") is recipe.lm_head


def down_projections(recipe: Recipe) -> list[str]:
    return [name for name in recipe.layers if name.endswith(("mlp.down_proj", "mlp.fc2"))]


@pytest.mark.parametrize("name", (*FIXTURES, *MOE_FIXTURES))
def test_roles_suit_every_family_and_leave_experts_alone(name: str) -> None:
    spec = fixture_named(name).model.spec
    recipe = expand_layers(replace(PLAIN_INT4, layers={"@down_proj": Q8}), spec)
    count = spec.decoder.num_hidden_layers
    dense = [layer for layer in range(count) if not spec.decoder.num_experts(layer)]
    assert [int(key.split(".")[2]) for key in down_projections(recipe)] == dense
    assert len(recipe.layers) == len(dense)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, []),
        (3, [2]),
        (24, [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]),
        (30, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]),
    ],
)
def test_half_of_the_down_projections_are_the_ends_and_each_third_between(
    mobilevlm_v2: Fixture, count: int, expected: list[int]
) -> None:
    spec = mobilevlm_v2.model.spec
    spec = replace(spec, decoder=replace(spec.decoder, num_hidden_layers=count))
    recipe = expand_layers(replace(PLAIN_INT4, layers={"@half_down_proj": Q8}), spec)
    assert [int(key.split(".")[2]) for key in down_projections(recipe)] == expected


def test_keys_and_values_that_query_heads_share_have_a_format_of_their_own(tmp_path: Path) -> None:
    """The graph then has a product for q and one for k and v, which are read back by name."""
    model = fixture_named("smolvlm2").model
    weights, spec = model.weights, model.spec
    decoder = spec.decoder
    assert decoder.num_key_value_heads < decoder.num_attention_heads
    recipe = expand_layers(replace(PLAIN_INT4, layers={"@shared_kv_proj": Q8}), spec)
    assert set(recipe.layers) == {
        f"decoder.layers.{layer}.attn.{part}_proj"
        for layer in range(decoder.num_hidden_layers)
        for part in "kv"
    }
    path = tmp_path / "decoder.onnx"
    errors = author_decoder(weights, spec, recipe, path).errors
    q, k, v = QKV
    assert q in errors and errors[f"{k},{v}"] < errors[q] / 10
    names = [f"{name}.weight" for name in QKV]
    stored = OnnxTensors(path, spec, names)
    heads = (decoder.num_attention_heads, *[decoder.num_key_value_heads] * 2)
    expected = (errors[q], *[errors[f"{k},{v}"]] * 2)
    for name, count, error in zip(names, heads, expected, strict=True):
        shape = (count * decoder.head_dim, decoder.hidden_size)
        found, exact = stored.read(name), weights.read(name, shape)
        assert found.shape == stored.shape(name) == shape
        assert relative_error(found, exact) == pytest.approx(error, rel=0.2)
    groups = [group for group in linear_groups(spec) if group.name.startswith("decoder.")]
    bits = bits_per_weight(recipe, groups)
    assert bits_per_weight(PLAIN_INT4, groups) < bits < 8


@pytest.mark.parametrize("name", ["mobilevlm_v2", "blip2_t5"])
def test_keys_and_values_of_single_heads_keep_the_format_of_queries(name: str) -> None:
    layers = {"@shared_kv_proj": Q8}
    recipe = expand_layers(replace(PLAIN_INT4, layers=layers), fixture_named(name).model.spec)
    assert recipe.layers == {}


def test_factors_of_a_role_are_left_out_where_nothing_takes_them() -> None:
    scaled = LinearFormat("int8", scaling="smoothquant")
    for name, scaling in (("mobilevlm_v2", "smoothquant"), ("moe_llava_phi2", "none")):
        spec = fixture_named(name).model.spec
        recipe = expand_layers(replace(PLAIN_INT4, layers={"@down_proj": scaled}), spec)
        assert {layers.scaling for layers in recipe.layers.values()} == {scaling}


def test_roles_are_patterns_to_which_names_go_before(mobilevlm_v2: Fixture) -> None:
    name = "decoder.layers.0.mlp.down_proj"
    layers = {name: Q2, "decoder.*": Q4, "@down_proj": Q8}
    recipe = expand_layers(replace(PLAIN_INT4, layers=layers), mobilevlm_v2.model.spec)
    assert recipe.format_of(name) is Q2
    assert recipe.format_of("decoder.layers.1.mlp.down_proj") is Q8
    assert recipe.format_of("decoder.layers.1.mlp.up_proj") is Q4


def without_dense_layers(fixture: Fixture) -> ModelSpec:
    spec = fixture.model.spec
    experts = spec.decoder.experts
    assert experts is not None
    count = spec.decoder.num_hidden_layers
    everywhere = replace(experts, layers=tuple(range(count)), num_experts=(4,) * count)
    return replace(spec, decoder=replace(spec.decoder, experts=everywhere))


def test_a_role_that_stands_for_no_layer_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    progress.enable()
    spec = without_dense_layers(fixture_named("moe_llava_qwen"))
    recipe = expand_layers(replace(PLAIN_INT4, layers={"@down_proj": Q8}), spec)
    assert recipe.layers == {}
    assert "layers      @down_proj stands for no layer of" in capsys.readouterr().err
    with pytest.raises(MobileVLMError, match="is in a graph that is qdq16 as a whole"):
        expand_layers(replace(RECIPES["a16w8"], layers={"@down_proj": Q8}), spec)


@pytest.mark.parametrize("name", ["vision.layers.0.mlp.fc1", "projector.*", "*"])
def test_no_layer_of_a_fixed_point_stage_has_a_format_of_its_own(
    mobilevlm_v2: Fixture, name: str
) -> None:
    fixed = LinearFormat("qdq8")
    recipe = replace(PLAIN_INT4, tower=fixed, projector=fixed, layers={name: Q8})
    with pytest.raises(MobileVLMError, match="is in a graph that is qdq8 as a whole"):
        expand_layers(recipe, mobilevlm_v2.model.spec)
    decoder = replace(recipe, layers={"decoder.*": Q8})
    assert expand_layers(decoder, mobilevlm_v2.model.spec).layers
    with pytest.raises(MobileVLMError, match="is in a graph that is qdq16 as a whole"):
        expand_layers(
            replace(RECIPES["a16w8"], layers={"decoder.layers.0.*": Q8}), mobilevlm_v2.model.spec
        )


def test_layers_of_one_product_must_agree(mobilevlm_v2: Fixture) -> None:
    same = {"decoder__layers__0__attn__q_proj": Q8, "decoder__layers__0__attn__v_proj": Q8}
    assert expanded(mobilevlm_v2, **same).layers == dict.fromkeys(QKV, Q8)
    same["decoder__layers__0__attn__v_proj"] = Q4
    with pytest.raises(MobileVLMError, match=r"v_proj: .*q_proj has another format, and both are"):
        expanded(mobilevlm_v2, **same)


@pytest.mark.parametrize(
    ("key", "layers", "message"),
    [
        ("decoder.layers.0.mlp.downproj", Q8, r"did you mean decoder\.layers\.0\.mlp\.down_proj\?"),
        ("@up_proj", Q8, "no such role: expected @down_proj, @half_down_proj"),
        ("decoder.layers.99.mlp.*", Q8, "no such layer: a pattern must match one of vision.layers"),
        ("vision.layers.0.mlp.fc2", LinearFormat("int8", scaling="smoothquant"), "nothing before"),
        ("projector.*", LinearFormat("q4", scaling="awq"), "nothing before takes the factors"),
    ],
)
def test_a_wrong_key_is_named_with_what_is_right(
    mobilevlm_v2: Fixture, key: str, layers: LinearFormat, message: str
) -> None:
    recipe = replace(PLAIN_INT4, layers={key: layers})
    with pytest.raises(MobileVLMError, match=message) as caught:
        expand_layers(recipe, mobilevlm_v2.model.spec)
    assert str(caught.value).startswith(f"recipe 'int4': layers.{key}")


FORMATS = (
    *(LinearFormat(precision) for precision in ("fp32", "fp16", "int8")),
    *(LinearFormat("q4", block_size=size, symmetric=size < 64) for size in (16, 32, 64, 128)),
    *(LinearFormat("q2", symmetric=symmetric) for symmetric in (True, False)),
    LinearFormat("q8", block_size=64),
)


@pytest.mark.parametrize("layers", FORMATS, ids=repr)
def test_stored_bytes_are_those_of_the_arrays_in_the_file(layers: LinearFormat) -> None:
    import numpy as np

    from mobilevlm.export.quantize import rtn
    from mobilevlm.export.quantize.blocks import half_scales

    group = LinearGroup(("layer",), 200, (40, 24))
    weight = np.random.default_rng(0).standard_normal((64, 200), np.float32)
    scheme = layers.scheme
    if scheme is None:
        arrays = [weight.astype({"fp32": np.float32, "fp16": np.float16}[layers.precision])]
    else:
        found = rtn.quantize(weight, scheme)
        zeros = [] if found.zero_points is None else [found.zero_points]
        scales = found.scales if scheme.block_size is None else half_scales(found)
        arrays = [found.packed, scales, *zeros]
    assert stored_bytes(layers, group) == sum(array.nbytes for array in arrays)


LAYERS = """\
tower = "int8"
projector = "int8"
decoder = "q4"
lm_head = "q4"
embeddings = "fp16"
limits = { vision_relative_error = 0.5, decoder_kl = 1.0 }
[layers]
"*.mlp.down_proj" = "q8"
"decoder.lm_head" = { precision = "q4", quantizer = "hqq", block_size = 64 }
"""


def test_a_recipe_file_gives_single_layers_their_format(
    tmp_path: Path, mobilevlm_v2: Fixture
) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(LAYERS)
    recipe = find_recipe(str(path))
    assert recipe.layers == {
        "*.mlp.down_proj": LinearFormat("q8"),
        "decoder.lm_head": LinearFormat("q4", "hqq", block_size=64),
    }
    path.write_text(LAYERS.replace('"hqq"', '"best"'))
    with pytest.raises(MobileVLMError, match=r"layers\.decoder\.lm_head\.quantizer: expected one"):
        find_recipe(str(path))
    path.write_text(LAYERS.replace('"q8"', '{ precision = "fp16", block_size = 64 }'))
    with pytest.raises(MobileVLMError, match=r"layers\.\*\.mlp\.down_proj\.block_size: fp16 has"):
        find_recipe(str(path))


def test_single_layers_reach_the_bundle(tmp_path: Path, mobilevlm_v2: Fixture) -> None:
    """The manifest names their formats and the mean bits, and another layer makes another file."""
    path, keys = tmp_path / "mixed.toml", []
    for text in (LAYERS, LAYERS.replace('"q8"', '"fp16"')):
        path.write_text(text)
        mobilevlm.export(
            mobilevlm_v2.checkpoint,
            tmp_path / "bundle",
            recipe=str(path),
            vision_tower=mobilevlm_v2.tower,
            measure=False,
        )
        bundle = open_bundle(tmp_path / "bundle")
        keys.append([artifact.key for artifact in bundle.manifest.artifacts])
    (vision, embeddings, decoder), again = keys
    assert again[:2] == [vision, embeddings] and again[2] != decoder
    recipe = bundle.manifest.recipe.layers
    assert recipe["decoder.layers.1.mlp.down_proj"].precision == "fp16"
    decoder_groups = linear_groups(mobilevlm_v2.model.spec)
    weights = sum(group.size for group in decoder_groups if group.name.startswith("decoder."))
    artifact = bundle.artifact("decoder", "onnx")
    stored = 0
    for node in ir.load(bundle.path(artifact.path)).graph:
        if node.op_type in ("MatMulNBits", "Cast"):
            stored += sum(x.const_value.nbytes for x in node.inputs if x and x.const_value)
    assert artifact.bits_per_weight == pytest.approx(8 * stored / weights, abs=1e-4)  # as rounded
