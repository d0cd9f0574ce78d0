"""Training of the model that also hears and draws: ``python -m mobilevlm.nano.training.anything``.

Two stages, which need nothing of each other and may run side by side: ``pixels`` teaches the
decoder of codes to draw, ``joint`` all else: answers about images, letters of beeps, codes of
captions.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.media.sound_image import sound_image
from mobilevlm.model import Model
from mobilevlm.nano import beeps
from mobilevlm.nano.questions import SHORT_STYLE, caption_question, questions
from mobilevlm.nano.simple import (
    EDGE,
    GRID,
    codes_of,
    draw_exactly,
    draw_varied,
    patch_vectors,
    simple_caption,
    simple_scene,
)
from mobilevlm.nano.training.any_files import (
    BEGIN,
    END,
    IMAGE,
    IMAGE_END,
    KINDS,
    PLACES,
    AnyConfig,
    new_model,
    save_weights,
)
from mobilevlm.nano.training.any_scores import scores
from mobilevlm.nano.training.optimizer import MuonAdamW
from mobilevlm.nano.training.train import append_log, load_state, save_state
from mobilevlm.reference.decoder import rotary_tables
from mobilevlm.reference.model import ReferenceModel, load_reference

ROWS = {"see": 18, "hear": 3, "draw": 8}
"""Rows of each kind in a step."""
QUESTIONS = 4
"""Questions about an image in a row, one after the other."""
NO_TARGET = -100
UNCONDITIONAL = 0.05
"""Share of captions that are blank, for guidance."""
LOG_EVERY = 50
SAVE_SECONDS = 60.0
PIXEL_ROWS = 12


@dataclass(frozen=True)
class Rows:
    """A batch of rows of one kind."""

    ids: Tensor
    """``(rows, length)``; at places of an image and of codes any"""
    targets: Tensor
    """Token, or code, that follows each place; NO_TARGET where nothing is learnt"""
    pixels: Tensor | None = None
    """Images uint8 ``(rows, 48, 48, 3)``, which stand behind two tokens"""
    codes: Tensor | None = None
    """Codes ``(rows, 36)``, of which all but the last stand at the end of rows"""


def encode(model: Model, text: str) -> list[int]:
    """Return the ids of a text."""
    return list(model.tokenizer.encode(text, add_special_tokens=False).ids)


def padded(rows: list[tuple[list[int], list[int]]], **further: Any) -> Rows:
    """Return rows of ids and targets as a batch."""
    length = max(len(ids) for ids, _ in rows)
    ids = [ids + [END] * (length - len(ids)) for ids, _ in rows]
    targets = [found + [NO_TARGET] * (length - len(found)) for _, found in rows]
    return Rows(torch.tensor(ids), torch.tensor(targets), **further)


def question_row(model: Model, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Return ids and targets of an image with questions and answers."""
    ids = [BEGIN, IMAGE, *[END] * (GRID * GRID), IMAGE_END]
    targets = [NO_TARGET] * len(ids)
    for question, answer in turns:
        asked, said = encode(model, f"{question}\n"), [*encode(model, answer), END]
        ids += asked + said
        targets += [NO_TARGET] * (len(asked) - 1) + said + [NO_TARGET]
    return ids, targets


def seeing(model: Model, seeds: list[int]) -> Rows:
    """Return rows of images of scenes with questions."""
    rows, images = [], []
    for seed in seeds:
        scene = simple_scene(seed)
        asked = [one for one in questions(scene, 3 * QUESTIONS, KINDS) if one.style == "full"]
        asked = [caption_question(scene), *asked] if seed % 2 else asked
        turns = [(one.text.removesuffix(SHORT_STYLE), one.answer) for one in asked[:QUESTIONS]]
        if seed % 2:
            turns[0] = (turns[0][0], _sentence(simple_caption(scene)))
        rows.append(question_row(model, turns))
        images.append(draw_exactly(scene) if seed % 5 == 0 else draw_varied(scene, seed))
    return padded(rows, pixels=torch.from_numpy(np.stack(images)))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def hearing(model: Model, seeds: list[int]) -> Rows:
    """Return rows of spectrograms of clips with their letters."""
    clips = [beeps.sample_clip(seed) for seed in seeds]
    images = [sound_image(beeps.sound(clip), EDGE) for clip in clips]
    rows = [question_row(model, [(beeps.QUESTION, clip.answer)]) for clip in clips]
    return padded(rows, pixels=torch.from_numpy(np.stack(images)))


def drawing_ids(model: Model, caption: str) -> list[int]:
    """Return the prompt that an image is drawn from."""
    return [BEGIN, *encode(model, f"{caption}\n"), *PLACES, IMAGE]


