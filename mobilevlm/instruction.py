"""The question as a Q-Former reads it beside an image (InstructBLIP)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tokenizers import Tokenizer

from mobilevlm.errors import PromptError
from mobilevlm.prompt import Prepared
from mobilevlm.spec import IMAGE_PLACEHOLDER, ModelSpec
from mobilevlm.templates.plain_text import encode_marked


def with_instruction(
    image: Prepared, tokenizer: Tokenizer | None, text: str, spec: ModelSpec
) -> Prepared:
    """Return an image with the prompt's text as ``instruction_ids`` ``(length,)``: BERT's ids, with
    those that begin and end a text. Unchanged where nothing reads them (``tokenizer`` is none).

    Raises:
        PromptError: the text is too long for the Q-Former.
    """
    qformer = spec.image.connector.qformer if tokenizer is not None else None
    if tokenizer is None or qformer is None:
        return image
    ids = encode_marked(tokenizer, text.replace(IMAGE_PLACEHOLDER, ""))
    if len(ids) > qformer.max_positions:
        raise PromptError(
            f"the prompt takes {len(ids)} tokens of the Q-Former, which reads up to "
            f"{qformer.max_positions}: shorten it"
        )
    further = {"instruction_ids": np.asarray(ids, np.int64)}
    arrays = tuple({**given, **further} for given in image.arrays)
    return replace(image, arrays=arrays)
