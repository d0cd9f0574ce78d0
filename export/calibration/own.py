"""Calibration data that the model makes itself: prompts, about text and about images, that it
answers in its own chat template (cf. LLM-QAT, Liu et al. 2023, section 2.1). It needs no data set
and fits any model, since what a decoder meets most is its own answers.

A temporary copy of the model with int8 weights answers, sampled at temperature 1: a token takes a
third of the time of float32, a bundle of a fourth of its size fits into the memory of an export,
and its distance from the float model (a KL of some hundredths) is far below the differences between
two answers. On one machine the same model, settings and seed give the same answers, and they are
kept in the cache folder; processors of another kind round otherwise, and draw other tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from mobilevlm._version import __version__
from mobilevlm.bundle import cache_folder
from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError, PromptError
from mobilevlm.export.calibration.prompts import IMAGES, TEXTS
from mobilevlm.export.calibration.samples import (
    Sample,
    sample_pieces,
    sample_rows,
    samples_digest,
    scene_samples,
    sound_samples,
    tokenizer_digests,
)
from mobilevlm.export.formats import code_digest
from mobilevlm.model import Model
from mobilevlm.plain_types import to_dict
from mobilevlm.prompt import Sound, count_positions
from mobilevlm.recipe import OWN
from mobilevlm.runtime.answer.sampling import Sampler, SamplingOptions
from mobilevlm.runtime.engines import Float32
from mobilevlm.runtime.machine import int8_weight_bits
from mobilevlm.spec import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from mobilevlm.export.calibration.talking import Talking

ANSWER_TOKENS = 64
"""Longest answer: a question's first tokens say what kind of text the rest is."""
IMAGE_POSITIONS = 1536
"""Most positions of all prompts about images, and of all drawn scenes with their right answers; one
each at least."""
NUM_SCENES = 9
"""Most drawn scenes with their right answers."""
TEMPERATURE = 1.0
TOP_K = 256
"""Tokens that may be drawn; those beyond make a thousandth of a trained model's probability."""
KEPT = 64
"""Files of answers that the cache folder keeps."""
_APART = 1000
"""Scenes between the first ones of two seeds."""


def own_samples(model: Model, seed: int = 0) -> list[Sample]:
    """Return prompts with the model's own answers, in turns with drawn scenes, as far as they fit
    into the context. Another ``seed`` makes other scenes and other answers.

    A model whose decoder has an encoder answers nothing: it gets the drawn scenes alone.

    Raises:
        MobileVLMError: the context has no room for any.
    """
    first = seed * _APART
    has_images = model.spec.has_images
    scenes = scene_samples(NUM_SCENES, first, model.spec.inputs)
    if model.spec.decoder.encoder_layers:
        return _within(model, scenes)
    scenes = _within(model, (sample for sample in scenes if _room(model, sample) >= 0))
    drawn = (
        Sample(prompt, "", images)
        for prompt, images in zip(IMAGES, _drawn(first + NUM_SCENES), strict=False)
        if has_images
    )
    heard = sound_samples(first + NUM_SCENES) if model.spec.has_sound else []
    shown = _within(model, (*drawn, *heard)) if has_images or heard else []
    asked = [*(Sample(prompt, "", ()) for prompt in TEXTS), *shown]
    found = answered(model, asked, seed)
    texts, images = ([item for item in found if bool(item.images) is has] for has in (False, True))
    if not found and not scenes:
        raise MobileVLMError(
            f"calibration {OWN!r}: no prompt fits into the context of "
            f"{model.spec.decoder.context_length} tokens: give shorter samples in a JSONL file"
        )
    return _mixed(_mixed(texts, images), scenes)


