"""Trains nano: one recipe per call, resumable, the same on a CPU and on a GPU.

    python -m mobilevlm.nano.training train vision   --out runs/nano
    python -m mobilevlm.nano.training train pretrain --out runs/nano
    python -m mobilevlm.nano.training train sft      --out runs/nano
    python -m mobilevlm.nano.training export runs/nano/sft/state.pt nano
    python -m mobilevlm.nano.training evaluate nano

A stage starts from where the stage before it ended; run again after a kill it goes on from its
last checkpoint, bit for bit as if nothing had happened. ``log.jsonl`` has loss and accuracy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mobilevlm.errors import CheckpointError
from mobilevlm.nano.training.dense import CLASSES
from mobilevlm.nano.training.grounding import CELLS
from mobilevlm.nano.training.model import NanoConfig, NanoModel, balance_loss
from mobilevlm.nano.training.optimizer import MuonAdamW
from mobilevlm.nano.training.packed_attention import packed_mask
from mobilevlm.nano.training.packing import Batch, StepDataset, normalized
from mobilevlm.nano.training.recipes import ALL_KINDS, Recipe
from mobilevlm.nano.training.tokenizer import NanoTokenizer
from mobilevlm.nano.training.window import keep_codes, set_window, sharpen

EMPTY_WEIGHTS = (0.2, 0.2, 0.2, 0.2, 0.02, 0.02, 1.0)
"""Weight of 'nothing' for each head of CLASSES; characters are the rarest."""


@dataclass(frozen=True)
class Run:
    """Folder, device and pace of a stage; only ``seed`` changes what is learnt."""

    out: Path
    """Folder with one sub-folder per stage."""
    seed: int = 0
    device: str = "cpu"
    workers: int = 0
    """Processes that render batches; 0: the training process does."""
    bfloat16: bool = False
    """Matrix products in bfloat16, everything else in float32."""
    budget_minutes: float | None = None
    """Ends the stage by the clock: the schedule follows whichever of steps and time is ahead."""
    pause_minutes: float | None = None
    """Leaves the stage after this long, to be gone on with by another call."""
    save_seconds: float = 120.0
    log_every: int = 10


@dataclass(frozen=True)
class Losses:
    """Losses of one step; tensors, so that a GPU need not wait."""

    total: Tensor
    language: Tensor
    dense: Tensor
    grounding: Tensor
    balance: Tensor
    right: Tensor
    """Questions answered exactly, per kind of ALL_KINDS."""
    asked: Tensor


class Trainee(nn.Module):
    """The model and the heads that only training uses."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.nano = NanoModel(config)
        self.heads = nn.Linear(config.hidden_size, sum(CLASSES.values()))
        self.grounding = nn.Linear(config.hidden_size, CELLS)


