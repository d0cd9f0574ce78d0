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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mobilevlm.assembly import assemble
from mobilevlm.conversation import read_text, render, user_message
from mobilevlm.errors import AudioError, ImageError, MobileVLMError, PromptError
from mobilevlm.export.calibration.sounds import PROMPTS, made_sound
from mobilevlm.instruction import with_instruction
from mobilevlm.model import Model
from mobilevlm.nano.drawing import render as draw
from mobilevlm.nano.questions import KINDS, caption_question, questions
from mobilevlm.nano.scenes import TRAINING_SEEDS, sample_scene
from mobilevlm.nano.text_only import text_questions
from mobilevlm.plain_types import from_dict
from mobilevlm.preparation import pieces_of, prepare
from mobilevlm.prompt import (
    Arrays,
    Piece,
    Prepared,
    Rows,
    Sound,
    Token,
    expand,
    grid_positions,
    in_runs,
    run_spans,
    token_ids,
    visual_positions,
)
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
"""Most bytes of a JSONL file."""


@dataclass(frozen=True)
class Sample:
    """One exchange. ``<image>`` in the prompt marks places of images, else they come first."""

    prompt: str
    answer: str
    images: tuple[Path | Image.Image | Sound, ...]
    """Images, or sounds where the model hears."""


@dataclass(frozen=True)
class _Line:
    """A line of a JSONL file."""

    prompt: str
    answer: str = ""
    image: str | None = None
    images: tuple[str, ...] = ()
    audio: str | None = None


def measuring_samples(name: str, inputs: Collection[str] = ("image",)) -> list[Sample]:
    """Return samples to measure on: for ``scenes`` others than those that calibrate, else the JSONL
    file. ``inputs``: kinds of inputs beside text that the model takes.

    Raises:
        MobileVLMError: no such file, or a line of it is wrong.
        ImageError: an image file is missing.
    """
    return scenes_or_file(name, NUM_SCENES, inputs)


def held_out_samples(name: str, inputs: Collection[str] = ("image",)) -> list[Sample]:
    """Return samples to judge on: for ``scenes`` drawn ones that neither calibrate nor measure and
    that no model was trained on, else the JSONL file. ``inputs``: kinds of inputs beside text that
    the model takes.

    Raises:
        MobileVLMError: no such file, or a line of it is wrong.
        ImageError: an image file is missing.
    """
    return scenes_or_file(name, _HELD_OUT, inputs)


def scenes_or_file(name: str, first: int, inputs: Collection[str]) -> list[Sample]:
    """Return drawn ``scenes`` from a seed on, or the content of a JSONL file.

    Raises:
        MobileVLMError: no such file, or a line of it is wrong.
        ImageError: an image file is missing.
    """
    if name == SCENES:
        return scene_samples(first=first, inputs=inputs)
    return read_samples(Path(name))


def scene_samples(
    count: int = NUM_SCENES, first: int = 0, inputs: Collection[str] = ("image",)
) -> list[Sample]:
    """Drawn scenes, each with something else to do: to be described, to be asked about in each way
    that ``mobilevlm eval`` asks, and a question without an image; where the model takes no images
    these questions alone, and sounds where it hears. None of them is in the scenes that ``eval``
    asks about."""
    tasks = ((first + index, _TASKS[index % len(_TASKS)]) for index in range(count))
    found = [
        _scene_sample(seed, task) for seed, task in tasks if "image" in inputs or task == "text"
    ]
    return found + (sound_samples(first) if "audio" in inputs else [])


def sound_samples(first: int) -> list[Sample]:
    """Return made sounds from a seed on, each with another prompt, without answers."""
    prompts = enumerate(PROMPTS, first)
    return [Sample(prompt, "", (made_sound(seed),)) for seed, prompt in prompts]


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
        ImageError: an image file is missing.
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
    images: tuple[Path | Sound, ...] = tuple(path.parent / name for name in names)
    for image in images:
        if isinstance(image, Path) and not image.is_file():
            raise ImageError(f"{where}: {image}: no such image file")
    if line.audio is not None:
        if images:
            raise MobileVLMError(f"{where}: images and 'audio': leave one of them out")
        if not (path.parent / line.audio).is_file():
            raise AudioError(f"{where}: {path.parent / line.audio}: no such sound file")
        images = (Sound(path.parent / line.audio),)
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
    spec, images = model.spec.encoded, []
    if spec is not None:
        images = [pieces_of(image, spec, count) for image in sample.images]
    return expand(sample_tokens(model, sample), images)


def sample_images(model: Model, sample: Sample) -> Iterator[Prepared]:
    """The images as the model takes them beside the sample's prompt.

    Raises:
        ImageError: an image cannot be read.
    """
    text = sample_text(model.spec, replace(sample, answer=""))
    spec = model.spec.encoded
    for image in sample.images:
        assert spec is not None
        prepared = prepare(image, spec, images=len(sample.images))
        yield with_instruction(prepared, model.instruction_tokenizer, text, model.spec)


def sample_arrays(model: Model, samples: Sequence[Sample]) -> Iterator[Arrays]:
    """Inputs of each run of the encoder, of all images; errors as of :func:`sample_images`."""
    for sample in samples:
        for image in sample_images(model, sample):
            yield from image.arrays


def sample_rows(
    model: Model, sample: Sample, vision: EncoderEngine, embed: Callable[[list[int]], Float32]
) -> Rows:
    """Return what the decoder is given for a sample, at most its context: of text what ``embed``
    makes of the ids, of images what the stage gives."""
    encoded = [
        assemble(map(vision.encode, image.arrays), image.assembly)
        for image in sample_images(model, sample)
    ]
    pieces, decoder = sample_pieces(model, sample), model.spec.decoder
    rows = iter(np.concatenate([image.embeds for image in encoded]) if encoded else ())
    parts = [
        embed(part) if isinstance(part, list) else np.stack(list(islice(rows, part.rows)))
        for part in in_runs(pieces)
    ]
    whole, context, added = np.concatenate(parts), decoder.context_length, []
    for layer in zip(*(image.deep for image in encoded), strict=True):
        added.append(np.zeros_like(whole))
        added[-1][visual_positions(pieces)] = np.concatenate(layer)
    placed = None
    if decoder.rope_sections:
        placed = grid_positions(pieces, decoder.position_axes)[:, :context]
    blocks = [span for span in run_spans(pieces) if span[1] <= context]
    return Rows(
        whole[:context],
        tuple(part[:context] for part in added),
        placed,
        tuple(blocks) if decoder.image_blocks else (),
        bool(encoded),
        token_ids(pieces)[:context],
    )


def sample_text(spec: ModelSpec, sample: Sample) -> str:
    """Prompt and answer in the model's template."""
    shows = spec.conversation.shows
    said = user_message(sample.prompt, len(sample.images), shows == "image", shows)
    text = render(spec.conversation, [said])
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
    """Digest of all texts and images."""
    digest = hashlib.sha256()
    for sample in samples:
        digests = [_digest(image) for image in sample.images]
        digest.update(json.dumps([sample.prompt, sample.answer, digests]).encode())
    return digest.hexdigest()


def _digest(shown: Path | Image.Image | Sound) -> str:
    """Digest of an image or a sound."""
    if isinstance(shown, Sound):
        source = shown.source
        if isinstance(source, tuple):
            return hashlib.sha256(np.ascontiguousarray(source[0]).data).hexdigest()
        assert isinstance(source, Path)
        return file_sha256(source)
    if isinstance(shown, Path):
        return file_sha256(shown)
    return hashlib.sha256(shown.tobytes()).hexdigest()
