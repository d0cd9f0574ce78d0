"""The format of each linear layer of a model: which entries of a recipe's ``layers`` it has, what
it takes in a file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from mobilevlm.errors import MobileVLMError
from mobilevlm.export.linear_groups import LinearGroup, linear_groups
from mobilevlm.export.quantize.blocks import packed_size
from mobilevlm.export.quantize.folding import find_folds
from mobilevlm.export.recipes import LinearFormat, Recipe
from mobilevlm.spec import ModelSpec


def expand_layers(recipe: Recipe, spec: ModelSpec) -> Recipe:
    """The recipe with an entry of ``layers`` for each layer that a key stands for.

    A key is a layer's canonical name, which stands for its whole group, or a pattern with ``*``.
    Names go before patterns, and of several patterns the last counts.

    Raises:
        MobileVLMError: a key stands for nothing, layers of one group differ, or nothing can take
            the factors of a scaling.
    """
    groups = list(linear_groups(spec))
    foldable = {place.consumers[0] for place in find_folds(spec)}
    patterns: dict[str, LinearFormat] = {}
    named: dict[str, tuple[str, LinearFormat]] = {}
    for key, layers in recipe.layers.items():
        where = f"recipe {recipe.name!r}: layers.{key}"
        is_pattern = "*" in key
        found = [
            group
            for group in groups
            if any(fnmatchcase(name, key) if is_pattern else name == key for name in group.names)
        ]
        if not found:
            raise MobileVLMError(f"{where}: no such layer: {_remedy(key, groups)}")
        if layers.scaling != "none" and foldable.isdisjoint(group.name for group in found):
            raise MobileVLMError(f"{where}.scaling: nothing before takes the factors: leave it out")
        for group in found:
            if is_pattern:
                patterns[group.name] = layers
                continue
            other, format_there = named.setdefault(group.name, (key, layers))
            if format_there != layers:
                raise MobileVLMError(
                    f"{where}: {other} has another format, and both are one product with "
                    f"{', '.join(group.names)}: keep one of the entries"
                )
    chosen = {**patterns, **{name: layers for name, (_, layers) in named.items()}}
    members = {group.name: group.names for group in groups}
    expanded = {member: layers for name, layers in chosen.items() for member in members[name]}
    return replace(recipe, layers=expanded)


def _remedy(key: str, groups: Iterable[LinearGroup]) -> str:
    names = [name for group in groups for name in group.names]
    if "*" in key:
        return f"a pattern must match one of {names[0]} … {names[-1]}"
    nearest = difflib.get_close_matches(key, names, 1, cutoff=0)
    return f"did you mean {nearest[0]}?"


def stored_bytes(layers: LinearFormat, group: LinearGroup) -> int:
    """What the weights of a group take in an ONNX file, with scales and zero points."""
    scheme = layers.scheme
    if scheme is None:
        return group.size * (2 if layers.precision == "fp16" else 4)
    blocks = scheme.blocks(group.in_size)
    row = blocks * packed_size(scheme.block(group.in_size), scheme.bits)
    row += blocks * 4  # scales, float32
    if not scheme.symmetric:
        row += packed_size(blocks, scheme.bits)
    return row * group.out_size


def bits_per_weight(recipe: Recipe, groups: Iterable[LinearGroup]) -> float:
    """Mean over the weights of the groups, with scales and zero points."""
    groups = list(groups)
    size = sum(stored_bytes(recipe.format_of(group.name), group) for group in groups)
    return 8 * size / sum(group.size for group in groups)
