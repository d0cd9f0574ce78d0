"""Batches: several questions about each picture in one row.

A row is a prefix (system sentence, visual tokens) and then independent blocks, one per question
with its answer. A block sees the prefix and itself, and its positions restart after the prefix:
exactly what inference sees when it asks that one question. The loss is on answer tokens only.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mobilevlm.families.llava_layout import CLIP_MEAN, CLIP_STD
from mobilevlm.nano.dense import dense_targets
from mobilevlm.nano.drawing import render
from mobilevlm.nano.model import EOS
from mobilevlm.nano.pairs import pair_questions
from mobilevlm.nano.questions import Question, caption_question, questions
from mobilevlm.nano.recipes import ALL_KINDS, Recipe
from mobilevlm.nano.scenes import TRAINING_SEEDS, Scene, sample_scene
from mobilevlm.nano.text_only import text_questions
from mobilevlm.nano.tokenizer import NanoTokenizer, prompt_text
from mobilevlm.spec import IMAGE_TOKEN_ID


@dataclass(frozen=True)
class Batch:
    """One step's data. ``rows`` x ``length`` places; ``answers`` places are predicted."""

    pixels: Tensor
    """uint8 (images, edge, edge, 3)"""
    targets: Tensor
    """int64 (images, heads, visual tokens): see dense.py"""
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
    labels: Tensor
    """int64 (answers): the token to predict"""
    owners: Tensor
    """int64 (answers): index of the question that the token answers"""
    kinds: Tensor
    """int64 (questions): index into ALL_KINDS"""

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


@dataclass
class Row:
    """A row under construction; ``pictures`` are indices into the batch's images."""

    ids: list[int]
    slots: list[int]
    positions: list[int]
    blocks: list[int]
    answers: list[tuple[int, int, int]]
    """Column that predicts, token, index of the question within the row."""
    kinds: list[int]
    prefix_ids: list[int]
    """The part of a prompt's ids (with IMAGE_TOKEN_ID) that the row's questions share."""
    prefix: int
    """Places that the prefix takes."""


def start_row(prefix_ids: Sequence[int], pictures: Sequence[int], visual_tokens: int) -> Row:
    """A row that holds only its prefix; every IMAGE_TOKEN_ID in it becomes one picture's tokens."""
    ids: list[int] = []
    slots: list[int] = []
    remaining = list(pictures)
    for token in prefix_ids:
        if token == IMAGE_TOKEN_ID:
            first = remaining.pop(0) * visual_tokens
            ids += [0] * visual_tokens
            slots += range(first, first + visual_tokens)
        else:
            ids.append(token)
            slots.append(-1)
    count = len(ids)
    return Row(ids, slots, list(range(count)), [0] * count, [], [], list(prefix_ids), count)


def add_question(
    row: Row, tokenizer: NanoTokenizer, question: Question, images: int, length: int
) -> bool:
    """Appends a question and its answer as a block; false when the row has no room for it."""
    prompt = tokenizer.prompt_ids(prompt_text(question.text, images))
    shared = len(row.prefix_ids)
    if prompt[:shared] != row.prefix_ids:
        raise ValueError(f"the row's prefix does not begin the prompt of {question.text!r}")
    return add_block(row, prompt[shared:], tokenizer.answer_ids(question.answer),
                     ALL_KINDS.index(question.kind), length)  # fmt: skip


def add_block(
    row: Row, prompt: Sequence[int], answer: Sequence[int], kind: int, length: int
) -> bool:
    """Appends a block of prompt and answer ids; the last answer token is only predicted."""
    block = [*prompt, *answer[:-1]]
    start = len(row.ids)
    if start + len(block) > length:
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


def collate(
    rows: Sequence[Row], scenes: Sequence[Scene], length: int, with_targets: bool = True
) -> Batch:
    """Pads rows to ``length`` and renders the scenes."""
    shape = (len(rows), length)
    ids, positions = np.full(shape, EOS), np.zeros(shape, np.int64)
    slots, blocks = np.full(shape, -1), np.full(shape, -1)
    answers: list[tuple[int, int, int]] = []
    kinds: list[int] = []
    for index, row in enumerate(rows):
        used = len(row.ids)
        ids[index, :used], slots[index, :used] = row.ids, row.slots
        positions[index, :used], blocks[index, :used] = row.positions, row.blocks
        answers += [
            (index * length + column, token, len(kinds) + owner)
            for column, token, owner in row.answers
        ]
        kinds += row.kinds
    table = np.array(answers, np.int64).reshape(-1, 3)
    pixels = np.stack([np.asarray(render(scene)) for scene in scenes])
    targets = [dense_targets(scene) for scene in scenes] if with_targets else [np.zeros((0, 0))]
    arrays = (pixels, np.stack(targets), ids, slots, positions, blocks, *table.T, np.array(kinds))
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def make_batch(
    recipe: Recipe, tokenizer: NanoTokenizer, visual_tokens: int, seed: int, step: int
) -> Batch:
    """The batch of one step: a pure function of its arguments, whoever computes it."""
    # Every stage has scenes of its own.
    stage = zlib.crc32(recipe.name.encode())
    first = (seed * 1_000_003 + stage + step * recipe.images) % (TRAINING_SEEDS - recipe.images)
    scenes = [sample_scene(first + index) for index in range(recipe.images)]
    if not recipe.language:
        return collate([], scenes, 0)
    rows = [
        single_row(scene, index, recipe, tokenizer, visual_tokens)
        for index, scene in enumerate(scenes)
    ]
    for index in range(recipe.pair_rows):
        one, other = 2 * index, 2 * index + 1
        asked = pair_questions(scenes[one], scenes[other], 8)
        if asked:
            rows.append(filled_row(asked, (one, other), recipe.length, tokenizer, visual_tokens))
    for index in range(recipe.text_rows):
        asked = text_questions(first + index, 16)
        rows.append(filled_row(asked, (), recipe.length, tokenizer, visual_tokens))
    return collate(rows, scenes, recipe.length, recipe.dense_weight > 0)


def single_row(
    scene: Scene, picture: int, recipe: Recipe, tokenizer: NanoTokenizer, visual_tokens: int
) -> Row:
    """A row of questions about one scene, beginning with its caption for some."""
    asked = list(questions(scene, 14))
    if scene.seed * 7919 % 1000 < recipe.captions * 1000:  # a prime, so that batches mix
        asked.insert(0, caption_question(scene))
    return filled_row(asked, (picture,), recipe.length, tokenizer, visual_tokens)


def filled_row(
    asked: Sequence[Question],
    pictures: Sequence[int],
    length: int,
    tokenizer: NanoTokenizer,
    visual_tokens: int,
) -> Row:
    """A row with as many of the questions, which all share the pictures' layout, as fit."""
    prompt = tokenizer.prompt_ids(prompt_text(asked[0].text, len(pictures)))
    if pictures:
        shared = len(prompt) - prompt[::-1].index(IMAGE_TOKEN_ID)
    else:
        shared = len(tokenizer.prompt_ids(prompt_text("", 0).removesuffix(" ASSISTANT:").rstrip()))
    row = start_row(prompt[:shared], pictures, visual_tokens)
    for question in asked:
        add_question(row, tokenizer, question, len(pictures), length)
    return row


def attention_mask(blocks: Tensor) -> Tensor:
    """(rows, length) block numbers to (rows, length, length): who (axis 1) sees whom (axis 2)."""
    length = blocks.shape[1]
    seen, sees = blocks[:, None, :], blocks[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=blocks.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=blocks.device)
    return ((seen == 0) | (seen == sees)) & causal & (sees >= 0) | itself


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