def answered(model: Model, samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """Return the samples that fit into the model's context, each with the model's own answer."""
    fitting = [sample for sample in samples if _room(model, sample) > 0]
    path = _kept_path(model, fitting, seed)
    answers = _kept_answers(path, len(fitting))
    if answers is None:
        answers = _answers(model, fitting, seed)
        _keep(path, answers)
    return [
        dataclasses.replace(sample, answer=answer)
        for sample, answer in zip(fitting, answers, strict=True)
    ]


def _drawn(first: int) -> Iterator[tuple[Path | Image.Image | Sound, ...]]:
    """Yield drawn scenes alone."""
    for seed in count(first):
        [sample] = scene_samples(1, seed)
        if sample.images:
            yield sample.images


def _within(model: Model, samples: Iterable[Sample]) -> list[Sample]:
    """Return as many of the samples as fit into ``IMAGE_POSITIONS``; one at least."""
    found: list[Sample] = []
    left = IMAGE_POSITIONS
    for sample in samples:
        left -= count_positions(sample_pieces(model, sample))
        if found and left < 0:
            break
        found.append(sample)
    return found


def _mixed(first: Sequence[Sample], second: Sequence[Sample]) -> list[Sample]:
    """Return all samples, both kinds spread evenly: what takes the first of them gets both."""
    places = [
        ((index + 0.5) / len(part), sample)
        for part in (first, second)
        for index, sample in enumerate(part)
    ]
    return [sample for _, sample in sorted(places, key=lambda item: item[0])]


def _room(model: Model, sample: Sample) -> int:
    """Return the positions that the context has left behind a sample."""
    return model.spec.decoder.context_length - count_positions(sample_pieces(model, sample))


def _answers(model: Model, samples: Sequence[Sample], seed: int) -> list[str]:
    """Return the text of the model's answer to each sample."""
    from mobilevlm.export.calibration.talking import open_talking

    found: list[str] = []
    with progress.track("answers", len(samples)) as advance, open_talking(model) as talking:
        size = talking.decoder.batch
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            answers = _sampled(model, talking, batch, (seed << 32) + start)
            found += [_as_text(model, *pair) for pair in zip(batch, answers, strict=True)]
            advance(len(batch))
    return found


def _sampled(
    model: Model, talking: Talking, samples: Sequence[Sample], seed: int
) -> list[list[int]]:
    """Return the tokens that samples are answered with, without the one that ends an answer."""
    decoder, ends = talking.decoder, set(model.spec.conversation.eos_token_ids)
    samplers = [
        Sampler(SamplingOptions(temperature=TEMPERATURE, top_k=TOP_K, seed=seed + index))
        for index in range(len(samples))
    ]
    prompts = [sample_rows(model, sample, talking.vision, decoder.embed) for sample in samples]
    room = min(ANSWER_TOKENS, *(_room(model, sample) for sample in samples))
    answers: list[list[int]] = [[] for _ in samples]
    going = set(range(len(samples)))
    logits: Sequence[Float32] = decoder.begin(prompts, room)
    for step in range(room):
        drawn = [sampler(row, ()) for sampler, row in zip(samplers, logits, strict=True)]
        going = {index for index in going if drawn[index] not in ends}
        for index in going:
            answers[index].append(drawn[index])
        if not going or step + 1 == room:
            break
        logits = decoder.step(drawn)
    return answers


def _as_text(model: Model, sample: Sample, tokens: list[int]) -> str:
    """Return the text of an answer; tokens at its end are left out where the text would not be read
    as one that fits into the context."""
    mark = model.spec.conversation.image_mark
    while tokens:
        text = model.tokenizer.decode(tokens, skip_special_tokens=True)
        text = text.replace(mark, "").replace(IMAGE_PLACEHOLDER, "").strip()
        try:
            if _room(model, dataclasses.replace(sample, answer=text)) >= 0:
                return text
        except PromptError:  # read again, it has a token that the model has no embedding for
            pass
        tokens = tokens[: len(tokens) // 2]
    return ""


def _kept_path(model: Model, samples: Sequence[Sample], seed: int) -> Path | None:
    """Return the place of the answers in the cache folder; none where there is no home."""
    spec = model.spec
    parts = [
        samples_digest(samples),
        seed,
        [
            model.weights.sha256(prefix)
            for prefix in ("vision.", "audio.", "projector.", "decoder.")
        ],
        [to_dict(part) for part in (*spec.inputs.values(), spec.decoder, spec.conversation)],
        tokenizer_digests(model),
        [ANSWER_TOKENS, TEMPERATURE, TOP_K, int8_weight_bits()],
        [code_digest(), __version__, importlib.metadata.version("onnxruntime")],
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    try:
        return cache_folder() / "answers" / f"{digest[:32]}.json"
    except RuntimeError:
        return None


def _kept_answers(path: Path | None, number: int) -> list[str] | None:
    """Return the answers of an earlier run."""
    try:
        data = None if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, list) or len(data) != number:
        return None
    return data if all(isinstance(item, str) for item in data) else None


def _keep(path: Path | None, answers: list[str]) -> None:
    """Write answers into the cache folder, where it can be written, and remove the oldest."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".draft", delete=False) as f:
            json.dump(answers, f)
        Path(f.name).replace(path)
        files = sorted(path.parent.iterdir(), key=lambda item: item.stat().st_mtime)
        for old in files[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError:
        return
