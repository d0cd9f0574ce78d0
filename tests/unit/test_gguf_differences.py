"""The export says how stock llama.cpp treats images otherwise."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
from conftest import fixture_named

from mobilevlm.errors import FileWarning
from mobilevlm.export.formats.gguf import gguf_jobs
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.preparation import with_max_tiles
from mobilevlm.spec import with_image


@pytest.mark.parametrize(
    ("name", "max_tiles", "said"),
    [
        ("llava_next", None, "one square, without tiles"),
        ("internvl3", None, "the largest of several grids of tiles of one shape"),
        ("internvl3", 1, None),
        ("smolvlm2", None, None),
        ("smolvlm2", 1, "each image twice"),
        ("llava_onevision", None, None),
        ("llava_hf", None, None),
    ],
)
def test_what_stock_programs_do_otherwise_is_one_warning(
    name: str, max_tiles: int | None, said: str | None
) -> None:
    model = fixture_named(name).model
    if max_tiles is not None:
        image = with_max_tiles(model.spec.image, max_tiles)
        model = replace(model, spec=with_image(model.spec, preparation=image.preparation))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gguf_jobs(model, RECIPES["fp32"])
    told = [str(warning.message) for warning in caught if warning.category is FileWarning]
    assert len(told) == (said is not None)
    assert all(said in line and "\n" not in line for line in told if said)
