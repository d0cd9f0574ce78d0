"""How far the artifacts of a bundle are from the float32 reference (needs torch).

The reference is streamed layer by layer over a group of samples, and logits are compared sample by
sample, so this needs no more memory than the export itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mobilevlm.bundle import Bundle, StageQuality
from mobilevlm.console.progress import Advance, ignore
from mobilevlm.export.calibration.reference_states import exact_images
from mobilevlm.export.calibration.samples import (
    Sample,
    answer_ids,
    sample_pieces,
    sample_text,
    sound_samples,
)
from mobilevlm.export.calibration.statistics import sample_groups
from mobilevlm.export.quality.metrics import (
    Float32,
    TextFigures,
    TokenFigures,
    VectorFigures,
    compare_logits,
    compare_vectors,
    exponential,
    greedy_figures,
    greedy_match,
    joined,
    perplexity_figures,
    rounded,
    text_figures,
    token_figures,
    vision_figures,
)
from mobilevlm.export.quality.passages import EXPECTED
from mobilevlm.model import Model
from mobilevlm.plan import Plan, stage_formats, stage_names
from mobilevlm.prompt import Piece, Rows, grid_positions, run_spans, token_ids
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.reference.model import ImageRows, held
from mobilevlm.reference.steps import State
from mobilevlm.reference.streaming import stream_steps
from mobilevlm.runtime.open_model import open_model
from mobilevlm.runtime.tuning.plan_file import PlanChoice
from mobilevlm.runtime.vlm import VLM
from mobilevlm.spec import ModelSpec

PROMPTS = (
    "Describe the picture.",
    "What colour is the largest shape?\nAnswer the question using a single word or phrase.",
)
GREEDY_TOKENS = 16
POSITIONS = 1 << 12
"""Positions of a group's prompts and answers: their states stay in memory while the layers stream
by."""


_Seen: TypeAlias = tuple[tuple[VectorFigures, ...], tuple[VectorFigures, ...]]
"""Figures of a sample's images: the tower's features (none where the engine keeps them inside), and
the visual tokens."""


@dataclass(frozen=True)
class _Answer:
    """An answer to a sample, and what the reference makes of both."""

    tokens: Sequence[int]
    rows: Rows
    """Prompt and answer"""
    state: Tensor
    """Rows that the head reads ``(1, length, hidden_size)``"""
    is_own: bool
    """It is the bundle's, not the sample's"""


@dataclass(frozen=True)
class SampleFigures:
    """Metrics of one sample."""

    sample: Sample
    features: tuple[VectorFigures, ...]
    """Figures of the tower's output, one per image; empty where the engine does not give it"""
    visual: tuple[VectorFigures, ...]
    """Figures of the visual tokens, one per image"""
    decoder: TokenFigures
    """Given the reference's visual tokens, over the bundle's own answer and the sample's"""
    prefill: TokenFigures | None
    """The same of the prefill graph, where there is one"""
    whole: TokenFigures | None
    """Given the bundle's own visual tokens; where the sample has an answer"""
    text: TextFigures | None
    """Figures of the sample's answer, given the bundle's own visual tokens"""
    greedy: tuple[int, ...]
    """Tokens that the bundle answers with, up to the end-of-text token"""
    match: float | None
    """Share of them before the first that the reference would not have chosen; none where the
    bundle was not asked"""


@dataclass(frozen=True)
class Measurement:
    """A bundle in one engine, beside the reference."""

    stages: dict[str, StageQuality]
    samples: tuple[SampleFigures, ...]
    note: str = ""
    """Why the texts are not among the samples"""


def measure(
    model: Model,
    bundle: Bundle,
    engine: str,
    samples: Sequence[Sample],
    max_new_tokens: int = GREEDY_TOKENS,
    threads: int | None = None,
    advance: Advance = ignore,
    texts: Sequence[Sample] = (),
    plan: Plan | PlanChoice = "none",
) -> Measurement:
    """Run bundle and reference on the same samples. docs/explanation/quality.md defines
    the figures.

    ``max_new_tokens``: of each greedy answer. ``advance`` hears of each sample. ``texts``: of
    :func:`mobilevlm.export.quality.passages.text_samples`, which are left out if the reference does
    not expect them and there are other samples; the bundle answers those that have no answer.

    Raises:
        PromptError: a sample does not fit into the context.
        ImageError: an image cannot be read.
    """
    found: list[SampleFigures] = []
    everything = [*samples, *texts]
    silent = {id(sample) for sample in texts if sample.answer}
    with open_model(bundle, engine, threads, plan=plan) as vlm, torch.no_grad():
        reference = load_reference(model, streamed=True)
        for group in sample_groups(model, everything, POSITIONS):
            asked = [id(sample) not in silent for sample in group]
            found += _measure_group(model, reference, vlm, group, asked, max_new_tokens, advance)
        drawn: dict[str, StageQuality] = {}
        if model.spec.draws and engine == "onnx":
            from mobilevlm.export.quality.drawing import measure_drawing

            drawn = measure_drawing(model, reference, vlm)
    note = _unexpected(found[len(samples) :]) if samples else ""
    if note:
        found = found[: len(samples)]
    stages = _stages(found, stage_names(bundle, engine)) | drawn
    return Measurement(stages, tuple(found), note)


