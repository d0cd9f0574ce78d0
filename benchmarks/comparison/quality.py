"""KL on the real language model by recipe and GGUF type, as benchmarks/real_model.py measured it on
one machine: what a column of the comparison costs, beside how fast it is.

The stored run is benchmarks/real/measured.json; ``real_model.py -o`` writes another.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from real.report import read

STORED = Path(__file__).parents[1] / "real" / "measured.json"


def kl_rows(name: str) -> dict[str, list[float]]:
    """Return the rows ``kl_prefill`` and ``kl_decode`` (nats per token) of a recipe or GGUF type;
    none where it was not measured."""
    found = _stored()
    if name not in found:
        return {}
    # A recipe with a prefill graph has weights of its own there.
    return {"kl_prefill": [found.get(f"{name}:prefill", found[name])], "kl_decode": [found[name]]}


@cache
def _stored() -> dict[str, float]:
    return {row.name: row.figures["kl"] for row in read(STORED).rows}
