"""Checked values of config.json and what goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from mobilevlm.checkpoint import read_json
from mobilevlm.errors import CheckpointError

T = TypeVar("T")


def config_value(
    path: Path, config: dict[str, Any], key: str, kind: type[T], default: T | None = None
) -> T:
    """The value of a key; ``null`` counts as absent, numbers must be positive.

    Raises:
        CheckpointError: it is absent and has no default, or is of another kind.
    """
    value = config.get(key)
    if value is None:
        if default is None:
            raise CheckpointError(f"{path}: key {key!r} is missing, expected {kind.__name__}")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise CheckpointError(f"{path}: {key!r} is {value!r:.60}, expected {kind.__name__}")
    if isinstance(value, (int, float)) and kind is not bool and value <= 0:
        raise CheckpointError(f"{path}: {key!r} is {value!r}, expected a positive number")
    return value


def rope_scaling(path: Path, config: dict[str, Any]) -> float:
    """The factor of linear position interpolation, 1 without.

    Raises:
        CheckpointError: another kind of scaling.
    """
    scaling = config.get("rope_scaling")
    if scaling is None:
        return 1.0
    kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else scaling
    if kind != "linear":
        raise CheckpointError(f"{path}: 'rope_scaling' is {scaling!r:.60}, expected type 'linear'")
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or factor <= 0:
        raise CheckpointError(f"{path}: 'rope_scaling' is {scaling!r:.60}, expected a 'factor'")
    return float(factor)


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
    if not ids or any(type(index) is not int or index < 0 for index in ids):
        raise CheckpointError(f"{where}: 'eos_token_id' is {value!r:.60}, expected a token id")
    return tuple(ids)