def _unexpected(found: Sequence[SampleFigures]) -> str:
    """Say that the passages are not what the reference expects, if so."""
    texts = [item.text for item in found if item.text is not None]
    if not texts:
        return ""
    tokens = sum(item.tokens for item in texts)
    perplexity = rounded(exponential(sum(item.exact for item in texts) / tokens))
    if perplexity <= EXPECTED:
        return ""
    return f"plain English has a perplexity of {perplexity:.0f} in this model: judged on images"


def synthetic_samples(spec: ModelSpec) -> list[Sample]:
    """Return the images or sounds that an export is measured on, the same ones every time."""
    if spec.has_sound:
        return sound_samples(0)[: len(PROMPTS)]
    if not spec.has_images:
        return []
    size = spec.image.usual_edge
    return [
        Sample(prompt, "", (Image.fromarray(calibration_image(seed, size)),))
        for seed, prompt in enumerate(PROMPTS)
    ]


def with_own_answers(model: Model, measured: Measurement) -> list[Sample]:
    """The samples, those without an answer with the bundle's own."""
    return [
        item.sample
        if item.sample.answer
        else dataclasses.replace(item.sample, answer=greedy_text(model, item.greedy))
        for item in measured.samples
    ]


def layer_samples(model: Model, measured: Measurement, count: int) -> list[Sample]:
    """Return so many samples with answers, to try single layers on: the longest text, if there is
    one, and the first others."""
    answered = with_own_answers(model, measured)
    texts = [sample for sample in answered if not sample.images]
    longest = sorted(texts, key=lambda sample: len(sample.answer), reverse=True)[:1]
    others = [sample for sample in answered if sample not in longest]
    return [*longest, *others][:count]


def greedy_text(model: Model, tokens: Sequence[int]) -> str:
    """Tokens of an answer as a person sees them."""
    text: str = model.tokenizer.decode(list(tokens))
    return text.strip()