def dense_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over heads of the cross entropy; 'nothing' weighs little, as most places are empty.

    ``logits`` (images, tokens, all classes), ``targets`` (images, heads, tokens).
    """
    losses = []
    for index, part in enumerate(torch.split(logits.float(), list(CLASSES.values()), dim=-1)):
        weight = torch.ones(part.shape[-1], device=part.device)
        weight[0] = EMPTY_WEIGHTS[index]
        losses.append(F.cross_entropy(part.flatten(0, 1), targets[:, index].flatten(), weight))
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class Outputs:
    """Results of the decoder for a batch."""

    logits: Tensor
    """(answers, vocabulary): at the places that predict answer tokens"""
    halfway: Tensor
    """(phrases, hidden): states of the phrases after half of the layers"""
    balance: Tensor
    """Mean load-balancing loss of the sparse layers, 0 where there are none"""


def decode(model: NanoModel, batch: Batch, visual: Tensor) -> Outputs:
    """Runs the decoder over all rows; ``visual`` as ``encode_images`` gives it."""
    logits, halfway, balance = [], [], torch.zeros((), device=visual.device)
    rows = sum(len(group.ids) for group in batch.groups)
    for group in batch.groups:
        mask = packed_mask(group.blocks, group.prefix)
        states = model.hidden_states(group.ids, group.slots, group.positions, mask, visual)
        logits.append(model.decoder.lm_head(states.flatten(0, 1)[group.places]).float())
        halfway.append(model.halfway.flatten(0, 1)[group.phrases].float())
        for sparse in model.decoder.sparse_layers.values():
            share = len(group.ids) / rows / len(model.config.moe_layers)
            balance = balance + share * balance_loss(sparse)
    return Outputs(torch.cat(logits), torch.cat(halfway), balance)


def measure(trainee: Trainee, recipe: Recipe, batch: Batch) -> Losses:
    """Losses and per-kind accuracy of a batch.

    An answer counts as right when every token is the most probable one given those before it,
    which is the same as greedy decoding producing exactly that answer.
    """
    model = trainee.nano
    zero = torch.zeros((), device=batch.pixels.device)
    visual = model.encode_images(normalized(batch.pixels))
    dense = dense_loss(trainee.heads(visual), batch.targets) if recipe.dense_weight else zero
    right = asked = torch.zeros(len(ALL_KINDS), device=visual.device)
    language = grounding = balance = zero
    if recipe.language:
        out = decode(model, batch, visual)
        balance = out.balance
        language = F.cross_entropy(out.logits, batch.labels)
        cells = torch.cat([group.cells for group in batch.groups])
        if recipe.grounding_weight and len(cells):
            guess = trainee.grounding(out.halfway)
            grounding = F.binary_cross_entropy_with_logits(guess, cells)
        wrong = torch.zeros(len(batch.kinds), device=visual.device)
        wrong = wrong.index_add(0, batch.owners, (out.logits.argmax(-1) != batch.labels).float())
        right = right.index_add(0, batch.kinds, (wrong == 0).float())
        asked = asked.index_add(0, batch.kinds, torch.ones_like(wrong))
    total = language + recipe.dense_weight * dense + recipe.balance_weight * balance
    total = total + recipe.grounding_weight * grounding
    return Losses(total, language, dense, grounding, balance, right, asked)


Objective = Callable[[Trainee, Recipe, Batch], Losses]
"""Loss function of a stage; ``measure`` for all but DPO."""


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Linear warm-up, then a cosine down to ``final`` of the peak; ``progress`` from 0 to 1."""
    if progress < recipe.warmup:
        return recipe.learning_rate * (progress / recipe.warmup + 1e-3)
    fall = (progress - recipe.warmup) / (1 - recipe.warmup)
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, fall))
    return recipe.learning_rate * (recipe.final + (1 - recipe.final) * cosine)


