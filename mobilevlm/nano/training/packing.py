"""Batches: several questions about each image in one row.

A row is a prefix (system sentence, visual tokens) and then independent blocks, one per question
with its answer. A block sees the prefix and itself, and its positions restart after the prefix:
exactly what inference sees when it asks that one question. The loss is on answer tokens only.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mobilevlm.families.towers import CLIP_MEAN, CLIP_STD
from mobilevlm.input_spec import IMAGE_TOKEN_ID
from mobilevlm.nano.drawing import render
from mobilevlm.nano.pairs import pair_questions
from mobilevlm.nano.questions import KINDS, Question, caption_question, questions
from mobilevlm.nano.scenes import TRAINING_SEEDS, Scene, sample_scene
from mobilevlm.nano.text_only import text_questions
from mobilevlm.nano.training.dense import dense_targets
from mobilevlm.nano.training.grounding import CELLS, Cells, cells_of, phrases
from mobilevlm.nano.training.model import EOS
from mobilevlm.nano.training.packed_attention import CHUNK
from mobilevlm.nano.training.recipes import ALL_KINDS, Recipe
from mobilevlm.nano.training.tokenizer import NanoTokenizer, prompt_text
from mobilevlm.spec import IMAGE_PLACEHOLDER

MOST_QUESTIONS = 40
"""About one image; the length of a row may allow fewer."""
ASKED_KINDS = (*KINDS, *("relation", "read") * 4, "compare", "where", "count")
"""Kinds of question about one image; those that take longest to learn stand more often."""


@dataclass(frozen=True)
class Group:
    """Rows whose prefixes are equally long: ``rows`` x ``length`` places."""

    ids: Tensor
    """int64 (rows, length)"""
    slots: Tensor
    """int64 (rows, length): which visual token of the batch stands here, -1 for text"""
    positions: Tensor
    """int64 (rows, length)"""
    blocks: Tensor
    """int64 (rows, length): 0 prefix, 1.. question, -1 padding"""
    places: Tensor
    """int64 (answers): row * length + column of the state that predicts an answer token"""
    phrases: Tensor
    """int64 (phrases): row * length + column of the last token of a noun phrase"""
    cells: Tensor
    """float32 (phrases, CELLS): see grounding.py"""
    prefix: int
    """Places of the prefix; what follows is a multiple of CHUNK."""


@dataclass(frozen=True)
class Batch:
    """One step's data; ``answers`` tokens are predicted, in the order of the groups' places."""

    pixels: Tensor
    """uint8 (images, edge, edge, 3)"""
    targets: Tensor
    """int64 (images, heads, visual tokens): see dense.py"""
    groups: tuple[Group, ...]
    labels: Tensor
    """int64 (answers): the token to predict"""
    owners: Tensor
    """int64 (answers): index of the question that the token answers"""
    kinds: Tensor
    """int64 (questions): index into ALL_KINDS"""

    def to(self, device: torch.device) -> Batch:
        groups = tuple(_moved(group, device) for group in self.groups)
        return replace(_moved(self, device), groups=groups)


T = TypeVar("T", Group, Batch)


def _moved(part: T, device: torch.device) -> T:
    """A copy with its own tensors on a device."""
    tensors: dict[str, Any] = {
        name: value.to(device, non_blocking=True)
        for name, value in vars(part).items()
        if isinstance(value, Tensor)
    }
    return replace(part, **tensors)


@dataclass
class Row:
    """A row under construction; ``images`` are indices into the batch's images."""

    ids: list[int]
    slots: list[int]
    positions: list[int]
    blocks: list[int]
    answers: list[tuple[int, int, int]]
    """Column that predicts, token, index of the question within the row."""
    kinds: list[int]
    phrases: list[tuple[int, Cells]]
    """Column of the last token of a noun phrase, and the cells it means."""
    prefix_ids: list[int]
    """The part of a prompt's ids (with IMAGE_TOKEN_ID) that the row's questions share."""
    prefix: int
    """Places that the prefix takes."""


