"""The small model that hears, sees and draws: Janus-Pro's layout, with tokens that name the places
of an image before it is drawn.

Its own (mobilevlm/nano/training/anything.py); no official code has it.
"""

from __future__ import annotations

from dataclasses import replace

from mobilevlm.checkpoint import Weights
from mobilevlm.errors import CheckpointError
from mobilevlm.families.config import config_value
from mobilevlm.families.janus import read_janus
from mobilevlm.families.registry import Source, register
from mobilevlm.spec import ModelSpec


@register("nano_any", {"nano_any"}, keys={"text_config", "vision_config"}, ready_tokenizer=True)
def read_nano_any(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads a checkpoint of mobilevlm/nano/training/anything.py."""
    spec, weights = read_janus(source)
    path = source.folder / "config.json"
    drawing, first = spec.drawing, config_value(path, source.config, "first_place_id", int)
    places = tuple(range(first, first + drawing.num_tokens))
    if first < 0 or places[-1] >= spec.decoder.vocab_size:
        raise CheckpointError(
            f"{path}: 'first_place_id' is {first}, but there are {drawing.num_tokens} places and "
            f"{spec.decoder.vocab_size} tokens"
        )
    drawing = replace(
        drawing,
        begin_ids=(*places, *drawing.begin_ids),
        kept_ids=(*drawing.kept_ids, *places),
    )
    spec = replace(spec, family="nano_any", outputs={"image": drawing}, sound_as_image=True)
    return spec, weights
