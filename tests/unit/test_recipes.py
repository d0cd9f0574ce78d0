"""Recipes by name and from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobilevlm.errors import MobileVLMError
from mobilevlm.export.recipes import RECIPES, Limits, Recipe, find_recipe

MINE = """\
vision = "int8"
decoder = "q4"
lm_head = "q8"
embeddings = "fp16"
block_size = 64
[limits]
vision_relative_error = 0.2
decoder_kl = 1
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_the_four_named_recipes_are_there() -> None:
    assert list(RECIPES) == ["fp32", "fp16-weights", "int8", "int4"]
    assert all(find_recipe(name) is recipe for name, recipe in RECIPES.items())


def test_coarser_recipes_allow_more() -> None:
    limits = [recipe.limits for recipe in RECIPES.values()]
    assert [x.decoder_kl for x in limits] == sorted(x.decoder_kl for x in limits)
    errors = [x.vision_relative_error for x in limits]
    assert errors == sorted(errors) and max(errors) < 1


def test_a_file_gives_a_recipe_named_after_it(tmp_path: Path) -> None:
    expected = Recipe("mine", "int8", "q4", "q8", "fp16", Limits(0.2, 1.0), 64)
    assert find_recipe(written(tmp_path, MINE)) == expected


def test_a_file_may_name_its_recipe_and_leave_out_the_block_size(tmp_path: Path) -> None:
    text = 'name = "other"\n' + MINE.replace("block_size = 64\n", "")
    recipe = find_recipe(written(tmp_path, text))
    assert (recipe.name, recipe.block_size) == ("other", 32)


WRONG = [
    ('vision = "int8"\n', "", "key 'vision' is missing"),
    ("[limits]", "[limit]", "key 'limit' is not known: expected name, vision, decoder"),
    ("block_size", "blocksize", "key 'blocksize' is not known"),
    ("decoder_kl = 1", "", ".limits: key 'decoder_kl' is missing"),
    ("decoder_kl", "decoder_KL", ".limits: key 'decoder_KL' is not known: expected vision_rel"),
    ('"q4"', '"int3"', ".decoder: expected one of 'fp32', 'fp16', 'int8', 'q8', 'q4', found"),
    ('"fp16"', '"int8"', ".embeddings: expected one of 'fp32', 'fp16'"),
    ('"q8"', "8", ".lm_head: expected one of"),
    ("64", '"64"', ".block_size: expected int, found '64'"),
    ("64", "48", ".block_size: 48, expected 16, 32, 64, 128 or 256"),
    ("0.2", '"small"', ".limits.vision_relative_error: expected float, found 'small'"),
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
        "recipe 'int5' is not known: expected fp32, fp16-weights, int8, int4, or a .toml file"
    )
