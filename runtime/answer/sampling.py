"""From logits to the next token: greedy, or temperature with top-k, top-p and min-p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import MobileVLMError

if TYPE_CHECKING:
    from mobilevlm.runtime.answer.grammar import Guide

_DIVIDING = "a number from 1e-6 on, not infinite"


def _divides(value: float) -> bool:
    """Return whether logits that are divided by this stay numbers."""
    return 1e-6 <= value < float("inf")


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Raises:
        MobileVLMError: a value outside its range.
    """

    temperature: float = 0.0
    """0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Only the k most likely tokens (0: all)."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Only tokens at least this likely, as a share of the most likely one's probability."""
    repetition_penalty: float = 1.0
    """Tokens that were already produced are made less likely (Keskar et al. 2019)."""
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (
            *((name, "a number") for name in ("temperature", "top_p", "min_p")),
            ("repetition_penalty", "a number"),
            *((name, "a whole number") for name in ("top_k", "seed")),
        ):
            value = getattr(self, name)
            wanted = (int, float) if kind == "a number" else (int, type(None))
            if isinstance(value, bool) or not isinstance(value, wanted):
                raise MobileVLMError(f"{name} is {value!r:.60}, expected {kind}")
        penalty = self.repetition_penalty
        limits = (
            ("temperature", self.temperature, self.temperature >= 0, "0 or more"),
            ("temperature", self.temperature, _divides(self.temperature or 1), _DIVIDING),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p < 1, "0 or more, below 1"),
            ("repetition_penalty", penalty, penalty > 0, "above 0"),
            ("repetition_penalty", penalty, _divides(penalty), _DIVIDING),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**64, "0 to 2**64 - 1"),
        )
        for name, value, fits, expected in limits:
            if not fits:
                raise MobileVLMError(f"{name} is {value}, expected {expected}")


class Sampler:
    """Chooses tokens one after another; its random numbers follow from the seed alone. ``guide``:
    the grammar that they follow."""

    def __init__(self, options: SamplingOptions, guide: Guide | None = None) -> None:
        self.options, self._guide = options, guide
        self._random = np.random.default_rng(options.seed)
        self._missed = False
        """True if the grammar did not allow the likeliest token, the last time it was asked: it is
        then cheaper to ask for all allowed ones at once"""
        self.logits: NDArray[np.float32]
        """That the last token was chosen from, before penalties; valid as long as they are."""

    def __call__(self, logits: NDArray[np.float32], previous: Sequence[int]) -> int:
        """The next token. ``logits``: ``(vocab_size,)``; ``previous``: tokens produced so far."""
        self.logits = logits
        if self.options.repetition_penalty != 1.0 and previous:
            logits = _penalize(logits, previous, self.options.repetition_penalty)
        return self._choose(logits) if self._guide is None else self._guided(self._guide, logits)

    def _guided(self, guide: Guide, logits: NDArray[np.float32]) -> int:
        if (forced := guide.forced()) is not None:
            return forced
        likeliest = int(logits.argmax()) if self.options.temperature == 0 else None
        if likeliest is not None and not self._missed and guide.took(likeliest):
            return likeliest
        few = guide.allowed()
        if few is None:
            token = self._choose(guide.masked(logits))
        else:
            token = few[0] if len(few) == 1 else few[self._choose(logits[few])]
        self._missed = token != likeliest
        guide.take(token, only=few is not None and len(few) == 1)
        return token

    def _choose(self, logits: NDArray[np.float32]) -> int:
        if self.options.temperature == 0:
            return int(logits.argmax())
        tokens, probabilities = candidates(logits, self.options)
        return int(tokens[self._random.choice(len(tokens), p=probabilities)])


def candidates(
    logits: NDArray[np.float32], options: SamplingOptions
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that may be drawn, most likely first, and their probabilities (which sum to 1)."""
    if 0 < options.top_k < len(logits):
        tokens = np.argpartition(logits, -options.top_k)[-options.top_k :]
    else:
        tokens = np.arange(len(logits))
    tokens = tokens[np.argsort(-logits[tokens], kind="stable")]
    scaled = logits[tokens].astype(np.float64) / options.temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    keep = len(tokens)
    if options.top_p < 1.0:
        keep = int(np.searchsorted(probabilities.cumsum(), options.top_p)) + 1
    if options.min_p > 0.0:
        keep = min(keep, int((probabilities >= options.min_p * probabilities[0]).sum()))
    keep = max(1, keep)
    return tokens[:keep], probabilities[:keep] / probabilities[:keep].sum()


def _penalize(
    logits: NDArray[np.float32], previous: Sequence[int], penalty: float
) -> NDArray[np.float32]:
    seen = np.unique(np.asarray(previous))
    logits = logits.copy()
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits
