"""LoRA adapters as PEFT saves them: adapter_config.json and tensors named after modules.

Source of the arithmetic: peft/tuners/lora/layer.py (``scaling``, ``get_delta_weight``) and
peft/utils/other.py (``get_pattern_key``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm.adapters.merging import Addition, Product, Stored, Sum, TableProduct
from mobilevlm.checkpoint import TensorFiles, read_json
from mobilevlm.errors import CheckpointError

_MERGE = "merge it with peft's merge_and_unload() and give the result"
_READ = frozenset({
    "alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias",
    "modules_to_save", "peft_type", "r", "rank_pattern", "use_dora", "use_rslora",
})  # fmt: skip
_NO_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "merge_weights", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
})  # fmt: skip
"""Keys about training alone, or which the tensors show themselves. The settings of an
initialization count with ``init_lora_weights`` alone."""
_KINDS_OF_START = (None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights``, beside true and false, that leave the base as it is."""
_PLAIN_PATTERN = re.compile(r"(?:[\w.\-^$|()]|\\[.d]|\[[\w\-^]+\]|(?<=[\w.\]])[*+?]){1,200}")
_MOST_QUANTIFIERS, _MOST_GROUPS = 3, 1
"""More of them, and a pattern may take for ever to match."""
_LONGEST_NAME = 300

_LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<kind>weight|bias))?"
)
_WRAPPERS = re.compile(r"\.modules_to_save(\.default)?(?=\.)|\.base_layer(?=\.)")


@dataclass(frozen=True)
class LoraConfig:
    """Arithmetic of an adapter, as adapter_config.json gives it."""

    path: Path
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    """By a pattern of module names (``rank_pattern``)."""
    alphas: Mapping[str, float]
    rank_stabilized: bool
    """The factor is alpha / √r instead of alpha / r."""
    modules_to_save: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        return self.ranks.get(_pattern_for(self.ranks, module), self.rank)

    def factor_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = self.alphas.get(_pattern_for(self.alphas, module), self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank


def read_lora_config(path: Path) -> LoraConfig:
    """Read adapter_config.json.

    Raises:
        CheckpointError: it is missing or damaged, or asks for arithmetic that is not supported.
    """
    config = read_json(path, required_for="it says how a LoRA adapter is scaled")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path}: 'peft_type' is {kind!r:.60}, expected 'LORA': other adapters are not merged "
            f"here: {_MERGE}"
        )
    _refuse_variants(path, config)
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise _wrong(path, "modules_to_save", saved, "a list of names")
    return LoraConfig(
        path,
        _rank(path, "r", config.get("r", 8)),
        _alpha(path, "lora_alpha", config.get("lora_alpha", 8)),
        {key: _rank(path, key, value) for key, value in _patterns(path, config, "rank_pattern")},
        {key: _alpha(path, key, value) for key, value in _patterns(path, config, "alpha_pattern")},
        _flag(path, config, "use_rslora"),
        tuple(saved),
    )


def _refuse_variants(path: Path, config: dict[str, Any]) -> None:
    if _flag(path, config, "use_dora"):
        raise CheckpointError(f"{path}: a DoRA adapter ('use_dora') is not merged here: {_MERGE}")
    for key in sorted(config.keys() - _READ - _NO_EFFECT):
        if config[key] not in (None, False, [], {}):
            raise CheckpointError(
                f"{path}: {key!r:.60} is {config[key]!r:.60}, a variant of LoRA that is not "
                f"supported: {_MERGE}"
            )
    start = config.get("init_lora_weights")
    if not isinstance(start, bool) and start not in _KINDS_OF_START:
        raise CheckpointError(
            f"{path}: 'init_lora_weights' is {start!r:.60}, which changes the base's weights too: "
            f"{_MERGE}"
        )
    if config.get("bias", "none") not in ("none", "lora_only", "all"):
        raise _wrong(path, "bias", config["bias"], "none, lora_only or all")
    _flag(path, config, "fan_in_fan_out")  # PEFT resets it for a Linear, the only kind here
    _flag(path, config, "lora_bias")


