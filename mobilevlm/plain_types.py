"""Trees of frozen dataclasses as plain JSON types, and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

from mobilevlm.errors import MobileVLMError

T = TypeVar("T")


def to_dict(value: Any) -> Any:
    """A spec as plain JSON types."""
    return dataclasses.asdict(value)


def from_dict(cls: type[T], data: Any, where: str, strict: bool = False) -> T:
    """Rebuilds a dataclass tree from JSON types; ``where`` names the place in error messages.

    ``strict``: keys that no field has are an error (what a person wrote, with a typing mistake);
    else they are ignored (what a later version wrote).

    Raises:
        MobileVLMError: a key is missing or unknown, or a value has the wrong type.
    """
    value = _convert(cls, data, where, strict)
    return typing.cast(T, value)


def _convert(expected: Any, data: Any, where: str, strict: bool) -> Any:
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        if not isinstance(data, dict):
            raise MobileVLMError(f"{where}: expected an object, found {data!r:.60}")
        hints = typing.get_type_hints(expected)
        unknown = [key for key in data if key not in hints]
        if strict and unknown:
            raise MobileVLMError(
                f"{where}: key {unknown[0]!r} is not known: expected {', '.join(hints)}"
            )
        values = {}
        for field in dataclasses.fields(expected):
            key = field.name
            if key not in data and field.metadata.get("formerly") in data:
                key = field.metadata["formerly"]  # written by an earlier version
            if key in data:
                value = data[key]
                if not strict and isinstance(value, str):  # a value of an earlier version
                    value = field.metadata.get("formerly_said", {}).get(value, value)
                if "formerly_kind" in field.metadata and isinstance(value, dict):
                    value = {"kind": field.metadata["formerly_kind"], **value}
                values[field.name] = _convert(hints[field.name], value, f"{where}.{key}", strict)
            elif field.default is field.default_factory is dataclasses.MISSING:
                raise MobileVLMError(f"{where}: key {field.name!r} is missing")
        return expected(**values)  # type: ignore[operator]
    if origin is tuple:
        if not isinstance(data, (list, tuple)) or (args[-1] is not ... and len(data) != len(args)):
            raise MobileVLMError(f"{where}: expected a list, found {data!r:.60}")
        kinds = args[:1] * len(data) if args[-1] is ... else args
        return tuple(
            _convert(kind, item, f"{where}[{index}]", strict)
            for index, (kind, item) in enumerate(zip(kinds, data, strict=True))
        )
    if origin is dict:
        if not isinstance(data, dict):
            raise MobileVLMError(f"{where}: expected an object, found {data!r:.60}")
        return {
            key: _convert(args[1], item, f"{where}.{key}", strict) for key, item in data.items()
        }
    if origin is Literal:
        if data not in args:
            known = ", ".join(map(repr, args))
            raise MobileVLMError(f"{where}: expected one of {known}, found {data!r:.60}")
        return data
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        among = [arg for arg in args if arg is not type(None)]
        chosen = among[0] if len(among) == 1 else _of_kind(among, data, where)
        return _convert(chosen, data, where, strict)
    if expected is float and type(data) is int and abs(data) < 1 << 1023:
        return float(data)
    if expected is not Any and type(data) is not expected:
        raise MobileVLMError(f"{where}: expected {expected.__name__}, found {data!r:.60}")
    return data


def _of_kind(kinds: list[Any], data: Any, where: str) -> Any:
    """Return the dataclass of a union that the data's ``kind`` names."""
    named = {one.kind: one for one in kinds}
    if not isinstance(data, dict):
        raise MobileVLMError(f"{where}: expected an object, found {data!r:.60}")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in named:
        raise MobileVLMError(
            f"{where}: expected the kind {' or '.join(map(repr, named))}, found {kind!r:.60}"
        )
    return named[kind]