def drawing(model: Model, seeds: list[int]) -> Rows:
    """Return rows of captions with codes; they begin at the left, so that they end together."""
    rows, codes = [], []
    for seed in seeds:
        scene = simple_scene(seed)
        ids = drawing_ids(model, simple_caption(scene))
        if random.Random(seed).random() < UNCONDITIONAL:
            ids = [BEGIN, *[END] * (len(ids) - len(PLACES) - 2), *PLACES, IMAGE]
        codes.append(codes_of(draw_exactly(scene)))
        rows.append(ids)
    length = max(map(len, rows))
    made = torch.from_numpy(np.stack(codes))
    prompts = torch.tensor([[END] * (length - len(row)) + row for row in rows])
    empty = torch.full((len(rows), GRID * GRID - 1), END)
    return Rows(torch.cat([prompts, empty], dim=1), made, codes=made)


def states(reference: ReferenceModel, rows: Rows) -> Tensor:
    """Return the decoder's last states ``(rows, length, hidden)``."""
    decoder = reference.decoder
    hidden = decoder.embed_tokens(rows.ids)
    mask = None
    if rows.pixels is not None:
        pixels = rows.pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        patches = reference.vision(pixels)
        visual = reference.projector(patches)
        hidden = torch.cat([hidden[:, :2], visual, hidden[:, 2 + GRID * GRID :]], dim=1)
    if rows.codes is not None:
        made = reference.codes(rows.codes[:, :-1])
        hidden = torch.cat([hidden[:, : -made.shape[1]], made], dim=1)
        length = rows.ids.shape[1]
        real = (rows.ids == BEGIN).cumsum(1) > 0
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        mask = (seen & real[:, None, :] | torch.eye(length, dtype=torch.bool))[:, None]
    rotary = rotary_tables(reference.spec.decoder, torch.arange(rows.ids.shape[1]), layer=0)
    for layer in decoder.layers:
        hidden = layer(hidden, rotary, mask)
    out: Tensor = decoder.norm(hidden)
    return out