def start_row(prefix_ids: Sequence[int], images: Sequence[int], visual_tokens: int) -> Row:
    """A row that holds only its prefix; every IMAGE_TOKEN_ID in it becomes one image's tokens."""
    ids: list[int] = []
    slots: list[int] = []
    remaining = list(images)
    for token in prefix_ids:
        if token == IMAGE_TOKEN_ID:
            first = remaining.pop(0) * visual_tokens
            ids += [0] * visual_tokens
            slots += range(first, first + visual_tokens)
        else:
            ids.append(token)
            slots.append(-1)
    count = len(ids)
    return Row(ids, slots, list(range(count)), [0] * count, [], [], [], list(prefix_ids), count)


def add_question(
    row: Row,
    tokenizer: NanoTokenizer,
    question: Question,
    images: int,
    length: int,
    scene: Scene | None = None,
) -> bool:
    """Appends a question and its answer as a block; false when the row has no room for it.

    With the ``scene`` that it is about, its noun phrases are grounded.
    """
    text = prompt_text(question.text, images)
    prompt = tokenizer.prompt_ids(text)
    shared = len(row.prefix_ids)
    if prompt[:shared] != row.prefix_ids:
        raise ValueError(f"the row's prefix does not begin the prompt of {question.text!r}")
    start = len(row.ids)
    if not add_block(row, prompt[shared:], tokenizer.answer_ids(question.answer),
                     ALL_KINDS.index(question.kind), length):  # fmt: skip
        return False
    if scene is not None:
        behind = text.rpartition(IMAGE_PLACEHOLDER)[2]
        ends, offset = tokenizer.ends(behind), behind.index(question.text)
        for name, end in phrases(question.text):
            token = int(np.searchsorted(ends, offset + end))
            row.phrases.append((start + token, cells_of(scene, name)))
    return True


def add_block(
    row: Row, prompt: Sequence[int], answer: Sequence[int], kind: int, length: int
) -> bool:
    """Appends a block of prompt and answer ids; the last answer token is only predicted."""
    block = [*prompt, *answer[:-1]]
    start = len(row.ids)
    if start + len(block) > length or len(block) > CHUNK:
        return False
    number = len(row.kinds) + 1
    row.ids += block
    row.slots += [-1] * len(block)
    row.positions += range(row.prefix, row.prefix + len(block))
    row.blocks += [number] * len(block)
    first = start + len(prompt) - 1
    row.answers += [(first + i, token, number - 1) for i, token in enumerate(answer)]
    row.kinds.append(kind)
    return True


def collate(rows: Sequence[Row], scenes: Sequence[Scene], with_targets: bool = True) -> Batch:
    """Groups and pads the rows, and renders the scenes."""
    groups: list[Group] = []
    labels: list[int] = []
    owners: list[int] = []
    kinds: list[int] = []
    for prefix in sorted({row.prefix for row in rows}):
        alike = [row for row in rows if row.prefix == prefix]
        groups.append(_group(alike, prefix))
        for row in alike:
            labels += [token for _, token, _ in row.answers]
            owners += [len(kinds) + owner for _, _, owner in row.answers]
            kinds += row.kinds
    pixels = np.stack([np.asarray(render(scene)) for scene in scenes])
    targets = [dense_targets(scene) for scene in scenes] if with_targets else [np.zeros((0, 0))]
    return Batch(
        torch.from_numpy(pixels),
        torch.from_numpy(np.stack(targets)),
        tuple(groups),
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(owners, dtype=torch.long),
        torch.tensor(kinds, dtype=torch.long),
    )


