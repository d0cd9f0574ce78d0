"""Manifests of schema 1, which knew one image input: read as those of today."""

from __future__ import annotations

from typing import Any

_PARTS = {"image": "preparation", "vision": "encoder", "projector": "connector"}
"""Keys of a spec that are parts of its image input today."""


def upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest of schema 1 in today's schema; what is wrong in it stays for the reader of
    that to name."""
    spec = data.get("spec")
    if not isinstance(spec, dict):
        return data
    image = {_PARTS[key]: value for key, value in spec.items() if key in _PARTS}
    others = {key: value for key, value in spec.items() if key not in _PARTS}
    return {**data, "spec": {**others, "inputs": {"image": image}}}
