"""Manifests of schema 1, which knew one image input: read as those of today."""

from __future__ import annotations

from typing import Any

_PARTS = {"image": "preparation", "vision": "encoder", "projector": "connector"}
"""Keys of a spec that are parts of its image input today."""
_LAYOUT = {"image_end_ids": "end_ids", "placeholder_ids": "placeholder_ids"}
"""Keys of a conversation that are of its layout today."""


def upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest of schema 1 in today's schema; what is wrong in it stays for the reader of
    that to name."""
    spec = data.get("spec")
    if not isinstance(spec, dict):
        return data
    image, others = _split(spec, _PARTS)
    if isinstance(image.get("preparation"), dict):
        image["preparation"] = {"kind": "fixed_image", **image["preparation"]}
    if isinstance(others.get("conversation"), dict):
        image["layout"], others["conversation"] = _split(others["conversation"], _LAYOUT)
    return {**data, "spec": {**others, "inputs": {"image": image}}}


def _split(data: dict[str, Any], names: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of ``names`` under their names of today, and the others."""
    moved = {names[key]: value for key, value in data.items() if key in names}
    return moved, {key: value for key, value in data.items() if key not in names}
