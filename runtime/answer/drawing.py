"""Images that a model draws: codes one after the other, each from the decoder's states of the
prompt and of an unconditional prompt, then all of them to pixels.

Both sequences are one batch of two in the decoder, whose weights are read once for a step. What the
prompts' keys and values take is computed once for all images of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevlm.errors import MobileVLMError, PromptError
from mobilevlm.output_spec import ImageOutput
from mobilevlm.prompt import Rows
from mobilevlm.runtime.answer.sampling import Sampler, SamplingOptions
from mobilevlm.runtime.engines import Float32
from mobilevlm.runtime.engines.onnx.drawing import OnnxDrawing
from mobilevlm.runtime.engines.onnx.engine import OnnxDecoder

MOST_IMAGES = 64
"""Most images of one prompt."""
OnProgress: TypeAlias = Callable[[int, int], object]
"""Called after each code with the number of those that are there, and of all."""


@dataclass(frozen=True)
class DrawOptions:
    """Settings of drawing.

    Raises:
        MobileVLMError: a value outside its range.
    """

    n: int = 1
    """Images, each with random numbers of its own."""
    guidance: float = 1.0
    """Distance that logits are moved away from those of the unconditional prompt (Ho & Salimans
    2022); 1: not at all, and that prompt is left out."""
    temperature: float = 1.0
    """0 takes the most likely code."""
    seed: int | None = None
    """Seed of the first image; each further one has the next number."""

    def __post_init__(self) -> None:
        if type(self.n) is not int or not 1 <= self.n <= MOST_IMAGES:
            raise MobileVLMError(f"n is {self.n!r:.60}, expected 1 to {MOST_IMAGES} images")
        scale = self.guidance
        is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not is_number or not 0 <= scale <= 1e6:
            raise MobileVLMError(
                f"guidance is {scale!r:.60}, expected a number of 0 or more (1: none)"
            )
        self.sampler(0)

    def sampler(self, index: int) -> Sampler:
        """Return what chooses the codes of an image."""
        seed = self.seed
        if seed is not None and type(seed) is int:
            seed = (seed + index) % 2**64 if seed >= 0 else seed
        return Sampler(SamplingOptions(temperature=self.temperature, seed=seed))


@dataclass(frozen=True)
class Drawn:
    """One image that was drawn."""

    codes: list[int]
    """Row by row"""
    values: Float32
    """Output of the decoder of codes ``(edge, edge, 3)``, about -1 to 1"""

    @property
    def image(self) -> Image.Image:
        """The image in 8 bits: clipped, and cut to whole numbers."""
        levels = (self.values + np.float32(1)) / np.float32(2) * np.float32(255)
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def unconditional(ids: Sequence[int], output: ImageOutput) -> list[int]:
    """Return the ids of the unconditional prompt beside those of a prompt."""
    return [token if token in output.kept_ids else output.empty_id for token in ids]


def check_room(length: int, output: ImageOutput, context: int) -> None:
    """Raise PromptError if a prompt of so many ids leaves no room for the codes of an image."""
    if length + output.num_tokens > context:
        raise PromptError(
            f"the prompt takes {length} tokens and an image {output.num_tokens}, the context holds "
            f"{context}: shorten it"
        )


def guided(logits: Float32, scale: float) -> Float32:
    """Return logits ``(num_codes,)`` of the prompt's sequence, moved away from those of the
    unconditional one where there is one ``(sequences, num_codes)``."""
    found: Float32 = logits[0]
    if len(logits) > 1:
        found = logits[1] + np.float32(scale) * (logits[0] - logits[1])
    return found


def finished(
    steps: Generator[Drawn | None, None, None], total: int, on_progress: OnProgress | None
) -> Iterator[Drawn]:
    """Yield the images of :func:`draw_steps`, which gives so many codes."""
    done = 0
    for found in steps:
        if found is not None:
            yield found
            continue
        done += 1
        if on_progress is not None:
            on_progress(done, total)


def code_logits(
    decoder: OnnxDecoder, stages: OnnxDrawing, ids: Sequence[int], codes: Sequence[int]
) -> Float32:
    """Return the logits ``(len(codes) + 1, num_codes)`` that codes, and the next, are taken from,
    without guidance; for verification."""
    state = decoder.new_state()
    hidden = decoder.prompt_states(state, Rows(decoder.embed(ids)))[None]
    joined, found = decoder.joined([state], len(ids) + len(codes)), [stages.logits(hidden)]
    for code in codes:
        found.append(stages.logits(decoder.step_all(joined, stages.embed([code]))))
    return np.concatenate(found)


def draw_steps(
    decoder: OnnxDecoder,
    stages: OnnxDrawing,
    output: ImageOutput,
    ids: Sequence[int],
    options: DrawOptions,
) -> Generator[Drawn | None, None, None]:
    """Yield None after each code, and images of a prompt with these ids as they are drawn."""
    prompts = [list(ids)]
    if options.guidance != 1:
        prompts.append(unconditional(ids, output))
    states, firsts = [], []
    for prompt in prompts:
        states.append(decoder.new_state())
        firsts.append(decoder.prompt_states(states[-1], Rows(decoder.embed(prompt))))
    first = np.stack(firsts)
    for index in range(options.n):
        choose = options.sampler(index)
        joined = decoder.joined(states, len(ids) + output.num_tokens)
        codes, hidden = list[int](), first
        for _ in range(output.num_tokens):
            if codes:
                rows: NDArray[np.float32] = stages.embed(codes[-1:])
                hidden = decoder.step_all(joined, np.repeat(rows, len(prompts), axis=0))
            codes.append(choose(guided(stages.logits(hidden), options.guidance), codes))
            yield None
        yield Drawn(codes, stages.decode(codes))