def make_optimizer(trainee: Trainee, recipe: Recipe) -> MuonAdamW:
    """Muon for the layers' matrices; AdamW for vectors, convolutions, embeddings and heads.

    Parameters that the recipe does not train are frozen here.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trainee.named_parameters():
        if not re.fullmatch(recipe.trained, name):
            parameter.requires_grad_(False)
            continue
        inner = parameter.ndim == 2 and re.search(r"layers|projector", name)
        (matrices if inner and "router" not in name else others).append(parameter)
    return MuonAdamW(matrices, others, recipe.learning_rate, recipe.weight_decay)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint so that a kill leaves the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of ``save_state``; nothing in it is executed."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: not a training checkpoint ({error})") from error
    return state


def train(
    config: NanoConfig,
    recipe: Recipe,
    tokenizer: NanoTokenizer,
    run: Run,
    start: Path | None = None,
    stop_after: int | None = None,
    dataset: Dataset[Batch] | None = None,
    objective: Objective = measure,
) -> Iterator[dict[str, Any]]:
    """Trains one stage, yielding a log record every ``log_every`` steps and at the end.

    The stage continues from ``out/recipe/state.pt`` when that exists, else it begins with the
    weights of the checkpoint ``start`` (a stage before it), else with random ones. Reproducible:
    the data of a step depends on seed, recipe and step only. ``stop_after`` leaves the stage as a
    kill right after that step's checkpoint would; the next call goes on. ``dataset`` and
    ``objective`` are the recipe's batches and ``measure`` unless a stage brings its own.
    """
    device = torch.device(run.device)
    torch.manual_seed(run.seed)
    trainee = Trainee(config).to(device)
    optimizer = make_optimizer(trainee, recipe)
    state_path = run.out / recipe.name / "state.pt"
    step, spent = 0, 0.0
    if state_path.exists():
        state = load_state(state_path)
        if state["config"] != dataclasses.asdict(config):
            raise CheckpointError(
                f"{state_path}: holds a model of other sizes: give its --size or another --out"
            )
        trainee.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        step, spent = state["step"], state["seconds"]
    elif start is not None:
        load_weights(trainee, load_state(start)["model"], config)
    began = time.monotonic() - spent
    progress = _progress(recipe, run, step, began)

    def checkpoint(done: bool) -> None:
        state = {
            "model": trainee.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": step,
            "seconds": time.monotonic() - began,
            "done": done,
            "config": dataclasses.asdict(config),
        }
        save_state(state_path, state)

    if dataset is None:
        dataset = StepDataset(recipe, tokenizer, config.visual_tokens, run.seed, recipe.steps)
    batches = iter(_loader(dataset, run, range(step, recipe.steps)))
    entered = saved = time.monotonic()
    window = _Window()
    tower = trainee.nano.vision
    set_window(tower, recipe.window)
    while progress < 1.0:
        batch = next(batches).to(device)
        rate = learning_rate(recipe, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=run.bfloat16):
            losses = objective(trainee, recipe, batch)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(trainee.parameters(), recipe.clip)
        optimizer.step()
        if recipe.window:
            keep_codes(tower)
        window.add(losses, norm)
        step += 1
        progress = _progress(recipe, run, step, began)
        if step % run.log_every == 0 or progress >= 1.0:
            record = window.record(recipe.name, step, rate, time.monotonic() - began)
            window = _Window()
            yield record
        minutes = (time.monotonic() - entered) / 60
        if stop_after == step or (run.pause_minutes is not None and minutes > run.pause_minutes):
            checkpoint(False)
            return
        if time.monotonic() - saved > run.save_seconds:
            checkpoint(False)
            saved = time.monotonic()
    if recipe.window:
        sharpen(tower, normalized(batch.pixels))
    checkpoint(True)


def load_weights(trainee: Trainee, weights: dict[str, Tensor], config: NanoConfig) -> None:
    """Loads a stage's weights; experts that it does not have become copies of its dense MLP."""
    if config.num_experts:
        weights = dict(weights)
        for name in trainee.state_dict():
            before, marker, after = name.partition(".experts.")
            if marker and name not in weights:
                weights[name] = weights[f"{before}.{after.partition('.')[2]}"]
    # Routers, and the heads of a stage before: they begin at random.
    known = trainee.state_dict()
    trainee.load_state_dict({name: weights.get(name, value) for name, value in known.items()})


def _progress(recipe: Recipe, run: Run, step: int, began: float) -> float:
    done = step / recipe.steps
    if run.budget_minutes is not None:
        done = max(done, (time.monotonic() - began) / (60 * run.budget_minutes))
    return done


def _loader(dataset: Dataset[Batch], run: Run, steps: range) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=run.workers,
        prefetch_factor=2 if run.workers else None,
    )


class _Window:
    """Sums over the steps since the last log record."""

    def __init__(self) -> None:
        self.steps = 0
        self.sums: Tensor | None = None
        self.counts: Tensor | None = None

    def add(self, losses: Losses, norm: Tensor) -> None:
        parts = (
            losses.total, losses.language, losses.dense, losses.grounding, losses.balance, norm,
        )  # fmt: skip
        sums = torch.stack([part.detach().float() for part in parts])
        counts = torch.stack((losses.right, losses.asked)).detach()
        self.steps += 1
        self.sums = sums if self.sums is None else self.sums + sums
        self.counts = counts if self.counts is None else self.counts + counts

    def record(self, stage: str, step: int, rate: float, seconds: float) -> dict[str, Any]:
        assert self.sums is not None and self.counts is not None
        names = ("loss", "language", "dense", "grounding", "balance", "gradient_norm")
        means = [round(value, 6) for value in (self.sums / self.steps).tolist()]
        right, asked = self.counts.tolist()
        kinds = {
            kind: round(good / all_, 4)
            for kind, good, all_ in zip(ALL_KINDS, right, asked, strict=True)
            if all_
        }
        return {
            "stage": stage,
            "step": step,
            "seconds": round(seconds, 1),
            "learning_rate": round(rate, 8),
            **dict(zip(names, means, strict=True)),
            "accuracy": round(sum(right) / sum(asked), 4) if sum(asked) else None,
            "kinds": kinds,
        }


def append_log(path: Path, record: dict[str, Any]) -> None:
    """Adds one line of JSON to a log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
