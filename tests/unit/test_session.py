"""A sequence in the decoder: what is kept, what is computed, and where it ends.

On the tiny model in float32, whose sums in another order differ by less than 2e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from conftest import FLOAT32, relative_error
from numpy.typing import NDArray

from mobilevlm.errors import PromptError
from mobilevlm.prompt import Arrays, Rows
from mobilevlm.runtime import VLM, Session
from mobilevlm.runtime.engines import (
    DecoderEngine,
    DecoderState,
    EncoderEngine,
    ExpertChoices,
    Float32,
    Segment,
)
from mobilevlm.runtime.sequence.cache import PromptCache
from mobilevlm.runtime.sequence.session import Fill, Prompt, Reuse


@dataclass
class CountedVision:
    """Passes calls on and counts them."""

    engine: EncoderEngine
    pictures: int = 0

    def encode(self, arrays: Arrays) -> Rows:
        self.pictures += 1
        return self.engine.encode(arrays)

    def features(self, arrays: Arrays) -> Float32:
        return self.engine.features(arrays)

    def close(self) -> None:
        raise AssertionError("a session does not close the engines")


@dataclass
class CountedDecoder:
    """Passes calls on and notes how many positions each of them computed."""

    engine: DecoderEngine
    prefills: list[int] = field(default_factory=list)

    @property
    def brought_in_bytes(self) -> int | None:
        return self.engine.brought_in_bytes

    def expert_choices(self, embeds: Float32) -> ExpertChoices:
        raise AssertionError("a session does not ask for experts")

    def new_state(self) -> DecoderState:
        return self.engine.new_state()

    def embed(self, ids: Sequence[int]) -> Float32:
        return self.engine.embed(ids)

    def prefill(self, state: DecoderState, rows: Rows, count: int | None = 1) -> Float32:
        self.prefills.append(len(rows))
        return self.engine.prefill(state, rows, count)

    def extend(self, state: DecoderState, rows: Rows) -> None:
        self.prefills.append(len(rows))
        self.engine.extend(state, rows)

    def answer(self, state: DecoderState, rows: Rows, count: int | None = None) -> Float32:
        return self.engine.answer(state, rows, count)

    def step(self, state: DecoderState, token: int) -> Float32:
        return self.engine.step(state, token)

    def save(self, state: DecoderState, start: int) -> Segment:
        return self.engine.save(state, start)

    def restore(self, state: DecoderState, segment: Segment) -> None:
        self.engine.restore(state, segment)

    def close(self) -> None:
        raise AssertionError("a session does not close the engines")


@dataclass
class Counted:
    session: Session
    vision: CountedVision
    decoder: CountedDecoder
    note: Fill = field(default_factory=Fill)
    fills: list[int] = field(default_factory=list)
    """Positions that each prompt computed."""

    def fill(self, prompt: Prompt) -> Float32:
        self.note, before = Fill(), len(self.decoder.prefills)
        logits = self.session.fill(prompt, self.note).copy()
        self.fills.append(sum(self.decoder.prefills[before:]))
        return logits


def counted(vlm: VLM, reuse: Reuse = "everything", cache: PromptCache | None = None) -> Counted:
    vision, decoder = vlm._engines()
    spies = CountedVision(vision), CountedDecoder(decoder)
    cache = PromptCache(0 if reuse == "nothing" else 64) if cache is None else cache
    return Counted(Session(vlm.spec, *spies, cache, reuse), *spies)


def picture(seed: int, vlm: VLM) -> NDArray[np.uint8]:
    size = vlm.spec.image.square.size
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def prompt_of(vlm: VLM, text: str, *pixels: NDArray[np.uint8]) -> Prompt:
    return vlm._prepare(text, pixels, raw=True)


def fresh(vlm: VLM, prompt: Prompt) -> Float32:
    """Logits after the prompt by embeddings put together here, without a session."""
    vision, decoder = vlm._engines()
    images, rows = iter(prompt.images), list[Float32]()
    for piece in prompt.pieces:
        if isinstance(piece, int):
            rows.append(decoder.embed([piece]))
        else:
            rows.append(vision.encode(next(images).arrays[0]).embeds)
    logits: Float32 = vlm.embeds_logits(np.concatenate(rows))[-1]
    return logits


TEXT = "What is in the picture and who are they?"


@pytest.mark.parametrize("text", ["{} after", "before {} after", "before {}", "{}", "{}{}x{}"])
def test_an_image_may_stand_anywhere(text: str, vlm: VLM) -> None:
    count = text.count("{}")
    pixels = [picture(seed, vlm) for seed in range(count)]
    prompt = prompt_of(vlm, text.format(*["<image>"] * count), *pixels)
    run = counted(vlm)
    assert relative_error(run.fill(prompt), fresh(vlm, prompt)) <= FLOAT32
    tokens = vlm.spec.image.connector.num_tokens
    assert run.session.length == len(prompt.pieces) - count + count * tokens


def test_each_mark_takes_its_own_image(vlm: VLM) -> None:
    first, second = picture(1, vlm), picture(2, vlm)
    run = counted(vlm)
    here = run.fill(prompt_of(vlm, "<image> or <image>?", first, second))
    swapped = run.fill(prompt_of(vlm, "<image> or <image>?", second, first))
    assert relative_error(swapped, here) > 100 * FLOAT32
    assert run.vision.pictures == 2  # the second prompt knows both


def test_the_same_picture_twice_is_encoded_once(vlm: VLM) -> None:
    run = counted(vlm, reuse="nothing")
    prompt = prompt_of(vlm, "<image> or <image>?", picture(1, vlm), picture(1, vlm))
    assert relative_error(run.fill(prompt), fresh(vlm, prompt)) <= FLOAT32
    assert run.vision.pictures == 1


def test_a_prompt_that_goes_on_computes_only_what_is_new_with_the_same_logits(vlm: VLM) -> None:
    run, pixels = counted(vlm), picture(1, vlm)
    start = prompt_of(vlm, f"<image>{TEXT}", pixels)
    run.fill(start)
    filled = run.session.length
    answer = [300, 301, 302]
    for token in answer:
        run.session.step(token)
    more = vlm.prompt_ids("And then?", raw=True)[1:]
    prompt = Prompt([*start.pieces, *answer, *more], start.images, 0.0)
    assert relative_error(run.fill(prompt), fresh(vlm, prompt)) <= FLOAT32
    assert run.fills == [filled, len(more)]
    assert run.vision.pictures == 1


def test_a_prompt_that_parts_from_the_last_one_goes_back_to_where_it_does(vlm: VLM) -> None:
    run, pixels = counted(vlm), picture(1, vlm)
    start = prompt_of(vlm, f"<image>{TEXT}", pixels)
    run.fill(start)
    filled = run.session.length
    for token in (300, 301, 302):
        run.session.step(token)
    prompt = Prompt([*start.pieces[:-4], 305, 306], start.images, 0.0)
    assert relative_error(run.fill(prompt), fresh(vlm, prompt)) <= FLOAT32
    assert run.fills == [filled, 2]
    assert run.session.length == filled - 4 + 2


def test_the_same_prompt_again_computes_one_position(vlm: VLM) -> None:
    run, prompt = counted(vlm), prompt_of(vlm, TEXT)
    first = run.fill(prompt)
    run.session.step(300)
    assert relative_error(run.fill(prompt), first) <= FLOAT32
    assert run.fills == [len(prompt.pieces), 1]


def test_a_shorter_prompt_goes_back(vlm: VLM) -> None:
    run, prompt = counted(vlm), prompt_of(vlm, TEXT)
    run.fill(prompt)
    shorter = Prompt(prompt.pieces[:5], [], 0.0)
    assert relative_error(run.fill(shorter), fresh(vlm, shorter)) <= FLOAT32
    assert run.session.length == 5


def test_another_picture_is_not_taken_for_the_one_before(vlm: VLM) -> None:
    run = counted(vlm)
    run.fill(prompt_of(vlm, f"Look: <image>{TEXT}", picture(1, vlm)))
    prompt = prompt_of(vlm, f"Look: <image>{TEXT}", picture(2, vlm))
    assert relative_error(run.fill(prompt), fresh(vlm, prompt)) <= FLOAT32
    assert run.vision.pictures == 2
    before = len(vlm.prompt_ids("Look: ", raw=True))
    assert run.fills[1] == run.session.length - before


def test_without_reuse_everything_is_computed_anew(vlm: VLM) -> None:
    run, pixels = counted(vlm, reuse="nothing"), picture(1, vlm)
    prompt = prompt_of(vlm, f"<image>{TEXT}", pixels)
    first, second = run.fill(prompt), run.fill(prompt)
    assert np.array_equal(first, second)
    assert run.fills == [run.session.length] * 2
    assert run.vision.pictures == 2


def test_a_step_gives_the_logits_of_the_longer_prompt(vlm: VLM) -> None:
    run, prompt = counted(vlm), prompt_of(vlm, TEXT)
    run.fill(prompt)
    for token in (300, 301):
        logits = run.session.step(token).copy()
    longer = Prompt([*prompt.pieces, 300, 301], [], 0.0)
    assert relative_error(logits, fresh(vlm, longer)) <= FLOAT32


# The context of the tiny model holds 2048 positions.


def ids_of_length(vlm: VLM, length: int) -> list[int]:
    ids = np.random.default_rng(0).integers(259, vlm.spec.decoder.vocab_size, length)
    return [1, *ids.tolist()[1:]]


def prompt_of_ids(ids: Sequence[int]) -> Prompt:
    return Prompt([*ids], [], 0.0)


def test_a_prompt_that_fills_the_context_is_refused_and_the_sequence_stays(vlm: VLM) -> None:
    run, context = counted(vlm), vlm.spec.decoder.context_length
    run.fill(prompt_of(vlm, TEXT))
    length = run.session.length
    with pytest.raises(PromptError) as caught:
        run.fill(prompt_of_ids(ids_of_length(vlm, context)))
    assert f"the prompt takes {context} tokens, the context holds {context}" in str(caught.value)
    assert run.session.length == length
    with pytest.raises(PromptError, match="144 for each image"):
        ids = ids_of_length(vlm, context - 144)
        image = vlm.prepare_image(picture(1, vlm))
        run.fill(Prompt([*ids, *image.pieces], [image], 0.0))
    assert run.vision.pictures == 0


def test_a_long_prompt_in_chunks_gives_the_logits_of_steps(vlm: VLM) -> None:
    ids = ids_of_length(vlm, 600)  # more than one chunk of 512
    whole, steps = counted(vlm), counted(vlm)
    expected = whole.fill(prompt_of_ids(ids))
    steps.fill(prompt_of_ids(ids[:500]))
    for token in ids[500:]:
        logits = steps.session.step(token)
    assert relative_error(logits, expected) <= FLOAT32


def test_an_answer_ends_when_the_context_is_full(vlm: VLM) -> None:
    context = vlm.spec.decoder.context_length
    text = "a" + " a" * (context - 5)
    length = len(vlm.prompt_ids(text, raw=True))
    assert length == context - 3
    answer = vlm.generate(text, raw=True, ignore_eos=True, max_new_tokens=100)
    # Three more positions, and the token that the last of them predicts.
    assert len(answer.token_ids) == 4
    assert answer.finish_reason == "length"
    with pytest.raises(PromptError, match="shorten it"):
        vlm.generate(text + " a" * 3, raw=True)