def calibration_image(seed: int, size: int) -> NDArray[np.uint8]:
    """An image ``(size, size, 3)`` of smooth colours, edges and noise, fixed by the seed."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / np.float32(size)
    pixels = np.zeros((size, size, 3), np.float32)
    for channel in range(3):
        a, b, phase = random.uniform(1, 8, 3)
        pixels[..., channel] = 0.5 + 0.3 * np.sin(a * x + b * y + phase)
    for _ in range(6):
        left, top = random.uniform(0, 0.8, 2)
        width, height = random.uniform(0.05, 0.3, 2)
        inside = (x > left) & (x < left + width) & (y > top) & (y < top + height)
        pixels[inside] = random.uniform(0, 1, 3)
    pixels += random.normal(0, 0.02, pixels.shape)
    return (pixels.clip(0, 1) * 255).astype(np.uint8)


def reference_answers(
    model: Model, figures: Sequence[SampleFigures], max_new_tokens: int
) -> list[list[int]]:
    """The greedy tokens of the reference itself, where a bundle's were measured: from the first
    token on that differs a full pass for each, with no cache to be wrong."""
    reference = load_reference(model, streamed=True)
    samples = [item.sample for item in figures]
    ends = model.spec.conversation.eos_token_ids
    answers = [list(item.greedy[: round((item.match or 0) * len(item.greedy))]) for item in figures]
    visual = _visual_tokens(model, reference, samples)
    prompts = _prompts(reference, [_prompt_pieces(model, sample) for sample in samples], visual)

    def is_open(index: int) -> bool:
        tokens = answers[index]
        return len(tokens) < max_new_tokens and not (tokens and tokens[-1] in ends)

    with torch.no_grad():
        while going := [index for index in range(len(figures)) if is_open(index)]:
            states = _last_states(
                reference, [prompts[index] for index in going], [answers[index] for index in going]
            )
            for index, state in zip(going, states, strict=True):
                answers[index].append(int(_logits(reference, state[:, -1:])[0].argmax()))
    return answers


def _measure_group(
    model: Model,
    reference: ReferenceModel,
    vlm: VLM,
    samples: Sequence[Sample],
    asked: Sequence[bool],
    max_new_tokens: int,
    advance: Advance,
) -> list[SampleFigures]:
    """``asked``: the samples that the bundle answers itself; all others have an answer."""
    visual, seen = _measure_images(model, reference, vlm, samples)
    if model.spec.decoder.encoder_layers:
        return _measure_encoded(model, reference, vlm, samples, visual, seen, advance)
    greedy = [
        _greedy(vlm, sample, max_new_tokens) if wanted else []
        for sample, wanted in zip(samples, asked, strict=True)
    ]
    own = [index for index, wanted in enumerate(asked) if wanted]
    answered = [index for index, sample in enumerate(samples) if sample.answer]
    pieces = [[*_prompt_pieces(model, samples[index]), *greedy[index]] for index in own]
    pieces += [sample_pieces(model, samples[index]) for index in answered]
    prompts = _prompts(reference, pieces, [visual[index] for index in (*own, *answered)])
    states = iter(_last_states(reference, prompts, [()] * len(prompts)))
    given = (_rows(model, *pair) for pair in zip(pieces, prompts, strict=True))
    answers: dict[int, list[_Answer]] = {index: [] for index in range(len(samples))}
    for index in own:
        answers[index].append(_Answer(greedy[index], next(given), next(states), True))
    for index in answered:
        ids = answer_ids(model, samples[index])
        answers[index].append(_Answer(ids, next(given), next(states), False))
    found: list[SampleFigures] = []
    with held(reference.decoder.lm_head):
        for index, sample in enumerate(samples):
            found.append(_measure_answers(reference, vlm, sample, seen[index], answers[index]))
            advance(1)
    return found


def _measure_answers(
    reference: ReferenceModel,
    vlm: VLM,
    sample: Sample,
    seen: _Seen,
    answers: Sequence[_Answer],
) -> SampleFigures:
    has_prefill = "prefill" in stage_formats(vlm.bundle, vlm.engine)
    decoder: list[TokenFigures] = []
    prefill: list[TokenFigures] = []
    whole = text = match = None
    greedy: tuple[int, ...] = ()
    for answer in answers:
        count = len(answer.tokens) + 1
        exact = _logits(reference, answer.state[:, -count:])
        if answer.is_own:
            greedy = tuple(answer.tokens)
            match = greedy_match(greedy, exact[:-1].argmax(axis=-1).tolist())
        else:
            prompt = sample_text(vlm.spec, sample)
            # As in use: the prefill graph, if there is one, does not see the answer.
            read = vlm.prompt_logits(prompt, sample.images, True, count - 1, count)
            whole = compared = compare_logits(read, exact)
            text = text_figures(read[:-1], exact[:-1], answer.tokens)
            del read  # as large as those that the next comparisons need
        if not answer.is_own and not sample.images and not has_prefill:
            decoder.append(compared)  # of a text both are the same
        else:
            decoder.append(compare_logits(vlm.embeds_logits(answer.rows, False, count), exact))
        if has_prefill:
            prefill.append(compare_logits(vlm.embeds_logits(answer.rows, True, count), exact))
    return SampleFigures(
        sample,
        *seen,
        joined(decoder),
        joined(prefill) if prefill else None,
        whole,
        text,
        greedy,
        match,
    )


def _measure_encoded(
    model: Model,
    reference: ReferenceModel,
    vlm: VLM,
    samples: Sequence[Sample],
    visual: Sequence[Sequence[ImageRows]],
    seen: Sequence[_Seen],
    advance: Advance,
) -> list[SampleFigures]:
    """Measure a model with an encoder, which reads the prompt alone, on its own answers."""
    greedy = [_greedy(vlm, sample, GREEDY_TOKENS) for sample in samples]
    prompts = _prompts(reference, [_prompt_pieces(model, sample) for sample in samples], visual)
    states = _last_states(reference, prompts, greedy)
    found: list[SampleFigures] = []
    with held(reference.decoder.lm_head):
        for index, (sample, tokens) in enumerate(zip(samples, greedy, strict=True)):
            exact = _logits(reference, states[index])
            decoder = compare_logits(
                vlm.answer_logits(prompts[index].hidden[0].numpy(), tokens), exact
            )
            match = greedy_match(tokens, exact[:-1].argmax(axis=-1).tolist())
            found.append(
                SampleFigures(sample, *seen[index], decoder, None, None, None, tuple(tokens), match)
            )
            advance(1)
    return found


def _measure_images(
    model: Model, reference: ReferenceModel, vlm: VLM, samples: Sequence[Sample]
) -> tuple[list[list[ImageRows]], list[_Seen]]:
    """The reference's visual tokens of each sample's images, and how the bundle sees them."""
    has_features = stage_formats(vlm.bundle, vlm.engine).get("vision") != "gguf"
    exact = exact_images(model, reference, samples)
    visual: list[list[ImageRows]] = []
    seen: list[_Seen] = []
    for sample in samples:
        features: list[VectorFigures] = []
        tokens: list[VectorFigures] = []
        visual.append([])
        for image in sample.images:
            state, projected = next(exact)
            visual[-1].append(projected)
            found = vlm.encode_image(image, sample.prompt)
            tokens.append(compare_vectors(found, projected.tokens.numpy()))
            if has_features:
                features.append(compare_vectors(vlm.image_features(image), state.numpy()))
        seen.append((tuple(features), tuple(tokens)))
    return visual, seen


def _visual_tokens(
    model: Model, reference: ReferenceModel, samples: Sequence[Sample]
) -> list[list[ImageRows]]:
    images = exact_images(model, reference, samples)
    return [[next(images)[1] for _ in sample.images] for sample in samples]


def _prompts(
    reference: ReferenceModel,
    prompts: Sequence[Sequence[Piece]],
    visual: Sequence[Sequence[ImageRows]],
) -> list[State]:
    """Return the decoder's state of each prompt before the first step."""
    with torch.no_grad(), held(reference.decoder.embed_tokens):
        return [
            reference.prompt(pieces, images) for pieces, images in zip(prompts, visual, strict=True)
        ]


