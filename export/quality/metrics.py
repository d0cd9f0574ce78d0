"""Figures of merit: how far vectors and next-token distributions are from the reference's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Float32: TypeAlias = NDArray[np.float32]
Float64: TypeAlias = NDArray[np.float64]

TOP = 5
CHUNK = 1 << 21
"""Numbers of a table in float64 that are compared at once."""


@dataclass(frozen=True)
class VectorFigures:
    """Rows against rows."""

    cosine: Float64
    """Cosine of each row ``(rows,)``"""
    squared_error: float
    """``‖found − exact‖²`` over all rows"""
    squared_norm: float
    """``‖exact‖²``"""


@dataclass(frozen=True)
class TokenFigures:
    """Next-token distributions against those of the reference, ``(positions,)`` each."""

    kl: Float64
    """Kullback–Leibler divergence from the reference's to the found one, in nats"""
    top1: NDArray[np.bool_]
    """True where both find the same token likeliest"""
    top5: Float64
    """Share of the reference's five likeliest tokens that are among the five found"""


@dataclass(frozen=True)
class TextFigures:
    """A given text's negative log-likelihood, in nats, summed over its tokens."""

    found: float
    exact: float
    tokens: int


def compare_vectors(found: Float32, exact: Float32) -> VectorFigures:
    """``(rows, size)`` each."""
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(exact, axis=-1)
    cosine = (found * exact).sum(axis=-1, dtype=np.float64) / np.maximum(norms, 1e-30)
    return VectorFigures(
        cosine,
        float(np.square(found - exact, dtype=np.float64).sum()),
        float(np.square(exact, dtype=np.float64).sum()),
    )


def compare_logits(found: Float32, exact: Float32) -> TokenFigures:
    """Compare ``(positions, vocab_size)`` each; some positions are in float64 at a time."""
    kl = np.empty(len(found), np.float64)
    top1 = np.empty(len(found), np.bool_)
    top5 = np.empty(len(found), np.float64)
    for here in _chunks(*found.shape):
        p, q = log_softmax(exact[here]), log_softmax(found[here])
        kl[here] = (np.exp(p) * (p - q)).sum(axis=-1).clip(min=0)  # rounding makes it −1e-17
        top1[here] = p.argmax(axis=-1) == q.argmax(axis=-1)
        best, ours = (np.argpartition(-table, TOP - 1, axis=-1)[:, :TOP] for table in (p, q))
        top5[here] = (best[:, :, None] == ours[:, None, :]).any(axis=-1).mean(axis=-1)
    return TokenFigures(kl, top1, top5)


def text_figures(found: Float32, exact: Float32, tokens: Sequence[int]) -> TextFigures:
    """Logits ``(len(tokens), vocab_size)`` of the positions before each token of a text."""
    ids, losses = np.asarray(tokens, np.int64), []
    for logits in (found, exact):
        parts = [
            np.take_along_axis(log_softmax(logits[here]), ids[here, None], axis=-1).sum()
            for here in _chunks(*logits.shape)
        ]
        losses.append(-float(sum(parts)))
    return TextFigures(losses[0], losses[1], len(tokens))


def joined(parts: Sequence[TokenFigures]) -> TokenFigures:
    """Return the figures of all positions as one."""
    return TokenFigures(
        np.concatenate([part.kl for part in parts]),
        np.concatenate([part.top1 for part in parts]),
        np.concatenate([part.top5 for part in parts]),
    )


def vision_figures(parts: Sequence[VectorFigures]) -> dict[str, float]:
    """Return metrics of all images together: ``cosine`` (least over tokens), ``cosine_mean``,
    ``relative_error`` (a ratio of Euclidean norms)."""
    cosine = np.concatenate([part.cosine for part in parts])
    error = sum(part.squared_error for part in parts) / sum(part.squared_norm for part in parts)
    return _rounded(
        {
            "cosine": cosine.min(),
            "cosine_mean": cosine.mean(),
            "relative_error": math.sqrt(error),
        }
    )


def token_figures(parts: Sequence[TokenFigures]) -> dict[str, float]:
    """Return metrics of all positions together: ``kl`` (mean), ``kl_p99``, ``kl_max``,
    ``top1_agreement``, ``top5_agreement``."""
    kl = np.concatenate([part.kl for part in parts])
    return _rounded(
        {
            "kl": kl.mean(),
            "kl_p99": np.quantile(kl, 0.99),
            "kl_max": kl.max(),
            "top1_agreement": np.concatenate([part.top1 for part in parts]).mean(),
            "top5_agreement": np.concatenate([part.top5 for part in parts]).mean(),
        }
    )


def perplexity_figures(parts: Sequence[TextFigures]) -> dict[str, float]:
    """Return metrics of all texts together: ``perplexity`` of the artifact and ``perplexity_ratio``
    (over that of the reference: 1 where nothing is lost)."""
    tokens = sum(part.tokens for part in parts)
    found, exact = sum(part.found for part in parts), sum(part.exact for part in parts)
    return _rounded(
        {
            "perplexity": exponential(found / tokens),
            "perplexity_ratio": exponential((found - exact) / tokens),
        }
    )


def exponential(nats: float) -> float:
    """Return ``e`` to this power; infinity where that is no float64, which no limit allows."""
    with np.errstate(over="ignore"):
        return float(np.exp(nats))


def greedy_figures(matches: Sequence[float]) -> dict[str, float]:
    """``greedy_match``: mean share of a greedy answer up to the first token that the reference
    would not have chosen; ``greedy_exact``: share of answers that are the reference's throughout.
    """
    values = np.asarray(matches)
    return _rounded({"greedy_match": values.mean(), "greedy_exact": (values == 1).mean()})


def greedy_match(tokens: Sequence[int], expected: Iterable[int]) -> float:
    """Share of the tokens before the first that is not the expected one at its place."""
    same = 0
    for token, other in zip(tokens, expected, strict=True):
        if token != other:
            break
        same += 1
    return same / len(tokens)


def log_softmax(logits: Float32) -> Float64:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    out: Float64 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out


def _chunks(positions: int, vocab_size: int) -> Iterator[slice]:
    """Yield slices of the positions whose tables have at most ``CHUNK`` numbers."""
    size = max(1, CHUNK // vocab_size)
    return (slice(start, start + size) for start in range(0, positions, size))


def rounded(value: float) -> float:
    """Four significant digits: beyond them lies the noise of summation order."""
    return float(f"{value:.4g}")


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: rounded(value) for name, value in figures.items()}
