"""What is known of an artifact when it has been written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Written:
    """Figures for the manifest."""

    errors: dict[str, float]
    """Relative error that quantization made in each tensor"""
    bytes_per_token: int | None = None
    """Bytes of weights that one token needs: of sparse experts only those it uses"""
