"""Distance of the stages that make images from the float32 reference."""

from __future__ import annotations

import numpy as np
import torch

from mobilevlm.bundle import StageQuality
from mobilevlm.export.quality.metrics import (
    compare_logits,
    compare_vectors,
    token_figures,
    vision_figures,
)
from mobilevlm.model import Model
from mobilevlm.reference import ReferenceModel
from mobilevlm.runtime.vlm import VLM

PROMPT = "A red house near a river, and a boat."
CODES = 24
"""Codes that are given one after the other"""


def measure_drawing(model: Model, reference: ReferenceModel, vlm: VLM) -> dict[str, StageQuality]:
    """Return the figures of each stage of a model that makes images: what is chosen behind given
    codes by the bundle's own decoder and head, rows of codes, and pixels of an image."""
    output = model.spec.drawing
    random = np.random.default_rng(0).integers(0, output.num_codes, output.num_tokens)
    codes, given = random.tolist(), random[:CODES].tolist()
    ids = vlm.drawing_ids(PROMPT)
    rows = reference.codes(torch.tensor(given))
    embeds = torch.cat([reference.decoder.embed_tokens(torch.tensor(ids)), rows])
    expected = reference.next_code_logits(embeds, len(given) + 1).numpy()
    chosen = compare_logits(vlm.code_logits(PROMPT, given), expected)
    embedded = compare_vectors(vlm.code_rows(given), rows.numpy())
    pixels = reference.image_decoder(torch.tensor([codes]))[0].numpy()
    decoded = compare_vectors(vlm.decode_codes(codes).reshape(1, -1), pixels.reshape(1, -1))
    return {
        "image_head": StageQuality(token_figures([chosen])),
        "code_embeddings": StageQuality(vision_figures([embedded])),
        "image_decoder": StageQuality(vision_figures([decoded])),
    }
