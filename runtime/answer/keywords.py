"""Keywords of JSON Schema, and those of a schema that it does not have."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from mobilevlm.console.terminal import shown

KEYWORDS = frozenset((
    "$anchor", "$comment", "$defs", "$id", "$ref", "$schema", "additionalItems",
    "additionalProperties", "allOf", "anyOf", "const", "contains", "contentEncoding",
    "contentMediaType", "contentSchema", "default", "definitions", "dependencies",
    "dependentRequired", "dependentSchemas", "deprecated", "description", "else", "enum",
    "examples", "exclusiveMaximum", "exclusiveMinimum", "format", "if", "items", "maxContains",
    "maxItems", "maxLength", "maxProperties", "maximum", "minContains", "minItems", "minLength",
    "minProperties", "minimum", "multipleOf", "not", "oneOf", "pattern", "patternProperties",
    "prefixItems", "properties", "propertyNames", "readOnly", "required", "then", "title", "type",
    "unevaluatedItems", "unevaluatedProperties", "uniqueItems", "writeOnly",
))  # fmt: skip
"""Keywords of JSON Schema."""
_NAMED = (
    "$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties",
)  # fmt: skip
"""Keywords whose value has schemas under names of its own."""
_DATA = ("const", "default", "enum", "examples", "required", "dependentRequired")
"""Keywords whose value is no schema."""
MOST_NAMED = 3
"""Unknown keywords after which a schema is not read further."""
_LONGEST = max(map(len, KEYWORDS)) + 8
"""Characters of a name that may be a slip of the pen."""


def unknown_keywords(schema: object) -> list[str]:
    """Return the first keys of a schema that JSON Schema does not have: no more than
    ``MOST_NAMED``. Names that begin with ``x-`` are notes."""
    found: list[str] = []
    left: list[Any] = [schema]
    while left and len(found) < MOST_NAMED:
        value = left.pop()
        if isinstance(value, dict):
            left += _schemas_in(value, found)
        elif isinstance(value, (list, tuple)):
            left += reversed(value)
    return found


def about_unknown(keys: Sequence[str]) -> str:
    """Return a line about unknown keywords, with the one that is likely meant."""
    named = ", ".join(_named(key) for key in keys)
    verb = "is no keyword" if len(keys) == 1 else "are no keywords"
    more = " (the schema is not read further)" if len(keys) == MOST_NAMED else ""
    return f"{named} {verb} of JSON Schema and would not be followed{more}"


def _named(key: str) -> str:
    near = []
    if len(key) <= _LONGEST:
        near = difflib.get_close_matches(key, KEYWORDS, n=1, cutoff=0.8)
    hint = f" (is {near[0]!r} meant?)" if near else ""
    return f"{shown(key, 60)!r}{hint}"


def _schemas_in(schema: Mapping[Any, Any], unknown: list[str]) -> list[Any]:
    """Return values of a schema that are schemas, the last one first; its unknown keys are appended
    to ``unknown``."""
    inner: list[Any] = []
    for key, value in schema.items():
        if key in KEYWORDS:
            if key in _NAMED and isinstance(value, dict):
                inner += value.values()
            elif key not in _DATA:
                inner.append(value)
        elif not str(key).startswith("x-") and len(unknown) < MOST_NAMED:
            unknown.append(str(key))
    return inner[::-1]
