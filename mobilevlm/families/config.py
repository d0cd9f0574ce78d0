"""Checked values of config.json and what goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from mobilevlm.checkpoint import read_json
from mobilevlm.errors import CheckpointError

T = TypeVar("T")

_LARGEST = 2**31 - 1
RANGES: dict[str, tuple[float, float]] = {
    "num_hidden_layers": (1, 10_000),
    "num_layers": (1, 10_000),
    "num_decoder_layers": (1, 10_000),
    "max_position_embeddings": (1, 2**21),
    "n_positions": (1, 2**21),
    "seq_length": (1, 2**21),
    "model_max_length": (1, 2**21),
    "rope_theta": (1, 1e12),
    "rotary_emb_base": (1, 1e12),
    "factor": (1e-3, 1e4),
    "rms_norm_eps": (0, 1),
    "norm_eps": (0, 1),
    "layer_norm_eps": (0, 1),
    "layer_norm_epsilon": (0, 1),
    "relative_attention_num_buckets": (2, 2**16),
    "relative_attention_max_distance": (2, 2**21),
    "image_size": (1, 2**14),
}
"""Lowest and highest values of keys that no tensor's shape bounds, or that bound a loop before
tensors are looked at."""
QUANTIZER_FILES = ("quantize_config.json", "quant_config.json")
"""Settings of AutoGPTQ and AWQ beside a config.json that does not tell."""
_QUANTIZED = "quantization_config"
_ROPE_KEYS = {
    *("type", "rope_type", "factor", "rope_theta", "partial_rotary_factor"),
    "original_max_position_embeddings",
}
"""Keys that the types ``linear`` and ``default`` have; the last one has no effect with them."""


def config_value(
    path: Path, config: dict[str, Any], key: str, kind: type[T], default: T | None = None
) -> T:
    """Return the value of a key; ``null`` counts as absent, numbers must be positive, and in
    the range that :data:`RANGES` has for the key.

    Raises:
        CheckpointError: it is absent and has no default, or is of another kind or out of range.
    """
    value = config.get(key)
    if value is None:
        if default is None:
            raise CheckpointError(f"{path}: key {key!r} is missing, expected {kind.__name__}")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(min(max(value, -(10**300)), 10**300))
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise CheckpointError(f"{path}: {key!r} is {value!r:.60}, expected {kind.__name__}")
    if kind in (int, float):
        _check_range(path, key, config[key])
    return value


def check_only(path: Path, config: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise CheckpointError where a key has another value than the only one that is supported;
    ``null`` counts as absent."""
    for key, value in expected.items():
        found = config.get(key)
        if found is not None and (found != value or type(found) is not type(value)):
            raise CheckpointError(f"{path}: {key!r} is {found!r:.60}, expected {value!r}")


def _check_range(path: Path, key: str, value: float) -> None:
    if value <= 0:
        raise CheckpointError(f"{path}: {key!r} is {value!r:.60}, expected a positive number")
    lowest, highest = RANGES.get(key, (0, _LARGEST))
    if not lowest <= value <= highest:
        raise CheckpointError(
            f"{path}: {key!r} is {value!r:.60}, expected a number from {lowest:.10g} to "
            f"{highest:.10g}"
        )


def read_config(path: Path, required_for: str) -> dict[str, Any]:
    """Return the content of a config.json whose weights are not quantized.

    Raises:
        CheckpointError: they are; or the file is missing or damaged.
    """
    config = read_json(path, required_for=required_for)
    refuse_quantized(path, config)
    for name in QUANTIZER_FILES:
        if (path.parent / name).is_file():
            refuse_quantized(path.parent / name, {_QUANTIZED: read_json(path.parent / name)})
    return config


def refuse_quantized(path: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError where a configuration says that another tool has quantized the weights
    (bitsandbytes, GPTQ, AWQ, fp8 …)."""
    settings = config.get(_QUANTIZED)
    if not settings:
        return
    method: Any = None
    if isinstance(settings, dict):
        bits = {4: "load_in_4bit", 8: "load_in_8bit"}
        known = [f"bitsandbytes {count} bits" for count, key in bits.items() if settings.get(key)]
        method = next(iter(known), settings.get("quant_method") or settings.get("quant_algo"))
    named = f" by {method!s:.40}" if method else ""
    raise CheckpointError(
        f"{path}: {_QUANTIZED!r}: these weights were quantized{named}: give the checkpoint as it "
        f"was before quantization (export quantizes by --recipe)"
    )


def rope_scaling(path: Path, config: dict[str, Any]) -> float:
    """Return the factor of linear position interpolation, 1 without (no scaling, or the type
    ``default``).

    Raises:
        CheckpointError: another type of scaling, or a setting that is not supported.
    """
    scaling = config_value(path, config, "rope_scaling", dict, {})
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in (None, "default", "linear"):
        raise CheckpointError(
            f"{path}: 'rope_scaling' has the type {kind!r:.40}, which is not supported: expected "
            f"'linear', 'default' or none"
        )
    if unknown := sorted(scaling.keys() - _ROPE_KEYS):
        raise CheckpointError(
            f"{path}: 'rope_scaling' has {unknown[0]!r:.40}, which is not supported with type "
            f"{kind!r}"
        )
    if kind == "linear":
        where = path.with_name(f"{path.name}: 'rope_scaling'")
        return config_value(where, scaling, "factor", float)
    if kind is None and scaling.get("factor") is not None:
        raise CheckpointError(
            f"{path}: 'rope_scaling' has a factor but no type: expected 'linear' or 'default'"
        )
    return 1.0


def end_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """``eos_token_id`` of generation_config.json, else of config.json: a number, several or none.

    Raises:
        CheckpointError: something else.
    """
    where = folder / "generation_config.json"
    settings = read_json(where) if where.is_file() else {}
    if settings.get("eos_token_id") is None:
        where, settings = folder / "config.json", config
    value = settings.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not ids or any(type(index) is not int or not 0 <= index <= _LARGEST for index in ids):
        raise CheckpointError(f"{where}: 'eos_token_id' is {value!r:.60}, expected a token id")
    return tuple(ids)
