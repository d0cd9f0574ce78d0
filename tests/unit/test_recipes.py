"""Recipes by name and from a file."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mobilevlm.errors import MobileVLMError
from mobilevlm.export.recipes.file import find_recipe, recipe_text
from mobilevlm.export.recipes.layer_formats import TOWER_ROLES
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.plain_types import from_dict
from mobilevlm.recipe import Limits, LinearFormat, Recipe

pytestmark = pytest.mark.pure

MINE = """\
tower = "int8"
projector = "fp16"
decoder = { precision = "q4", quantizer = "hqq", block_size = 64, symmetric = false }
lm_head = "q8"
embeddings = "fp16"
[limits]
vision_relative_error = 0.2
decoder_kl = 1
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_the_named_recipes_are_there() -> None:
    assert list(RECIPES) == [
        *("fp32", "fp16-weights", "int8", "int8-calibrated", "int8-portable"),
        *("int4", "fast", "int4-small", "a16w8", "a8w8"),
    ]
    assert [name for name in RECIPES if RECIPES[name].is_for_npu] == ["a16w8", "a8w8"]
    assert all(find_recipe(name) is recipe for name, recipe in RECIPES.items())


def test_coarser_recipes_allow_more() -> None:
    for npu in (False, True):
        limits = [recipe.limits for recipe in RECIPES.values() if recipe.is_for_npu is npu]
        assert [x.decoder_kl for x in limits] == sorted(x.decoder_kl for x in limits)
        errors = [x.vision_relative_error for x in limits]
        assert errors == sorted(errors) and max(errors) < 1


def test_a_file_gives_a_recipe_named_after_it(tmp_path: Path) -> None:
    expected = Recipe(
        "mine",
        tower=LinearFormat("int8"),
        projector=LinearFormat("fp16"),
        decoder=LinearFormat("q4", "hqq", block_size=64, symmetric=False),
        lm_head=LinearFormat("q8"),
        embeddings="fp16",
        limits=Limits(0.2, 1.0),
    )
    assert find_recipe(written(tmp_path, MINE)) == expected


def test_a_file_may_name_its_recipe(tmp_path: Path) -> None:
    assert find_recipe(written(tmp_path, 'name = "other"\n' + MINE)).name == "other"


def test_a_file_may_extend_a_recipe(tmp_path: Path) -> None:
    """Parts with a precision are new, without the other's roles, those without one changed; limits
    and layers are merged."""
    base = RECIPES["int8-calibrated"]
    tower = {key: layers for key, layers in base.layers.items() if key in TOWER_ROLES}
    own = 'decoder = {block_size = 64, precision = "q4"}\nlm_head = "fp16"\n'
    own += '[limits]\ndecoder_kl = 0.2\n[layers]\n"vision.layers.1.*" = "fp32"\n'
    found = find_recipe(written(tmp_path, 'extends = "int8-calibrated"\n' + own))
    assert found == replace(
        base,
        name="mine",
        decoder=LinearFormat("q4", block_size=64),
        lm_head=LinearFormat("fp16"),
        limits=replace(base.limits, decoder_kl=0.2),
        layers={**tower, "vision.layers.1.*": LinearFormat("fp32")},
    )
    (tmp_path / "further.toml").write_text('extends = "mine.toml"\ntower = {weight_bits = 8}\n')
    further = find_recipe(str(tmp_path / "further.toml"))
    assert further == replace(found, name="further", tower=replace(base.tower, weight_bits=8))


def test_files_that_a_recipe_names_lie_beside_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    base = tmp_path / "sub" / "base.toml"
    base.write_text('extends = "int8-calibrated"\ncalibration = "mine.jsonl"\n')
    found = find_recipe(written(tmp_path, 'extends = "sub/base.toml"\n'))
    assert found.calibration == str(tmp_path / "sub" / "mine.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "mine.toml"', "extends itself"),
        ('extends = "other.toml"', "extends itself"),
        ('extends = "gone"', "recipe .* is not known"),
        ('extends = "gone.toml"', "no such recipe file"),
        ("extends = 4", "expected a recipe's name or file, found 4"),
        ('extends = "int4"\ndecoder = {blocksize = 64}', "key 'blocksize' is not known"),
        ('extends = "int4"\n[limits]\nkl = 1.0', "key 'kl' is not known"),
    ],
)
def test_what_cannot_be_extended_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text('extends = "mine.toml"')
    with pytest.raises(MobileVLMError, match=message) as refused:
        find_recipe(written(tmp_path, text))
    assert "\n" not in str(refused.value)


def test_each_layer_has_the_format_of_its_part(tmp_path: Path) -> None:
    recipe = find_recipe(written(tmp_path, MINE))
    assert recipe.format_of("vision.layers.0.mlp.fc1") is recipe.tower
    assert recipe.format_of("projector.mlp.0") is recipe.projector
    assert recipe.format_of("decoder.layers.3.attn.q_proj") is recipe.decoder
    assert recipe.format_of("decoder.lm_head") is recipe.lm_head


