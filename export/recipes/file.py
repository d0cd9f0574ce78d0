"""Recipe files: read from TOML and checked, and written as TOML for people to review and edit.

A file has the fields of :class:`mobilevlm.recipe.Recipe`; a part or layer that is a text there
(``decoder = "q4"``) means that precision with everything else left as it is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mobilevlm.errors import MobileVLMError
from mobilevlm.export.recipes.layer_formats import DECODER_ROLES, TOWER_ROLES
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.plain_types import from_dict
from mobilevlm.recipe import (
    BLOCK_BITS,
    BLOCK_SIZES,
    DATA_NAMES,
    HALVED,
    PARTS,
    PREFILL,
    PREFILL_LAYERS,
    QDQ,
    LinearFormat,
    Precision,
    Recipe,
    ScalingName,
)
from mobilevlm.regular_file import read_regular

_LAYERS = ("layers", PREFILL_LAYERS)
"""Fields of formats of single layers."""
_ROLES_OF = {
    "tower": ("layers", TOWER_ROLES),
    "decoder": ("layers", DECODER_ROLES),
    PREFILL: (PREFILL_LAYERS, DECODER_ROLES),
}
"""Field and keys of each part's roles."""
MOST_FILE = 1 << 24
"""Bytes of a recipe file"""
_USES: dict[str, tuple[Precision, ...]] = {
    "quantizer": ("int8", *BLOCK_BITS),
    "block_size": tuple(BLOCK_BITS),
    "symmetric": tuple(BLOCK_BITS),
    "activations": ("int8",),
    "weight_bits": HALVED,
    "calibrator": QDQ,
}
"""Precisions that a setting has a meaning for."""
_SCALED: dict[ScalingName, tuple[Precision, ...]] = {
    "awq": tuple(BLOCK_BITS),
    "smoothquant": ("int8", *QDQ),
    "rotation": ("fp32", "fp16", "int8", *BLOCK_BITS),
}


def find_recipe(name: str) -> Recipe:
    """A recipe by its name, or from a ``.toml`` file.

    Raises:
        MobileVLMError: no such recipe, or the file's fields are wrong.
    """
    return _find_recipe(name, ())


def _find_recipe(name: str, extending: tuple[Path, ...]) -> Recipe:
    """``extending``: the files that lead here."""
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix != ".toml":
        raise MobileVLMError(
            f"recipe {name!r} is not known: expected {', '.join(RECIPES)}, or a .toml file"
        )
    try:
        data = tomllib.loads(read_regular(path, MOST_FILE).decode("utf-8"))
    except FileNotFoundError:
        raise MobileVLMError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MobileVLMError(f"{path}: not a TOML recipe: {error}") from None
    for part in (*PARTS, PREFILL):
        data |= _spelled_out(data, part)
    for field in _LAYERS:
        layers = data.get(field)
        if isinstance(layers, dict):
            for key in layers:
                layers |= _spelled_out(layers, key)
    # What it names lies beside it.
    for key in ("gguf_imatrix", "gguf_calibration", "calibration"):
        if isinstance(data.get(key), str) and _is_path(key, data[key]):
            data[key] = str(path.parent / data[key])
    if "extends" in data:
        data = _extended(data, path, (*extending, path.resolve()))
    recipe = from_dict(
        Recipe, {**data, "name": data.get("name", path.stem)}, str(path), strict=True
    )
    for part in PARTS:
        _check(getattr(recipe, part), f"{path}.{part}")
    if recipe.prefill is not None:
        _check(recipe.prefill, f"{path}.{PREFILL}")
    elif recipe.prefill_layers:
        raise MobileVLMError(f"{path}.{PREFILL_LAYERS}: without {PREFILL} there is no such graph")
    for where, single in _single(recipe):
        _check(single, f"{path}.{where}")
    _check_fixed_point(recipe, str(path))
    _check_rotation(recipe, str(path))
    if recipe.projector.scaling != "none":
        raise MobileVLMError(
            f"{path}.projector.scaling: nothing before its layers takes the factors: leave it out"
        )
    return recipe


