"""Sessions of decoders whose state is more than keys and values at one-axis positions: prompts with
images of different grids, computed and reused, with logits equal to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FLOAT32, relative_error
from numpy.typing import NDArray
from test_decoder_state import CONVOLUTION, DEEP, SPECS, TWO_AXES, Opened, open_decoder

from mobilevlm.prompt import Piece, Prepared, Rows, Run, grid_positions
from mobilevlm.runtime.sequence.cache import PromptCache
from mobilevlm.runtime.sequence.session import Fill, Prompt, Reuse, Session

SYSTEM = [3, 4, 5]


class Patches:
    """An encoder that gives its input on, and multiples of it for layers."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def encode(self, arrays: Mapping[str, NDArray[Any]]) -> Rows:
        rows = arrays["rows"]
        deep = (rows * np.float32(0.5 + layer) for layer in range(self.layers))
        return Rows(rows, tuple(deep))

    def features(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        raise AssertionError("a session asks for rows only")

    def close(self) -> None:
        raise AssertionError("a session does not close the engines")


def image(seed: int, rows: int, columns: int) -> Prepared:
    size = TWO_AXES.decoder.hidden_size
    made = np.random.default_rng(seed).standard_normal((rows * columns, size), np.float32)
    run = Run(rows * columns, (1, rows, columns))
    return Prepared("image", ({"rows": made},), (run,))


def prompt_of(*parts: list[int] | Prepared) -> Prompt:
    pieces: list[Piece] = []
    for part in parts:
        pieces += part.pieces if isinstance(part, Prepared) else part
    return Prompt(pieces, [part for part in parts if isinstance(part, Prepared)], 0.0)


FIRST, SECOND = image(1, 9, 5), image(2, 3, 14)
QUESTION = prompt_of(SYSTEM, FIRST, [7, 8, 9], SECOND, [10, 11])
ANOTHER = prompt_of(SYSTEM, FIRST, [7, 8, 9], SECOND, [12, 13, 14, 15])
BRANCH = prompt_of(SYSTEM, FIRST, [20, 21], SECOND, [10, 11])


@pytest.fixture(scope="module", params=SPECS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_decoder(SPECS[request.param], tmp_path_factory.mktemp("decoder"))


def session_of(opened: Opened, reuse: Reuse, cache: PromptCache | None = None) -> Session:
    encoder = Patches(len(opened.spec.decoder.deep_layers))
    cache = PromptCache(0 if reuse == "nothing" else 64, SYSTEM) if cache is None else cache
    return Session(opened.spec, encoder, opened.decoder, cache, reuse)


def filled(session: Session, prompt: Prompt) -> tuple[NDArray[np.float32], Fill]:
    note = Fill()
    return session.fill(prompt, note).copy(), note


def test_two_images_of_different_grids_give_the_logits_of_the_reference(opened: Opened) -> None:
    session = session_of(opened, "nothing")
    found = session.prompt_logits(QUESTION)
    decoder = opened.spec.decoder
    rows = session._rows(QUESTION, Fill())
    positions = grid_positions(QUESTION.pieces, decoder.position_axes)
    placed = torch.from_numpy(positions) if decoder.rope_sections else None
    deep = [torch.from_numpy(added) for added in rows.deep]
    with torch.no_grad():
        embeds = torch.from_numpy(rows.embeds)
        expected = opened.reference.logits(embeds, placed, deep).numpy()
    assert relative_error(found, expected) <= FLOAT32
    logits, _ = filled(session, QUESTION)
    assert relative_error(logits, expected[-1]) <= FLOAT32


@pytest.mark.parametrize("reuse", ["pieces", "everything"])
def test_reused_and_computed_prompts_are_equal_to_the_bit(opened: Opened, reuse: Reuse) -> None:
    fresh = {id(prompt): filled(session_of(opened, "nothing"), prompt)[0] for prompt in PROMPTS}
    cache = PromptCache(64, SYSTEM)
    session = session_of(opened, reuse, cache)
    reused = []
    for prompt in (QUESTION, ANOTHER, BRANCH, QUESTION, ANOTHER):
        logits, note = filled(session, prompt)
        assert np.array_equal(logits, fresh[id(prompt)])
        reused.append(note.reused_tokens)
        session.step(30)  # an answer that nobody goes on with
        session.step(31)
    assert reused[0] == 0 and reused[1:3] == [3 + 45 + 3 + 42, 3 + 45]
    assert reused[3:] == [3 + 45 + 3 + 42] * 2
    # Another session of the same model, from what this one left.
    session.save()
    logits, note = filled(session_of(opened, reuse, cache), QUESTION)
    assert np.array_equal(logits, fresh[id(QUESTION)])
    assert note.reused_tokens == 3 + 45 + 3 + 42


PROMPTS = (QUESTION, ANOTHER, BRANCH)


def test_an_answer_goes_on_after_the_grids_largest_position(opened: Opened) -> None:
    session = session_of(opened, "everything")
    filled(session, QUESTION)
    axes = opened.spec.decoder.position_axes
    expected = 3 + max(9, 5) + 3 + max(3, 14) + 2 if axes > 1 else len(QUESTION.keys)
    assert session._state.position == expected
    for token in (40, 41, 42):
        session.step(token)
    assert session._state.position == expected + 3
    # The conversation goes on: its turns are reused, and what was answered too.
    longer = Prompt([*QUESTION.pieces, 40, 41, 42, 50, 51], QUESTION.images, 0.0)
    logits, note = filled(session, longer)
    assert note.reused_tokens == len(QUESTION.keys) + 3
    expected_logits, _ = filled(session_of(opened, "nothing"), longer)
    assert relative_error(logits, expected_logits) <= FLOAT32


def test_a_sequence_that_cannot_go_back_far_computes_from_where_it_can(tmp_path: Path) -> None:
    opened = open_decoder(CONVOLUTION, tmp_path)
    session = session_of(opened, "everything", PromptCache(0, SYSTEM))
    long = [int(token) for token in np.random.default_rng(3).integers(3, 90, 300)]
    first = Prompt([*SYSTEM, *long], [], 0.0)
    filled(session, first)
    for kept, expected in ((290, 290), (150, 3), (2, 0)):  # as far as kept rows, a border, nothing
        prompt = Prompt([*first.pieces[:kept], 91, 92], [], 0.0)
        logits, note = filled(session, prompt)
        assert note.reused_tokens == expected
        fresh, _ = filled(session_of(opened, "nothing"), prompt)
        assert relative_error(logits, fresh) <= FLOAT32
        filled(session, first)


def test_positions_of_a_prompt_follow_its_grids() -> None:
    found = grid_positions([5, Run(6, (1, 2, 3)), 6, Run(2), 7], 3)
    assert found.T.tolist() == [
        [0, 0, 0],
        *([1, 1 + row, 1 + column] for row in range(2) for column in range(3)),
        [4, 4, 4],
        [5, 5, 5],
        [6, 6, 6],
        [7, 7, 7],
    ]
    frames = grid_positions([Run(4, (2, 1, 2)), 9], 3)
    assert frames.T.tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1], [2, 2, 2]]
    assert grid_positions([], 2).shape == (2, 0)


def test_rows_for_layers_are_part_of_an_image(tmp_path: Path) -> None:
    opened = open_decoder(DEEP, tmp_path)
    session = session_of(opened, "nothing")
    with_rows, _ = filled(session, QUESTION)
    assert isinstance(session._vision, Patches)
    session._vision.layers = 0
    session._deep = 0
    without, _ = filled(session, QUESTION)
    assert relative_error(with_rows, without) > 100 * FLOAT32
