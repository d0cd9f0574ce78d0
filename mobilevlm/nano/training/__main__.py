"""Command line of the training: ``python -m mobilevlm.nano.training train|export|evaluate``."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress

from mobilevlm.console.tables import show
from mobilevlm.errors import MobileVLMError
from mobilevlm.nano.evaluate import is_right, result_of, table
from mobilevlm.nano.scenes import TRAINING_SEEDS
from mobilevlm.nano.suite import Example, evaluation_set, images_of, noise
from mobilevlm.nano.training.answering import answer_questions
from mobilevlm.nano.training.model import NanoConfig, NanoModel
from mobilevlm.nano.training.preference import (
    PreferenceDataset,
    PreferenceObjective,
    collect,
    read_preferences,
    write_preferences,
)
from mobilevlm.nano.training.recipes import RECIPES, SIZES, Recipe
from mobilevlm.nano.training.saving import load_checkpoint, save_checkpoint
from mobilevlm.nano.training.tokenizer import NanoTokenizer, load_tokenizer, train_tokenizer
from mobilevlm.nano.training.train import Run, Trainee, append_log, load_state, train

BEFORE = {"pretrain": "vision", "sft": "pretrain", "dpo": "sft", "moe": "sft"}
"""The stage that each stage starts from."""

CONSOLE = Console(stderr=True, highlight=False)


@click.group(help=__doc__)
def main() -> None:
    """Trains, saves and scores the built-in models."""


@main.command("train")
@click.argument("stage", type=click.Choice(list(RECIPES)))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--size", type=click.Choice(list(SIZES)), default="nano", show_default=True)
@click.option("--steps", type=int, help="Optimizer steps; default: the recipe's.")
@click.option("--budget-minutes", type=float, help="End by the clock instead.")
@click.option("--pause-minutes", type=float, help="Leave after this long; call again to go on.")
@click.option("--images", type=int, help="Images per step; default: the recipe's.")
@click.option("--learning-rate", type=float, help="Peak; default: the recipe's.")
@click.option("--dense-weight", type=float, help="Weight of the dense targets.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--workers", type=int, default=1, show_default=True, help="Rendering processes.")
@click.option("--threads", type=int, default=2, show_default=True, help="CPU threads of torch.")
@click.option("--bfloat16/--float32", default=True, help="Precision of matrix products.")
@click.option("--start", type=click.Path(path_type=Path), help="state.pt to start from.")
@click.option("--seed", type=int, default=0, show_default=True)
def train_command(
    stage: str,
    out: Path,
    size: str,
    steps: int | None,
    budget_minutes: float | None,
    pause_minutes: float | None,
    images: int | None,
    learning_rate: float | None,
    dense_weight: float | None,
    device: str,
    workers: int,
    threads: int,
    bfloat16: bool,
    start: Path | None,
    seed: int,
) -> None:
    """Trains one STAGE; a run that was killed goes on where it was."""
    torch.set_num_threads(threads)
    recipe = resized(RECIPES[stage], images)
    recipe = dataclasses.replace(
        recipe,
        steps=steps or (10**6 if budget_minutes else recipe.steps),
        learning_rate=learning_rate or recipe.learning_rate,
        dense_weight=recipe.dense_weight if dense_weight is None else dense_weight,
    )
    config = SIZES[size]
    if stage == "moe":
        layers = tuple(range(0, config.num_hidden_layers, 2))
        config = dataclasses.replace(config, num_experts=4, moe_layers=layers)
    run = Run(out, seed, device, workers, bfloat16, budget_minutes, pause_minutes)
    before = out / BEFORE.get(stage, "") / "state.pt"
    if start is None and stage in BEFORE and before.exists():
        start = before
    tokenizer = tokenizer_of(out, config)
    own = preference_stage(config, recipe, tokenizer, run, start) if recipe.beta else {}
    for record in train(config, recipe, tokenizer, run, start, **own):
        append_log(out / stage / "log.jsonl", record)
        kinds = " ".join(f"{kind} {share:.2f}" for kind, share in record["kinds"].items())
        CONSOLE.print(
            f"{stage} {record['step']} {record['seconds']:.0f}s loss {record['loss']:.4f} "
            f"language {record['language']:.4f} dense {record['dense']:.4f} "
            f"grounding {record['grounding']:.4f} "
            f"accuracy {record['accuracy']} {kinds}",
            soft_wrap=True,
        )


@main.command("export")
@click.argument("state", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
def export_command(state: Path, folder: Path) -> None:
    """Saves the weights of a stage's STATE as a checkpoint FOLDER in the official layout."""
    tokenizer = load_tokenizer(state.parent.parent / "tokenizer.model")
    save_checkpoint(model_of(state), tokenizer, folder, folder.name)
    size = (folder / "model.safetensors").stat().st_size
    CONSOLE.print(f"{folder}: {size / 1e6:.1f} MB")