WRONG = [
    ('tower = "int8"\n', "", "key 'tower' is missing"),
    ("[limits]", "[limit]", "key 'limit' is not known: expected name, tower, projector, decoder"),
    ("block_size", "blocksize", ".decoder: key 'blocksize' is not known: expected precision, qu"),
    ("decoder_kl = 1", "", ".limits: key 'decoder_kl' is missing"),
    ("decoder_kl", "decoder_KL", ".limits: key 'decoder_KL' is not known: expected vision_rel"),
    ('"q4"', '"q3"', ".decoder.precision: expected one of 'fp32', 'fp16', 'int8', 'q8', 'q4', "),
    ('"fp16"\n[', '"int8"\n[', ".embeddings: expected one of 'fp32', 'fp16'"),
    ('"q8"', "8", ".lm_head: expected an object, found 8"),
    ('"q8"', '"8"', ".lm_head.precision: expected one of"),
    ('precision = "q4", ', "", ".decoder: key 'precision' is missing"),
    ('"hqq"', '"best"', ".decoder.quantizer: expected one of 'rtn', 'mse', 'hqq', 'gptq'"),
    ("64", '"64"', ".decoder.block_size: expected int, found '64'"),
    ("64", "48", ".decoder.block_size: 48, expected one of 16, 32, 64, 128, 256"),
    ("false", "0", ".decoder.symmetric: expected bool, found 0"),
    ('"q4"', '"fp16"', ".decoder.quantizer: fp16 has none: it goes with int8, q8, q4, q2"),
    ('"q4"', '"int8"', ".decoder.block_size: int8 has none: it goes with q8, q4, q2"),
    ('"q8"', '{ precision = "q8", activations = "tensor" }',
     ".lm_head.activations: q8 has none: it goes with int8"),
    ('"q8"', '{ precision = "q8", weight_bits = 8 }',
     ".lm_head.weight_bits: q8 has none: it goes with int8"),
    ('"int8"', '{ precision = "int8", weight_bits = 6 }',
     ".tower.weight_bits: expected one of 'auto', 7, 8, found 6"),
    ('"hqq"', '"rtn", scaling = "smoothquant"', ".decoder.scaling: smoothquant goes with int8"),
    ('"int8"', '{ precision = "int8", scaling = "awq" }', ".tower.scaling: awq goes with q8, q4"),
    ('projector = "fp16"', 'projector = { precision = "int8", scaling = "smoothquant" }',
     ".projector.scaling: nothing before its layers takes the factors"),
    ('"int8"', '{ precision = "int8", calibrator = "entropy" }',
     ".tower.calibrator: int8 has none: it goes with qdq8, qdq16"),
    ('"int8"', '{ precision = "qdq8", calibrator = "mean" }',
     ".tower.calibrator: expected one of 'minmax', 'percentile', 'entropy', found 'mean'"),
    ('"int8"', '{ precision = "qdq16", weight_bits = 7 }', ".tower.weight_bits: qdq16 has none"),
    ('"int8"', '"qdq8"', ".projector: tower and projector are one graph"),
    ('projector = "fp16"', 'projector = "qdq16"', ".projector: tower and projector are one graph"),
    ('"q8"', '"qdq8"', ".lm_head: decoder and lm_head are one graph"),
    ("[limits]", '[layers]\n"vision.*" = "qdq8"\n[limits]',
     ".layers.vision.*.precision: qdq8 is for whole graphs"),
    ("0.2", '"small"', ".limits.vision_relative_error: expected float, found 'small'"),
    ("embeddings", 'layer_norm = "centred"\nembeddings',
     ".layer_norm: 'centred' goes with a tower in qdq8 or qdq16, which int8 is not"),
    ("[limits]", "[limits", "not a TOML recipe"),
    ("[limits]", 'limits = "none"\n[x]', "is not known"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), WRONG, ids=[row[2] for row in WRONG])
def test_a_wrong_key_or_value_is_named_with_the_file(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    assert old in MINE
    path = written(tmp_path, MINE.replace(old, new))
    with pytest.raises(MobileVLMError) as caught:
        find_recipe(path)
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(MobileVLMError, match=r"mine\.toml: not a TOML recipe"):
        find_recipe(str(path))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MobileVLMError, match=r"none\.toml: no such recipe file"):
        find_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(MobileVLMError, match=r"folder\.toml: not a TOML recipe"):
        find_recipe(str(tmp_path / "folder.toml"))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(MobileVLMError) as caught:
        find_recipe("int5")
    assert str(caught.value) == (
        "recipe 'int5' is not known: expected fp32, fp16-weights, int8, int8-calibrated, "
        "int8-portable, int4, fast, int4-small, a16w8, a8w8, or a .toml file"
    )


def test_a_file_may_ask_for_a_graph_for_prompts(tmp_path: Path) -> None:
    path = written(tmp_path, 'prefill = "int8"\n' + MINE)
    recipe = find_recipe(path)
    assert recipe.prefill == LinearFormat("int8") and recipe.has_int8
    settled = recipe.with_weight_bits(8, auto_only=True)
    assert settled.prefill == LinearFormat("int8", weight_bits=8)
    prompts = settled.for_prefill()
    assert prompts.decoder == prompts.lm_head == settled.prefill
    assert (prompts.tower, prompts.projector) == (settled.tower, settled.projector)
    with pytest.raises(MobileVLMError, match=r"prefill\.precision: qdq8 is for the tower"):
        find_recipe(written(tmp_path, 'prefill = "qdq8"\n' + MINE))


@pytest.mark.parametrize("name", ["int4", "fast", "int8-calibrated"])
def test_a_recipe_written_to_a_file_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    found = find_recipe(written(tmp_path, recipe_text(recipe, tmp_path)))
    assert found == replace(recipe, name="mine")


def test_a_layer_norm_that_recipes_no_longer_have_is_read_from_manifests_only(
    tmp_path: Path,
) -> None:
    stored = {**asdict(RECIPES["fp32"]), "layer_norm": "spelled"}
    assert from_dict(Recipe, stored, "manifest.json: recipe") == RECIPES["fp32"]
    with pytest.raises(MobileVLMError, match="layer_norm: expected one of 'fused', 'centred'"):
        find_recipe(written(tmp_path, 'extends = "fp32"\nlayer_norm = "spelled"'))