def _rows(model: Model, pieces: Sequence[Piece], prompt: State) -> Rows:
    """Return what the bundle's decoder is given of a prompt."""
    decoder, placed = model.spec.decoder, None
    if decoder.rope_sections:
        placed = grid_positions(pieces, decoder.position_axes)
    blocks = tuple(run_spans(pieces)) if decoder.image_blocks else ()
    names = [f"deep.{layer}" for layer in decoder.deep_layers]
    deep = tuple(prompt.given[name][0].numpy() for name in names if name in prompt.given)
    heard = "heard" in prompt.given
    return Rows(prompt.hidden[0].numpy(), deep, placed, blocks, heard, token_ids(pieces))


def _last_states(
    reference: ReferenceModel, prompts: Sequence[State], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Return what the head reads ``(1, length, hidden_size)`` of each prompt and its answer."""
    with torch.no_grad(), held(reference.decoder.embed_tokens):
        pairs = zip(prompts, answers, strict=True)
        states = [reference.decoder.answered(item, answer) for item, answer in pairs]
    return [state.hidden for state in stream_steps(reference.decoder_steps(), states)]


def _logits(reference: ReferenceModel, state: Tensor) -> Float32:
    """Return the logits ``(length, vocab_size)`` of final states ``(1, length, hidden_size)``."""
    out: Float32 = reference.decoder.logits(state)[0].numpy()
    return out


def _prompt_pieces(model: Model, sample: Sample) -> list[Piece]:
    return sample_pieces(model, dataclasses.replace(sample, answer=""))


def _greedy(vlm: VLM, sample: Sample, max_new_tokens: int) -> list[int]:
    """The bundle's answer, with the end-of-text token where it comes to one."""
    tokens = vlm.generate(
        sample.prompt, sample.images, max_new_tokens=max_new_tokens, ignore_eos=True
    ).token_ids
    ends = vlm.spec.conversation.eos_token_ids
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


def _stages(found: Sequence[SampleFigures], names: Mapping[str, str]) -> dict[str, StageQuality]:
    vision: dict[str, float] = {}
    visual = [part for item in found for part in item.visual]
    features = [part for item in found for part in item.features]
    if visual:
        vision = vision_figures(visual)
    if features:
        near = vision_figures(features)
        vision |= {f"features_{name}": near[name] for name in ("cosine", "relative_error")}
    whole = [item.whole for item in found if item.whole is not None]
    texts = [item.text for item in found if item.text is not None]
    end_to_end = greedy_figures([item.match for item in found if item.match is not None])
    if whole:
        end_to_end |= {"kl": token_figures(whole)["kl"], **perplexity_figures(texts)}
    prefill = [item.prefill for item in found if item.prefill is not None]
    stages = {
        "audio" if "audio" in names else "vision": vision,
        "decoder": token_figures([item.decoder for item in found]),
        "prefill": token_figures(prefill) if prefill else {},
        "end_to_end": end_to_end,
    }
    return {names[stage]: StageQuality(figures) for stage, figures in stages.items() if figures}