def _patterns(path: Path, config: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise _wrong(path, key, patterns, "an object")
    for pattern in patterns:
        if not _is_simple(pattern):
            raise CheckpointError(
                f"{path}: the pattern {pattern!r:.60} in {key!r} is not supported (names and "
                f"simple expressions are): {_MERGE}"
            )
    return list(patterns.items())


def _is_simple(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return (
        _PLAIN_PATTERN.fullmatch(pattern) is not None
        and sum(map(pattern.count, "*+?")) <= _MOST_QUANTIFIERS
        and pattern.count("(") <= _MOST_GROUPS
    )


def _pattern_for(patterns: Mapping[str, object], module: str) -> str:
    """Return the first pattern that matches the end of a module's name, else the name."""
    found = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    return next(found, module)


def _flag(path: Path, config: dict[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise _wrong(path, key, value, "true or false")
    return bool(value)


def _rank(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 20:
        raise _wrong(path, key, value, "a positive number")
    return value


def _alpha(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise _wrong(path, key, value, "a number")
    return float(value)


def _wrong(path: Path, key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: {key!r:.60} is {value!r:.60}, expected {expected}")


@dataclass(frozen=True)
class LoraTensors:
    """The content of an adapter's weight file, by the base's tensors that it changes."""

    replacements: dict[str, Stored]
    additions: dict[str, tuple[Addition, ...]]


def model_name(name: str) -> str:
    """Return the name of a tensor in the model itself, without what PEFT puts around modules."""
    return _WRAPPERS.sub("", name.removeprefix("base_model.model."))


def lora_tensors(config: LoraConfig, files: TensorFiles) -> LoraTensors:
    """Sort the tensors of an adapter's weight file.

    Raises:
        CheckpointError: one is of an unknown kind, given twice, without its partner, or of another
            rank than the configuration says.
    """
    pairs: dict[tuple[str, str], dict[str, Stored]] = {}
    replacements: dict[str, Stored] = {}
    for name in files:
        found, stored = _LORA.fullmatch(name), Stored(files, name)
        if len(name) > _LONGEST_NAME or (found is None and "lora_" in name):
            raise CheckpointError(
                f"{files.folder}: tensor {name!r:.120} is of a variant of LoRA that is not "
                f"supported: {_MERGE}"
            )
        if found is None:
            place: dict[str, Stored] = replacements
            key = model_name(name)
        else:
            module = model_name(found["module"] + ".")[:-1]
            part, bias = found["part"], found["kind"] == "bias"
            place = pairs.setdefault((module, "embedding" if "embedding" in part else ""), {})
            key = part[-1] + ("bias" if bias else "")
        if key in place:
            raise CheckpointError(
                f"{files.folder}: tensors {place[key].name!r:.120} and {name!r:.120} are for the "
                f"same module: give a folder with one adapter"
            )
        place[key] = stored
    additions: dict[str, tuple[Addition, ...]] = {}
    for (module, kind), pair in pairs.items():
        for name, addition in _additions(config, files.folder, module, kind, pair).items():
            additions[name] = (*additions.get(name, ()), addition)
    return LoraTensors(replacements, additions)


def _additions(
    config: LoraConfig,
    folder: Path,
    module: str,
    kind: str,
    pair: Mapping[str, Stored],
) -> dict[str, Addition]:
    if "A" not in pair or "B" not in pair or "Abias" in pair:
        only = next(iter(pair.values())).name
        raise CheckpointError(
            f"{folder}: {only!r:.120} is without its partner: LoRA needs A and B of a module: "
            f"download the adapter again"
        )
    a, b, factor = pair["A"], pair["B"], config.factor_of(module)
    if a.shape[:1] != (config.rank_of(module),):
        raise CheckpointError(
            f"{folder}: tensor {a.name!r:.120} has shape {list(a.shape)}, but its rank is "
            f"{config.rank_of(module)} in {config.path.name}: these files are of different adapters"
        )
    product = TableProduct(a, b, factor) if kind else Product(a, b, factor)
    found: dict[str, Addition] = {f"{module}.weight": product}
    if "Bbias" in pair:
        found[f"{module}.bias"] = Sum(pair["Bbias"], factor)
    return found