def _group(rows: Sequence[Row], prefix: int) -> Group:
    longest = max(len(row.ids) for row in rows) - prefix
    length = prefix + -(-longest // CHUNK) * CHUNK
    shape = (len(rows), length)
    ids, positions = np.full(shape, EOS), np.zeros(shape, np.int64)
    slots, blocks = np.full(shape, -1), np.full(shape, -1)
    places: list[int] = []
    marks: list[int] = []
    cells = [np.zeros((0, CELLS), np.float32)]
    for index, row in enumerate(rows):
        used = len(row.ids)
        ids[index, :used], slots[index, :used] = row.ids, row.slots
        positions[index, :used], blocks[index, :used] = row.positions, row.blocks
        places += [index * length + column for column, _, _ in row.answers]
        marks += [index * length + column for column, _ in row.phrases]
        cells += [where[None] for _, where in row.phrases]
    return Group(
        torch.from_numpy(ids),
        torch.from_numpy(slots),
        torch.from_numpy(positions),
        torch.from_numpy(blocks),
        torch.tensor(places, dtype=torch.long),
        torch.tensor(marks, dtype=torch.long),
        torch.from_numpy(np.concatenate(cells)),
        prefix,
    )


def make_batch(
    recipe: Recipe, tokenizer: NanoTokenizer, visual_tokens: int, seed: int, step: int
) -> Batch:
    """The batch of one step: a pure function of its arguments, whoever computes it."""
    # Every stage has scenes of its own.
    stage = zlib.crc32(recipe.name.encode())
    first = (seed * 1_000_003 + stage + step * recipe.images) % (TRAINING_SEEDS - recipe.images)
    scenes = [sample_scene(first + index) for index in range(recipe.images)]
    if not recipe.language:
        return collate([], scenes)
    rows = [
        single_row(scene, index, recipe, tokenizer, visual_tokens)
        for index, scene in enumerate(scenes)
    ]
    for index in range(recipe.pair_rows):
        one, other = 2 * index, 2 * index + 1
        asked = pair_questions(scenes[one], scenes[other], MOST_QUESTIONS // 2)
        if asked:
            rows.append(filled_row(asked, (one, other), recipe.length, tokenizer, visual_tokens))
    for index in range(recipe.text_rows):
        asked = text_questions(first + index, MOST_QUESTIONS)
        rows.append(filled_row(asked, (), recipe.length, tokenizer, visual_tokens))
    return collate(rows, scenes, recipe.dense_weight > 0)


def single_row(
    scene: Scene, image: int, recipe: Recipe, tokenizer: NanoTokenizer, visual_tokens: int
) -> Row:
    """A row of questions about one scene, beginning with its caption for some."""
    asked = list(questions(scene, MOST_QUESTIONS, ASKED_KINDS))
    if scene.seed * 7919 % 1000 < recipe.captions * 1000:  # a prime, so that batches mix
        asked.insert(0, caption_question(scene))
    return filled_row(asked, (image,), recipe.length, tokenizer, visual_tokens, scene)


def filled_row(
    asked: Sequence[Question],
    images: Sequence[int],
    length: int,
    tokenizer: NanoTokenizer,
    visual_tokens: int,
    scene: Scene | None = None,
) -> Row:
    """A row with as many of the questions, which all share the images' layout, as fit."""
    prompt = tokenizer.prompt_ids(prompt_text(asked[0].text, len(images)))
    if images:
        shared = len(prompt) - prompt[::-1].index(IMAGE_TOKEN_ID)
    else:
        shared = len(tokenizer.prompt_ids(prompt_text("", 0).removesuffix(" ASSISTANT:").rstrip()))
    row = start_row(prompt[:shared], images, visual_tokens)
    for question in asked:
        add_question(row, tokenizer, question, len(images), length, scene)
    return row


def normalized(pixels: Tensor) -> Tensor:
    """uint8 (images, edge, edge, 3) to float32 (images, 3, edge, edge), as CLIP takes them."""
    mean = torch.tensor(CLIP_MEAN, device=pixels.device)
    std = torch.tensor(CLIP_STD, device=pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


class StepDataset(Dataset[Batch]):
    """Batches by step number, for a DataLoader with ``batch_size=None``."""

    def __init__(
        self, recipe: Recipe, tokenizer: NanoTokenizer, visual_tokens: int, seed: int, steps: int
    ) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self.visual_tokens, self.seed, self.steps = visual_tokens, seed, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        torch.set_num_threads(1)
        return make_batch(self.recipe, self.tokenizer, self.visual_tokens, self.seed, step)
