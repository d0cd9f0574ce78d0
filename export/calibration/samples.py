"""Calibration data: images, prompts and answers like those that a model will meet.

By default prompts with the model's own answers (export/calibration/own.py), else drawn scenes
(mobilevlm/nano) or a person's own JSONL file, a line for each sample:

    {"image": "photo.jpg", "prompt": "What is this?", "answer": "A cat."}

``images`` instead of ``image`` takes a list; both may be left out. Paths start at the file's
folder. ``answer`` may be left out; it is what the model should say, since it meets its own answers
too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mobilevlm.assembly import assemble
from mobilevlm.conversation import read_text, render, user_message
from mobilevlm.errors import ImageError, MobileVLMError, PromptError
from mobilevlm.instruction import with_instruction
from mobilevlm.model import Model
from mobilevlm.nano.drawing import render as draw
from mobilevlm.nano.questions import KINDS, caption_question, questions
from mobilevlm.nano.scenes import TRAINING_SEEDS, sample_scene
from mobilevlm.nano.text_only import text_questions
from mobilevlm.plain_types import from_dict
from mobilevlm.preparation import pieces_of, prepare
from mobilevlm.prompt import Arrays, Piece, Prepared, Token, expand, in_runs
from mobilevlm.recipe import OWN
from mobilevlm.recipe import SCENES as SCENES
from mobilevlm.runtime.engines import EncoderEngine, Float32
from mobilevlm.spec import ModelSpec
from mobilevlm.whole_file import file_sha256

_TASKS = ("caption", *KINDS, "text")
NUM_SCENES = 3 * len(_TASKS)
_HELD_OUT = TRAINING_SEEDS + 10**9
"""Far behind the seeds that ``mobilevlm eval`` comes to."""
MAX_BYTES = 1 << 26
"""Of a JSONL file."""


@dataclass(frozen=True)
class Sample:
    """One exchange. ``<image>`` in the prompt marks places of pictures, else they come first."""

    prompt: str
    answer: str
    images: tuple[Path | Image.Image, ...]


@dataclass(frozen=True)
class _Line:
    """A line of a JSONL file."""

    prompt: str
    answer: str = ""
    image: str | None = None
    images: tuple[str, ...] = ()


def measuring_samples(name: str) -> list[Sample]:
    """What to measure on: for ``scenes`` others than those that calibrate, else the JSONL file.

    Raises:
        MobileVLMError: no such file, or a line of it is wrong.
        ImageError: a picture file is missing.
    """
    return scene_samples(first=NUM_SCENES) if name == SCENES else read_samples(Path(name))


def held_out_samples(name: str) -> list[Sample]:
    """What to judge on: for ``scenes`` drawn ones that neither calibrate nor measure and that no
    model was trained on, else the JSONL file.

    Raises:
        MobileVLMError: no such file, or a line of it is wrong.
        ImageError: a picture file is missing.
    """
    return scene_samples(first=_HELD_OUT) if name == SCENES else read_samples(Path(name))


def scene_samples(count: int = NUM_SCENES, first: int = 0) -> list[Sample]:
    """Drawn scenes, each with something else to do: to be described, to be asked about in each way
    that ``mobilevlm eval`` asks, and a question without a picture. None of them is in the scenes
    that ``eval`` asks about."""
    return [_scene_sample(first + index, _TASKS[index % len(_TASKS)]) for index in range(count)]


def _scene_sample(seed: int, task: str) -> Sample:
    """``task``: a kind of question; another kind where the scene has nothing to ask for that."""
    if task == "text":
        asked = text_questions(seed, 1)[0]
        return Sample(asked.text, asked.answer, ())
    scene = sample_scene(seed, "train" if seed < TRAINING_SEEDS else "evaluation")
    found = () if task == "caption" else questions(scene, 1, [task]) or questions(scene, 1)
    asked = found[0] if found else caption_question(scene)
    return Sample(asked.text, asked.answer, (draw(scene),))


def read_samples(path: Path) -> list[Sample]:
    """The lines of a JSONL file; empty ones are left out.

    Raises:
        MobileVLMError: no such file, or a line of it is wrong.
        ImageError: a picture file is missing.
        PromptError: a prompt is empty or has the wrong number of ``<image>``.
    """
    if not path.is_file():
        raise MobileVLMError(f"{path}: no such file: expected {OWN!r}, {SCENES!r} or a .jsonl file")
    if path.stat().st_size > MAX_BYTES:
        raise MobileVLMError(f"{path}: larger than {MAX_BYTES >> 20} MiB: take fewer samples")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise MobileVLMError(f"{path}: not a JSONL file in UTF-8: {error}") from None
    samples = [
        _read_sample(line, path, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not samples:
        raise MobileVLMError(f"{path}: no samples in it: expected a JSON object on each line")
    return samples


def _read_sample(text: str, path: Path, where: str) -> Sample:
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MobileVLMError(f"{where}: not JSON: {error}") from None
    line = from_dict(_Line, data, where, strict=True)
    if line.image is not None and line.images:
        raise MobileVLMError(f"{where}: 'image' and 'images': leave one of them out")
    names = line.images if line.image is None else (line.image,)
    images = tuple(path.parent / name for name in names)
    for image in images:
        if not image.is_file():
            raise ImageError(f"{where}: {image}: no such image file")
    try:
        user_message(line.prompt, len(images))
    except PromptError as error:
        raise PromptError(f"{where}: {error}") from None
    return Sample(line.prompt, line.answer, images)


def sample_tokens(model: Model, sample: Sample) -> list[Token]:
    """Prompt and answer as the model meets them: ids, and marks where images go.

    Raises:
        PromptError: a token that the model has no embedding for.
    """
    spec, text = model.spec, sample_text(model.spec, sample)
    images, vocab_size = len(sample.images), spec.decoder.vocab_size
    return read_text(model.tokenizer, spec.conversation, text, images, vocab_size)


def sample_pieces(model: Model, sample: Sample) -> list[Piece]:
    """The same with the runs of each image in the place of its mark."""
    count = len(sample.images)
    images = [pieces_of(image, model.spec.image, count) for image in sample.images]
    return expand(sample_tokens(model, sample), images)


def sample_images(model: Model, sample: Sample) -> Iterator[Prepared]:
    """The images as the model takes them beside the sample's prompt.

    Raises:
        ImageError: an image cannot be read.
    """
    text = sample_text(model.spec, replace(sample, answer=""))
    for image in sample.images:
        prepared = prepare(image, model.spec.image, images=len(sample.images))
        yield with_instruction(prepared, model.instruction_tokenizer, text, model.spec)


def sample_arrays(model: Model, samples: Sequence[Sample]) -> Iterator[Arrays]:
    """Inputs of each run of the encoder, of all images; errors as of :func:`sample_images`."""
    for sample in samples:
        for image in sample_images(model, sample):
            yield from image.arrays


def sample_embeds(
    model: Model, sample: Sample, vision: EncoderEngine, embed: Callable[[list[int]], Float32]
) -> Float32:
    """What the decoder is given for a sample ``(length, hidden_size)``, at most its context: of
    text what ``embed`` makes of the ids, of images the stage's visual tokens."""
    encoded = [
        assemble(map(vision.encode, image.arrays), image.assembly).embeds
        for image in sample_images(model, sample)
    ]
    rows = iter(np.concatenate(encoded) if encoded else ())
    parts = [
        embed(part) if isinstance(part, list) else np.stack(list(islice(rows, part.rows)))
        for part in in_runs(sample_pieces(model, sample))
    ]
    return np.concatenate(parts)[: model.spec.decoder.context_length]


