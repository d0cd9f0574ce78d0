"""Suites by name."""

from __future__ import annotations

import importlib

from mobilevlm.runtime.suites.question import Suite

FAMILIES = {
    "yes_no": ("pope", "mme"),
    "choices": ("scienceqa", "mmbench", "seed"),
    "vqa": ("vqav2", "textvqa", "gqa"),
    "documents": ("chartqa", "docvqa", "ocrbench"),
    "mmmu": ("mmmu", "mmmu-pro"),
    "cmmmu": ("cmmmu",),
    "tmmlu": ("tmmlu+",),
}
"""Modules of this folder, and the suites in each."""
NAMES = tuple(name for names in FAMILIES.values() for name in names)


def find_suite(name: str) -> Suite:
    """Return a suite by its name."""
    (module,) = [family for family, names in FAMILIES.items() if name in names]
    found: tuple[Suite, ...] = importlib.import_module(f"{__package__}.{module}").SUITES
    return next(suite for suite in found if suite.name == name)