@main.command("evaluate")
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--questions", default=2000, show_default=True)
@click.option("--batch", default=32, show_default=True, help="Questions answered together.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--blind/--no-blind", default=True, help="Ask again with noise for images.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the scores here.")
@click.option("--wrong", type=click.Path(path_type=Path), help="Write the wrong answers here.")
def evaluate_command(
    folder: Path,
    questions: int,
    batch: int,
    device: str,
    threads: int,
    blind: bool,
    json_file: Path | None,
    wrong: Path | None,
) -> None:
    """Scores a checkpoint FOLDER on the held-out set with the float32 reference."""
    torch.set_num_threads(threads)
    model, tokenizer = load_checkpoint(folder)
    model.to(device)
    # Answers of one length end together.
    examples = sorted(
        evaluation_set(questions), key=lambda example: (len(example.seeds), example.question.style)
    )
    mistakes: list[dict[str, object]] = []

    def outcomes(view: object, label: str) -> list[tuple[str, bool]]:
        """Kind and rightness of every example, with ``view`` of its scenes for images."""
        found = []
        with Progress(console=CONSOLE) as progress:
            task = progress.add_task(label, total=len(examples))
            for first in range(0, len(examples), batch):
                part = examples[first : first + batch]
                asked = [(example.question.text, view(example)) for example in part]  # type: ignore[operator]
                for example, answer in zip(
                    part, answer_questions(model, tokenizer, asked), strict=True
                ):
                    right = is_right(example.question, answer)
                    found.append((example.question.kind, right))
                    if not right and view is images_of:
                        mistakes.append(_mistake(example, answer))
                progress.advance(task, len(part))
        return found

    seen = outcomes(images_of, "with images")
    unseen = outcomes(noise, "with noise") if blind else None
    result = result_of(seen, unseen)
    show(table(result, title=f"scenes: {folder.name}"), sys.stderr)
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    if wrong is not None:
        wrong.write_text("".join(json.dumps(mistake) + "\n" for mistake in mistakes))


def _mistake(example: Example, answer: str) -> dict[str, object]:
    return {
        "kind": example.question.kind,
        "seeds": example.seeds,
        "question": example.question.text,
        "truth": example.question.answer,
        "answer": answer,
    }


def model_of(state: Path) -> NanoModel:
    """The model of a training checkpoint."""
    saved = load_state(state)
    values = saved["config"] | {"moe_layers": tuple(saved["config"]["moe_layers"])}
    trainee = Trainee(NanoConfig(**values))
    trainee.load_state_dict(saved["model"])
    return trainee.nano


def preference_stage(
    config: NanoConfig, recipe: Recipe, tokenizer: NanoTokenizer, run: Run, start: Path | None
) -> dict[str, Any]:
    """Batches and objective of DPO; the mistakes are collected once and kept beside the state."""
    if start is None:
        raise click.UsageError("dpo starts from a trained model: give --start or run sft first")
    reference = model_of(start).to(run.device)
    path = run.out / recipe.name / "preferences.jsonl"
    if not path.exists():
        wanted = recipe.steps * recipe.images if run.budget_minutes is None else 4000
        # Scenes that no stage's seeds reach, so the mistakes are not about memorised images.
        write_preferences(path, list(collect(reference, tokenizer, TRAINING_SEEDS // 2, wanted)))
    preferences = read_preferences(path)
    dataset = PreferenceDataset(preferences, recipe, tokenizer, config.visual_tokens)
    return {"dataset": dataset, "objective": PreferenceObjective(reference)}


def resized(recipe: Recipe, images: int | None) -> Recipe:
    """The recipe with another number of images per step, its other rows in proportion."""
    if images is None:
        return recipe
    scale = images / recipe.images
    return dataclasses.replace(
        recipe,
        images=images,
        pair_rows=math.ceil(recipe.pair_rows * scale),
        text_rows=math.ceil(recipe.text_rows * scale),
    )


def tokenizer_of(out: Path, config: NanoConfig) -> NanoTokenizer:
    """The run's tokenizer, trained at its first stage."""
    path = out / "tokenizer.model"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(train_tokenizer(config.vocab_size).model)
    return load_tokenizer(path)


if __name__ == "__main__":
    try:
        main()
    except MobileVLMError as error:
        CONSOLE.print(f"error: {error}", style="red", markup=False)
        sys.exit(2)
