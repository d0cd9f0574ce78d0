"""The format of each linear layer of a model: which entry of a recipe's ``layers`` it has, what it
makes of the weights, and how many bytes these take."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.console import progress
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.quantize import gptq, hqq, mse, rtn
from mobilevlm.export.quantize.blocks import Float32, Quantized, dequantize, packed_size
from mobilevlm.export.quantize.folding import free_folds
from mobilevlm.export.quantize.gptq import HessianOf
from mobilevlm.linear_groups import LinearGroup, decoder_groups, linear_groups
from mobilevlm.recipe import PREFILL_LAYERS, QDQ, LinearFormat, Recipe
from mobilevlm.spec import ModelSpec

DOWN = "@down_proj"
HALF_DOWN = "@half_down_proj"
SHARED_KV = "@shared_kv_proj"
DECODER_ROLES = (DOWN, HALF_DOWN, SHARED_KV)
"""Keys of ``layers`` that every family knows: the layers that make the outputs of the decoder's
dense MLPs, of all layers or of the half whose rounding costs most, since their inputs have the
largest outliers; those that make keys and values which several query heads share."""
TOWER_QKV = "@tower_qkv_proj"
TOWER_DOWN = "@tower_down_proj"
TOWER_ROLES = (TOWER_QKV, TOWER_DOWN)
"""Likewise of the vision tower or audio encoder: the layers that make queries, keys and values, and
those that make the outputs of its MLPs."""
ROLES = (*DECODER_ROLES, *TOWER_ROLES)
_TOWERS = ("vision.", "audio.")
_TOWER_LEAVES = {
    TOWER_QKV: (".attn.q_proj", ".attn.k_proj", ".attn.v_proj"),
    TOWER_DOWN: (".mlp.fc2", ".mlp.down_proj", ".ff1.fc2", ".ff2.fc2"),
}


def expand_layers(recipe: Recipe, spec: ModelSpec, *, quiet: bool = False) -> Recipe:
    """Return the recipe with an entry of ``layers`` for each layer that a key stands for, and of
    ``prefill_layers`` likewise.

    A key is a layer's canonical name, which stands for its whole group, a pattern with ``*``, or
    one of ``ROLES``. Names go before the others, and of several others the last counts. A role
    leaves factors out where nothing before a layer takes them. It may stand for no layer of this
    model, which is said unless ``quiet``, and ``SHARED_KV`` for a
    part of a group.

    Raises:
        MobileVLMError: a key stands for nothing, layers of one group differ, nothing can take the
            factors of a scaling, or a layer is in a stage of fixed point.
    """
    layers = _expanded(recipe, spec, "layers", quiet)
    if recipe.prefill is None:
        return replace(recipe, layers=layers)
    of_prefill = replace(recipe, decoder=recipe.prefill, layers=recipe.prefill_layers)
    prefill_layers = _expanded(of_prefill, spec, PREFILL_LAYERS, quiet)
    return replace(recipe, layers=layers, prefill_layers=prefill_layers)


def _expanded(recipe: Recipe, spec: ModelSpec, field: str, quiet: bool) -> dict[str, LinearFormat]:
    """Return ``layers`` of a recipe with an entry for each layer. ``field``: its name there."""
    groups = list(decoder_groups(spec.decoder) if field == PREFILL_LAYERS else linear_groups(spec))
    places = free_folds(spec, rotated=recipe.is_rotated)
    foldable = {name for place in places for name in place.consumers}
    patterns: dict[str, LinearFormat] = {}
    named: dict[str, tuple[str, LinearFormat]] = {}
    for key, layers in recipe.layers.items():
        where = f"recipe {recipe.name!r}: {field}.{key}"
        is_role = key.startswith("@")
        is_pattern = "*" in key or is_role
        chosen_names = _names_of_role(key, where, spec.decoder, groups) if is_role else set()
        found = [
            group
            for group in groups
            if not chosen_names.isdisjoint(group.names)
            or any(fnmatchcase(name, key) if is_pattern else name == key for name in group.names)
        ]
        if is_role and not found:
            stage = "vision" if key in TOWER_ROLES else "decoder"
            _check_fixed_point(recipe, f"{stage}.layers.0", where)
            if not quiet:
                progress.say(f"layers      {key} stands for no layer of {spec.name}")
            continue
        if not found:
            raise MobileVLMError(f"{where}: no such layer: {_remedy(key, groups)}")
        has_place = not foldable.isdisjoint(group.name for group in found)
        if layers.has_factors and not (is_role or has_place):
            beside = " beside the decoder's rotation" if recipe.is_rotated else ""
            raise MobileVLMError(
                f"{where}.scaling: nothing before takes the factors{beside}: leave it out"
            )
        _check_stage(recipe, found, where)
        for group in found:
            if is_pattern:
                names = chosen_names.intersection(group.names) or group.names
                if is_role and layers.has_factors and group.name not in foldable:
                    patterns |= dict.fromkeys(names, replace(layers, scaling="none"))
                else:
                    patterns |= dict.fromkeys(names, layers)
                continue
            other, format_there = named.setdefault(group.name, (key, layers))
            if format_there != layers:
                raise MobileVLMError(
                    f"{where}: {other} has another format, and both are one product with "
                    f"{', '.join(group.names)}: keep one of the entries"
                )
    members = {group.name: group.names for group in groups}
    single = {name: layers for first, (_, layers) in named.items() for name in members[first]}
    chosen = {**patterns, **single}
    order = (name for names in members.values() for name in names if name in chosen)
    return {name: chosen[name] for name in order}


def _names_of_role(
    key: str, where: str, decoder: DecoderSpec, groups: Iterable[LinearGroup]
) -> set[str]:
    """Return the names of the layers that a role stands for. ``groups``: of the whole model.

    Raises:
        MobileVLMError: no such role.
    """
    if key not in ROLES:
        raise MobileVLMError(f"{where}: no such role: expected {', '.join(ROLES)}")
    if key in TOWER_ROLES:
        names = {name for group in groups for name in group.names}
        ends = _TOWER_LEAVES[key]
        return {name for name in names if name.startswith(_TOWERS) and name.endswith(ends)}
    count = decoder.num_hidden_layers
    if key == SHARED_KV:
        if decoder.encoder_layers or decoder.num_key_value_heads == decoder.num_attention_heads:
            return set()
        attention = (f"decoder.layers.{layer}.attn" for layer in range(count))
        return {f"{attn}.{part}_proj" for attn in attention for part in "kv"}
    layers = [
        layer
        for layer in range(count)
        if not decoder.num_experts(layer) and (key == DOWN or _is_sensitive(layer, count))
    ]
    _, maker = decoder.mlp_linears
    return {f"{mlp}.{maker}" for layer in layers for mlp in decoder.mlp_names(layer)}


def _is_sensitive(layer: int, count: int) -> bool:
    """Return whether a layer is in the first or last eighth, or each third one between."""
    edge = count // 8
    return layer < edge or layer >= count - edge or (layer - edge) % 3 == 2


def _check_stage(recipe: Recipe, groups: Iterable[LinearGroup], where: str) -> None:
    """Raises MobileVLMError: a group is in a stage that is in fixed point as a whole."""
    for group in groups:
        _check_fixed_point(recipe, group.name, where)


def _check_fixed_point(recipe: Recipe, name: str, where: str) -> None:
    """Raises MobileVLMError: the layer is in a stage that is in fixed point as a whole."""
    here = replace(recipe, layers={}).format_of(name)
    if here.precision in QDQ:
        raise MobileVLMError(
            f"{where}: {name} is in a graph that is {here.precision} as a whole: leave it out"
        )


def _remedy(key: str, groups: Iterable[LinearGroup]) -> str:
    names = [name for group in groups for name in group.names]
    if "*" in key:
        return f"a pattern must match one of {names[0]} … {names[-1]}"
    nearest = difflib.get_close_matches(key, names, 1, cutoff=0)
    return f"did you mean {nearest[0]}?"


def quantize(weight: Float32, layers: LinearFormat, name: str, hessian: HessianOf) -> Quantized:
    """``weight (out_size, in_size)`` as the format's integers; ``name`` of a layer that reads its
    inputs. The format must not be a float."""
    assert layers.scheme is not None
    if layers.quantizer == "gptq":
        moments = hessian(name)
        if moments is not None:
            return gptq.quantize(weight, layers.scheme, moments)
        return mse.quantize(weight, layers.scheme)  # an expert that no calibration token chose
    quantizers = {"rtn": rtn.quantize, "mse": mse.quantize, "hqq": hqq.quantize}
    return quantizers[layers.quantizer](weight, layers.scheme)


def restored(weight: Float32, layers: LinearFormat, name: str, hessian: HessianOf) -> Float32:
    """``weight (out_size, in_size)`` as it is after storing: arguments of :func:`quantize`."""
    if layers.scheme is not None:
        return dequantize(quantize(weight, layers, name, hessian))
    return to_half(weight).astype(np.float32) if layers.precision == "fp16" else weight


def to_half(weight: NDArray[Any]) -> NDArray[np.float16]:
    """float16, saturated: a bfloat16 weight beyond 65504 would become infinite."""
    limit = np.finfo(np.float16).max
    return weight.clip(-limit, limit).astype(np.float16)


def stored_bytes(layers: LinearFormat, group: LinearGroup) -> int:
    """Return the bytes that the weights of a group take in an ONNX file, with scales and zero
    points."""
    scheme = layers.scheme
    if scheme is None:
        return group.size * (2 if layers.precision == "fp16" else 4)
    blocks = scheme.blocks(group.in_size)
    row = blocks * packed_size(scheme.block(group.in_size), scheme.bits)
    row += blocks * (4 if scheme.block_size is None else 2)  # scales
    if not scheme.symmetric:
        row += packed_size(blocks, scheme.bits)
    return row * group.out_size


def bits_per_weight(recipe: Recipe, groups: Iterable[LinearGroup]) -> float:
    """Mean over the weights of the groups, with scales and zero points."""
    layers = [layer for group in groups for layer in group.layers]
    size = sum(stored_bytes(recipe.format_of(layer.name), layer) for layer in layers)
    return 8 * size / sum(layer.size for layer in layers)
