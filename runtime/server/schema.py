"""JSON values checked against the schemas that the OpenAPI description shows: the part of JSON
Schema that these use."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from mobilevlm.runtime.server.errors import refuse, shown_key

Schema: TypeAlias = Mapping[str, Any]

_IS: dict[str, Callable[[Any], bool]] = {
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: (  # 2.0 too, as in JSON Schema
        isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    ),
    "number": lambda value: (
        isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    ),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}
_A_KIND = {"array": "a list", "object": "an object", "integer": "a whole number", "null": "null"}


def check_value(place: str, value: Any, schema: Schema) -> None:
    """Refuse a value that does not follow its schema. ``place``: of the value, for the message.

    Raises:
        ApiError: names the place and what is expected there.
    """
    if "anyOf" in schema:
        fitting = [item for item in schema["anyOf"] if _IS[item["type"]](value)]
        if not fitting:
            kinds = " or ".join(_kind(item["type"]) for item in schema["anyOf"])
            raise refuse(place, f"expected {kinds}, found {_shown(value)}")
        check_value(place, value, fitting[0])
        return
    if "enum" in schema:
        alike = [item for item in schema["enum"] if value == item]  # 1, 1.0 and True
        if not any(isinstance(value, bool) == isinstance(item, bool) for item in alike):
            known = ", ".join(json.dumps(item) for item in schema["enum"])
            raise refuse(place, f"expected {known}, found {_shown(value)}")
        return
    if not _IS[schema["type"]](value):
        raise refuse(place, f"expected {_kind(schema['type'])}, found {_shown(value)}")
    _check_range(place, value, schema)
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            check_value(f"{place}[{index}]", item, schema["items"])
    if isinstance(value, dict) and "properties" in schema:
        _check_object(place, value, schema)


def _check_range(place: str, value: Any, schema: Schema) -> None:
    size, of = value, ""
    if isinstance(value, str | list):
        size, of = len(value), " characters" if isinstance(value, str) else " entries"
    least = schema.get("minimum", schema.get("minLength", schema.get("minItems")))
    most = schema.get("maximum", schema.get("maxLength", schema.get("maxItems")))
    if least is not None and size < least:
        raise refuse(place, f"expected {least}{of} or more, found {_shown(value)}")
    if most is not None and size > most:
        raise refuse(place, f"expected {most}{of} at most, found {_shown(size)}")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if above is not None and size <= above:
        raise refuse(place, f"expected a number above {above}, found {_shown(value)}")
    if below is not None and size >= below:
        raise refuse(place, f"expected a number below {below}, found {_shown(value)}")


def _check_object(place: str, value: Mapping[str, Any], schema: Schema) -> None:
    for name, item in value.items():
        if name not in schema["properties"]:
            known = ", ".join(schema["properties"])
            raise refuse(f"{place}.{shown_key(name)}", f"unknown field, expected {known}")
        if item is None and name not in schema.get("required", ()):
            continue  # as if it were left out
        check_value(f"{place}.{name}", item, schema["properties"][name])
    for name in schema.get("required", ()):
        if name not in value:
            raise refuse(f"{place}.{name}", "missing")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _kind(name: str) -> str:
    return _A_KIND.get(name, f"a {name}")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:60]}…"