def measure(reference: ReferenceModel, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch, and the share of rows that are right in all their targets."""
    found = states(reference, rows)
    if rows.codes is not None:
        logits = reference.image_head(found[:, -GRID * GRID :])
        busy = 1 + 4 * (rows.targets != 0).float()
        each = F.cross_entropy(logits.transpose(1, 2), rows.targets, reduction="none")
        loss = (each * busy).sum() / busy.sum()
        right = (logits.argmax(-1) == rows.targets).all(1)
        return loss, right.float().mean()
    told = rows.targets != NO_TARGET
    logits = reference.decoder.logits(found[told])
    loss = F.cross_entropy(logits, rows.targets[told])
    wrong = torch.zeros(rows.targets.shape)
    wrong[told] = (logits.argmax(-1) != rows.targets[told]).float()
    return loss, (wrong.sum(1) == 0).float().mean()


MAKERS = {"see": seeing, "hear": hearing, "draw": drawing}


def joint_loss(
    model: Model, reference: ReferenceModel, step: int
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a step, and figures of its parts."""
    total, figures = torch.zeros(()), {}
    for kind, count in ROWS.items():
        seeds = [step * count + row for row in range(count)]
        loss, right = measure(reference, MAKERS[kind](model, seeds))
        total = total + loss
        figures[kind], figures[f"{kind}_right"] = loss.item(), right.item()
    return total, figures


def pixel_loss(
    model: Model, reference: ReferenceModel, step: int
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of the decoder of codes in a step, as a figure too."""
    images = [draw_exactly(simple_scene(step * PIXEL_ROWS + row)) for row in range(PIXEL_ROWS)]
    codes = torch.from_numpy(np.stack([codes_of(image) for image in images]))
    wanted = torch.from_numpy(np.stack(images)).float() / 127.5 - 1
    made = reference.image_decoder(codes)
    shown = (wanted - wanted[:, :1, :1].mean()).abs().amax(-1, keepdim=True) > 0.05
    weight = 1 + 4 * shown.float()
    absolute = ((made - wanted).abs() * weight).mean()
    square = ((made - wanted) ** 2 * weight).mean()
    return square + absolute, {"square": square.item(), "absolute": absolute.item()}


LOSSES = {"joint": joint_loss, "pixels": pixel_loss}
PEAKS = {"joint": 3e-3, "pixels": 2e-3}
"""Peak learning rate of each stage."""


def trained_parts(reference: ReferenceModel, stage: str) -> list[nn.Parameter]:
    """Return the parameters that a stage trains."""
    return [
        parameter
        for name, parameter in reference.named_parameters()
        if name.startswith("image_decoder.") == (stage == "pixels")
    ]


def train(
    stage: Literal["joint", "pixels"],
    out: Path,
    minutes: float,
    config: AnyConfig | None = None,
    steps: int = 10**9,
    seed: int = 0,
) -> ReferenceModel:
    """Train a stage for so many minutes of the clock in all, or so many steps; a run that was
    killed goes on from its last checkpoint in ``out``."""
    torch.manual_seed(seed)
    model = new_model(out / "model", config or AnyConfig())
    reference = load_reference(model).train()
    chosen = trained_parts(reference, stage)
    for parameter in chosen:
        parameter.requires_grad_(True)
    if not (out / f"{stage}.pt").exists() and stage == "joint":
        _shrink(reference)
    elif not (out / f"{stage}.pt").exists():
        codebook = reference.image_decoder.codebook.weight
        codebook.data.copy_(torch.from_numpy(patch_vectors(codebook.shape[1])))
    tables = {id(table.weight) for table in reference.modules() if isinstance(table, nn.Embedding)}
    heads = {id(reference.decoder.lm_head.weight)}
    matrices = [one for one in chosen if one.dim() == 2 and id(one) not in tables | heads]
    known = {id(one) for one in matrices}
    others = [one for one in chosen if id(one) not in known]
    optimizer = MuonAdamW(matrices, others, PEAKS[stage], 0.01)
    step, spent, path = 0, 0.0, out / f"{stage}.pt"
    if path.exists():
        state = load_state(path)
        reference.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
    began = saved = time.monotonic() - spent
    sums: dict[str, float] = {}
    while True:
        seconds = time.monotonic() - began
        progress = max(seconds / (60 * minutes), step / steps)
        ends = progress >= 1
        if ends or seconds - (saved - began) > SAVE_SECONDS:
            save_state(
                path,
                {
                    "model": reference.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "seconds": seconds,
                    "config": asdict(config or AnyConfig()),
                },
            )
            saved = time.monotonic()
        if ends:
            return reference.eval()
        rate = PEAKS[stage] * min(1.0, (step + 1) / 50, max(0.02, (1 - progress) / 0.4))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, figures = LOSSES[stage](model, reference, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        step += 1
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value / LOG_EVERY
        if step % LOG_EVERY == 0:
            rounded = {name: round(value, 4) for name, value in sums.items()}
            append_log(out / f"{stage}.jsonl", {"step": step, "seconds": round(seconds), **rounded})
            sums = {}


@torch.no_grad()
def _shrink(reference: ReferenceModel) -> None:
    """Make what writes to the residual stream smaller, and the head's logits."""
    for blocks in (reference.decoder.layers, reference.vision.layers):
        for name, parameter in blocks.named_parameters():
            if name.endswith(
                ("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")
            ):
                parameter.mul_((2 * len(blocks)) ** -0.5)
    reference.decoder.lm_head.weight.mul_(0.5)


@click.group(help=__doc__)
def main() -> None:
    """Trains and saves the model."""


@main.command("train")
@click.argument("stage", type=click.Choice(list(LOSSES)))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--minutes", type=float, required=True, help="Time of the stage, in all.")
@click.option("--threads", type=int, default=1, show_default=True)
def train_command(
    stage: Literal["joint", "pixels"], out: Path, minutes: float, threads: int
) -> None:
    """Trains a STAGE; a run that was killed goes on where it was."""
    torch.set_num_threads(threads)
    train(stage, out, minutes)


@main.command("export")
@click.argument("out", type=click.Path(path_type=Path, exists=True))
def export_command(out: Path) -> None:
    """Writes the weights of both stages of a run into its folder ``model``."""
    model = new_model(out / "model", AnyConfig())
    reference = load_reference(model)
    joint, pixels = (load_state(out / f"{stage}.pt")["model"] for stage in ("joint", "pixels"))
    reference.load_state_dict(
        {name: (pixels if name.startswith("image_decoder.") else joint)[name] for name in joint}
    )
    save_weights(reference, model)


@main.command("evaluate")
@click.argument("bundle")
@click.option("--count", default=100, show_default=True, help="Questions of each kind.")
def evaluate_command(bundle: str, count: int) -> None:
    """Prints the held-out scores of a BUNDLE, whose images nano judges."""
    import mobilevlm

    with mobilevlm.load(bundle) as vlm, mobilevlm.load("nano") as judge:
        for name, found in scores(vlm, judge, count):
            click.echo(
                f"{name}: {found.accuracy:.1%} ({found.low:.1%}-{found.high:.1%}) of {found.asked}"
            )


if __name__ == "__main__":
    main()
