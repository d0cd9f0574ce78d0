"""This runtime, through its public API: every time includes the tokenizer, the preprocessing of the
image and the choice of the token."""

from __future__ import annotations

import string
from typing import Any

import numpy as np

import mobilevlm.runtime
from comparison.work import TEXT_TOKENS, Shapes, photo, timed


def load(shapes: Shapes, threads: int, options: dict[str, Any]) -> Ours:
    """``options``: ``bundle`` and ``engine``."""
    return Ours(shapes, mobilevlm.runtime.load(options["bundle"], options["engine"], threads))


class Ours:
    """See :class:`comparison.work.Peer`. ``generate`` and the images of ``ask`` have a session
    each, as two users of one server would."""

    def __init__(self, shapes: Shapes, vlm: mobilevlm.runtime.VLM) -> None:
        self._shapes, self._vlm = shapes, vlm
        self._session = vlm.new_session()
        self._words = [
            f" {letter}"
            for letter in string.ascii_lowercase
            if self._length(f" {letter} {letter}") - self._length(f" {letter}") == 1
        ]

    def encode(self, variation: int) -> float:
        pixels = photo(self._shapes.photo, variation)
        return timed(self._vlm.encode_image, pixels)[0]

    def generate(self, length: int, count: int, variation: int) -> tuple[float, float]:
        prompt = self._prompt(length, 0, variation)
        answer = self._vlm.generate(prompt, max_new_tokens=count + 1, ignore_eos=True, raw=True)
        assert (answer.prompt_tokens, len(answer.token_ids)) == (length, count + 1)
        return answer.timings.ttft, answer.timings.decode

    def ask(self, variation: int) -> tuple[float, float]:
        pixels = photo(self._shapes.photo, variation)
        first, second = (self._prompt(TEXT_TOKENS, 1, 2 * variation + turn) for turn in (0, 1))
        return self._first_token(first, pixels), self._first_token(second, pixels)

    def _first_token(self, prompt: str, pixels: Any) -> float:
        seconds, answer = timed(
            lambda: self._vlm.generate(
                prompt,
                [pixels],
                max_new_tokens=1,
                ignore_eos=True,
                raw=True,
                session=self._session,
            )
        )
        assert answer.prompt_tokens == self._shapes.visual_tokens + TEXT_TOKENS
        return seconds

    def _prompt(self, text_tokens: int, images: int, variation: int) -> str:
        """A raw prompt of exactly this many text tokens: words of one token each. Marks around an
        image and its tiles count as the image's."""
        start = self._vlm.spec.conversation.image_mark * images
        around = self._length(self._words[0]) - 1
        words = np.random.default_rng(variation).choice(self._words, text_tokens - around)
        return start + "".join(words)

    def _length(self, text: str) -> int:
        return self._vlm.count_text_tokens(text, raw=True)
