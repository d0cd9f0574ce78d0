"""A sequence behind an encoder: the prompt is read once as a whole, the sequence is the answer."""

from __future__ import annotations

from collections.abc import Sequence

from mobilevlm.runtime.engines import EncoderDecoderEngine, Float32
from mobilevlm.runtime.sequence.cache import PositionKey
from mobilevlm.runtime.sequence.session import Fill, Prompt, Session


class EncodedSession(Session):
    """Session of an encoder-decoder. All positions of a prompt see each other, so only the images
    of another prompt can be reused; the same prompt is reused as a whole."""

    _decoder: EncoderDecoderEngine
    _prompt: list[PositionKey] | None = None
    """Prompt that the encoder has read."""

    def _fill(self, keys: list[PositionKey], prompt: Prompt, note: Fill) -> Float32:
        """Read the prompt; logits of the answer's first token ``(vocab_size,)``."""
        self.prompt_tokens = len(keys)
        if keys == self._prompt and self._reuse != "nothing":
            note.reused_tokens, note.reused_images = len(keys), len(prompt.images)
        else:
            embeds = self._rows(prompt, note).embeds
            self._prompt = None
            with note.prefill:
                self._decoder.encode(self._state, embeds)
            self._prompt = keys
        with note.prefill:
            self._shorten(0)
            logits: Float32 = self._extend([self._start])[-1]
        return logits

    def prompt_logits(self, prompt: Prompt, answer: int = 0, count: int | None = None) -> Float32:
        """Logits of the answer's first token ``(1, vocab_size)``: the prompt has none."""
        return self.fill(prompt, Fill())[None]

    def answer_logits(self, embeds: Float32, answer: Sequence[int]) -> Float32:
        """Logits ``(len(answer) + 1, vocab_size)`` that the tokens of an answer, and the next, are
        taken from. ``embeds``: of the prompt."""
        with self._changing():
            self._prompt = None
            self._decoder.encode(self._state, embeds)
            self._keys.clear()
            return self._extend([self._start, *answer])

    def shared(self, prompt: Prompt) -> int:
        """How many positions of a prompt are here already."""
        return len(prompt.keys) if prompt.keys == self._prompt else 0

    def save(self, kept: int = 0) -> None:
        """Leaves nothing to the cache."""

    def _clear(self) -> None:
        super()._clear()
        self._prompt = None
