"""Log probabilities of an answer's tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from mobilevlm.runtime.engines import Float32
from mobilevlm.tokenizers.pieces import AnswerBytes

LEAST = -9999.0
"""Stands for a probability of 0, which JSON has no number for."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its natural logarithm of probability, as the model gives it: before penalties,
    temperature and grammar."""

    token_id: int
    token: str
    """Its text alone; U+FFFD for what is no whole character."""
    bytes: list[int]
    """Bytes of the text; a special token has none."""
    logprob: float
    top: list[TokenLogprob] = field(default_factory=list)
    """The likeliest tokens in its place, the likeliest first."""


class LogprobReader:
    """Reader of log probabilities in logits. ``top``: likeliest tokens beside each."""

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._bytes, self._top = AnswerBytes(tokenizer), top

    def __call__(self, logits: Float32, token: int) -> TokenLogprob:
        """Return that of the chosen token. ``logits``: ``(vocab_size,)``."""
        highest = float(logits.max())
        total = highest + float(np.log(np.exp(logits.astype(np.float64) - highest).sum()))
        top: list[TokenLogprob] = []
        if self._top:
            count = min(self._top, len(logits))
            likeliest = np.argpartition(-logits, count - 1)[:count]
            order = np.lexsort((likeliest, -logits[likeliest]))
            top = [self._read(logits, int(index), total) for index in likeliest[order]]
        return self._read(logits, token, total, top)

    def _read(
        self, logits: Float32, token: int, total: float, top: list[TokenLogprob] | None = None
    ) -> TokenLogprob:
        value = max(float(logits[token]) - total, LEAST)
        own = list(self._bytes(token))
        return TokenLogprob(token, self._bytes.name(token), own, value, top or [])
