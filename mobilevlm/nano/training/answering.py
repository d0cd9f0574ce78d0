"""Greedy answers of a model in torch, many questions at a time: the float32 reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from mobilevlm.input_spec import IMAGE_TOKEN_ID
from mobilevlm.nano.training.model import EOS, NanoModel
from mobilevlm.nano.training.packed_attention import attention_mask
from mobilevlm.nano.training.packing import normalized
from mobilevlm.nano.training.tokenizer import NanoTokenizer, prompt_text


@torch.no_grad()
def answer_questions(
    model: NanoModel,
    tokenizer: NanoTokenizer,
    asked: Sequence[tuple[str, Sequence[Image.Image]]],
    max_new_tokens: int = 24,
) -> list[str]:
    """Answers of ``(prompt, images)`` pairs, decoded together; images of the model's size."""
    device = model.decoder.lm_head.weight.device
    images = [image for _, shown in asked for image in shown]
    edge = model.config.image_size
    visual = torch.zeros(1, model.config.visual_tokens, model.config.hidden_size, device=device)
    if images:
        sized = [image.convert("RGB").resize((edge, edge)) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in sized]))
        visual = model.encode_images(normalized(pixels.to(device)))
    rows: list[list[int]] = []
    slots: list[list[int]] = []
    next_slot = 0
    for text, shown in asked:
        row: list[int] = []
        slot: list[int] = []
        for token in tokenizer.prompt_ids(prompt_text(text, len(shown))):
            if token == IMAGE_TOKEN_ID:
                row += [0] * visual.shape[1]
                slot += range(next_slot, next_slot + visual.shape[1])
                next_slot += visual.shape[1]
            else:
                row.append(token)
                slot.append(-1)
        rows.append(row)
        slots.append(slot)
    answers: list[list[int]] = [[] for _ in rows]
    finished = [False] * len(rows)
    for _ in range(max_new_tokens):
        length = max(len(row) for row in rows)
        ids = torch.tensor([row + [EOS] * (length - len(row)) for row in rows], device=device)
        where = torch.tensor([slot + [-1] * (length - len(slot)) for slot in slots], device=device)
        positions = torch.arange(length, device=device).expand_as(ids)
        mask = attention_mask(torch.zeros_like(ids))
        states = model.hidden_states(ids, where, positions, mask, visual)
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        ends = states[torch.arange(len(rows), device=device), last]
        tokens = model.decoder.lm_head(ends).argmax(-1)
        for index, token in enumerate(tokens.tolist()):
            finished[index] = finished[index] or token == EOS
            if not finished[index]:
                answers[index].append(token)
                rows[index].append(token)
                slots[index].append(-1)
        if all(finished):
            break
    return [tokenizer.decode(answer) for answer in answers]