def _extended(data: dict[str, Any], path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """Return a recipe file's data with what it leaves out as in the recipe that it extends.
    ``limits`` and single layers are merged, layers of the file after the others (of patterns the
    last counts). A part with a precision is a new one, which the other's roles do not change;
    without, it changes the other's settings."""
    base = data.pop("extends")
    if not isinstance(base, str):
        raise MobileVLMError(
            f"{path}.extends: expected a recipe's name or file, found {base!r:.60}"
        )
    if base not in RECIPES:
        base = str(path.parent / base)
        if Path(base).resolve() in extending:
            raise MobileVLMError(f"{path}.extends: {base} extends itself: name another recipe")
    merged: dict[str, Any] = asdict(_find_recipe(base, extending))
    del merged["name"]
    for key, value in data.items():
        old = merged.get(key)
        if not (isinstance(value, dict) and isinstance(old, dict)):
            merged[key] = value
        elif key in _LAYERS:
            kept = {name: layer for name, layer in old.items() if name not in value}
            merged[key] = {**kept, **value}
        else:
            is_new = key != "limits" and "precision" in value
            merged[key] = value if is_new else {**old, **value}
            if is_new and key in _ROLES_OF:
                field, roles = _ROLES_OF[key]
                said = data.get(field, {})
                layers = merged[field].items()
                merged[field] = {k: v for k, v in layers if k not in roles or k in said}
    return merged


def _spelled_out(table: dict[str, Any], key: str) -> dict[str, Any]:
    """The entry with a precision for a text; empty where it is no text."""
    return {key: {"precision": table[key]}} if isinstance(table.get(key), str) else {}


def _check_fixed_point(recipe: Recipe, where: str) -> None:
    """Fixed point is for whole graphs: tower and projector, decoder and head. That the recipe's
    ``layers`` leave them alone is known when patterns are expanded
    (export/recipes/layer_formats.py)."""
    if recipe.layer_norm == "centred" and recipe.tower.precision not in QDQ:
        raise MobileVLMError(
            f"{where}.layer_norm: 'centred' goes with a tower in {' or '.join(QDQ)}, which "
            f"{recipe.tower.precision} is not: leave it out"
        )
    if recipe.prefill is not None and recipe.prefill.precision in QDQ:
        raise MobileVLMError(
            f"{where}.{PREFILL}.precision: {recipe.prefill.precision} is for the tower and the "
            f"projector, or for all parts of a model for NPUs"
        )
    for key, layers in _single(recipe):
        if layers.precision in QDQ:
            raise MobileVLMError(
                f"{where}.{key}.precision: {layers.precision} is for whole graphs (tower "
                f"and projector, decoder and lm_head), not for single layers"
            )
    for first, second in (("tower", "projector"), ("decoder", "lm_head")):
        ours, theirs = getattr(recipe, first), getattr(recipe, second)
        if {ours.precision, theirs.precision} & set(QDQ) and theirs != replace(
            ours, scaling="none"
        ):
            raise MobileVLMError(
                f"{where}.{second}: {first} and {second} are one graph, which is in fixed point as "
                f"a whole: give {second} the settings of {first}, except scaling"
            )


def _check_rotation(recipe: Recipe, where: str) -> None:
    """The decoder as a whole is rotated. Which factors of other methods have a place beside that is
    known when patterns are expanded (export/recipes/layer_formats.py)."""
    parts = {part: getattr(recipe, part) for part in PARTS if part != "decoder"}
    parts |= dict(_single(recipe))
    if recipe.prefill is not None:
        parts[PREFILL] = recipe.prefill
    for part, layers in parts.items():
        if layers.scaling == "rotation":
            raise MobileVLMError(
                f"{where}.{part}.scaling: rotation is of the decoder as a whole, its head and its "
                f"prefill graph included: give it to decoder alone"
            )
    for part in ("lm_head", PREFILL):
        if recipe.is_rotated and part in parts and parts[part].scaling != "none":
            raise MobileVLMError(
                f"{where}.{part}.scaling: {parts[part].scaling} has no place beside the decoder's "
                f"rotation: leave one of them out"
            )


def _check(layers: LinearFormat, where: str) -> None:
    """Refuses settings that the precision has no use for, so that none is silently ignored."""
    precision = layers.precision
    if layers.block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise MobileVLMError(f"{where}.block_size: {layers.block_size}, expected one of {sizes}")
    plain = LinearFormat(precision)
    for field, kinds in _USES.items():
        if getattr(layers, field) != getattr(plain, field) and precision not in kinds:
            raise MobileVLMError(
                f"{where}.{field}: {precision} has none: it goes with {', '.join(kinds)}"
            )
    if layers.scaling != "none" and precision not in _SCALED[layers.scaling]:
        raise MobileVLMError(
            f"{where}.scaling: {layers.scaling} goes with {', '.join(_SCALED[layers.scaling])}, "
            f"not with {precision}"
        )


def recipe_text(
    recipe: Recipe, folder: Path, header: Sequence[str] = (), comments: Mapping[str, str] = {}
) -> str:
    """A recipe that is to be a file in ``folder`` and named by that file. Files that it names are
    named from there. ``comments``: what stands behind an entry of ``layers``."""
    lines = [f"# {line}" if line else "" for line in header]
    lines += [f"{part} = {_format(getattr(recipe, part))}" for part in PARTS]
    if recipe.prefill is not None:
        lines.append(f"{PREFILL} = {_format(recipe.prefill)}")
    lines.append(f"embeddings = {json.dumps(recipe.embeddings)}")
    if recipe.experts != "fused":
        lines.append(f"experts = {_value(recipe.experts)}")
    for name in ("calibration", "gguf", "gguf_mmproj", "gguf_imatrix", "gguf_calibration"):
        value = getattr(recipe, name)
        if value is not None:
            text = os.path.relpath(value, folder) if _is_path(name, value) else value
            lines.append(f"{name} = {_value(text)}")
    lines += ["", "[limits]"]
    limits = _fields(recipe.limits)
    lines += [f"{name} = {_value(value)}" for name, value in limits if value is not None]
    for field in _LAYERS:
        single: Mapping[str, LinearFormat] = getattr(recipe, field)
        if single:
            lines += ["", f"[{field}]"]
        for name, layers in single.items():
            comment = f"  # {comments[name]}" if name in comments and field == "layers" else ""
            lines.append(f"{_value(name)} = {_format(layers)}{comment}")
    return "\n".join(lines) + "\n"


def _single(recipe: Recipe) -> Iterator[tuple[str, LinearFormat]]:
    """Yield the formats of single layers, and where the recipe has them."""
    for field in _LAYERS:
        for key, layers in getattr(recipe, field).items():
            yield f"{field}.{key}", layers


def _is_path(field: str, value: str) -> bool:
    """Return whether a recipe's field names a file."""
    is_data = field.endswith("calibration") and value not in DATA_NAMES
    return is_data or field == "gguf_imatrix"


def _format(layers: LinearFormat) -> str:
    """A precision, or a table of it and what is not as usual."""
    usual = LinearFormat(layers.precision)
    entries = [
        f"{name} = {_value(value)}"
        for name, value in _fields(layers)
        if name == "precision" or value != getattr(usual, name)
    ]
    return _value(layers.precision) if len(entries) == 1 else f"{{ {', '.join(entries)} }}"


def _fields(data: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(data, field.name)) for field in dataclasses.fields(data)]


def _value(value: str | bool | float) -> str:
    """JSON's spelling of these is TOML's too."""
    return json.dumps(value, ensure_ascii=False)