def sample_text(spec: ModelSpec, sample: Sample) -> str:
    """Prompt and answer in the model's template."""
    text = render(spec.conversation, [user_message(sample.prompt, len(sample.images))])
    return f"{text} {sample.answer}" if sample.answer else text


def answer_ids(model: Model, sample: Sample) -> list[int]:
    """Return the ids after the prompt in :func:`sample_tokens`, where a tokenizer may join the end
    of the one with the beginning of the other."""
    tokens, prompt = (sample_tokens(model, part) for part in (sample, replace(sample, answer="")))
    pairs = enumerate(zip(tokens, prompt, strict=False))
    answer = tokens[next((place for place, (a, b) in pairs if a != b), len(prompt)) :]
    return [token for token in answer if isinstance(token, int)]


def tokenizer_digests(model: Model) -> list[str]:
    """Digests of the tokenizer, and of the one for instructions where there is one."""
    found = (model.tokenizer, model.instruction_tokenizer)
    return [hashlib.sha256(part.to_str().encode()).hexdigest() for part in found if part]


def samples_digest(samples: Sequence[Sample]) -> str:
    """Digest of all texts and pictures."""
    digest = hashlib.sha256()
    for sample in samples:
        pictures = [
            file_sha256(image)
            if isinstance(image, Path)
            else hashlib.sha256(image.tobytes()).hexdigest()
            for image in sample.images
        ]
        digest.update(json.dumps([sample.prompt, sample.answer, pictures]).encode())
    return digest.hexdigest()
