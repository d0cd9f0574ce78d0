"""Direct preference optimisation (Rafailov et al. 2023) on the model's own mistakes.

The model answers training questions; each wrong answer is set against the true one, in two blocks
of one packed row. The reference is the model as it was when the stage began.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from mobilevlm.input_spec import IMAGE_TOKEN_ID
from mobilevlm.nano.drawing import render
from mobilevlm.nano.evaluate import is_right
from mobilevlm.nano.questions import questions
from mobilevlm.nano.scenes import TRAINING_SEEDS, sample_scene
from mobilevlm.nano.training.answering import answer_questions
from mobilevlm.nano.training.model import NanoModel
from mobilevlm.nano.training.packing import Batch, add_block, collate, normalized, start_row
from mobilevlm.nano.training.recipes import ALL_KINDS, Recipe
from mobilevlm.nano.training.tokenizer import NanoTokenizer, prompt_text
from mobilevlm.nano.training.train import Losses, Trainee, decode


@dataclass(frozen=True)
class Preference:
    """A question about a training scene, the true answer and a wrong one the model gave."""

    seed: int
    kind: str
    text: str
    chosen: str
    rejected: str


def collect(
    model: NanoModel, tokenizer: NanoTokenizer, first_seed: int, wanted: int, batch: int = 64
) -> Iterator[Preference]:
    """Yields ``wanted`` mistakes of a model on scenes from ``first_seed`` on.

    At most 50 batches per wanted hundred are asked, so a model that errs rarely yields fewer.
    """
    found = 0
    for index in range(max(50, wanted // 2)):
        seeds = range(first_seed + index * batch // 8, first_seed + (index + 1) * batch // 8)
        scenes = [sample_scene(seed % TRAINING_SEEDS) for seed in seeds]
        asked = [(scene, question) for scene in scenes for question in questions(scene, 8)]
        images = {scene.seed: render(scene) for scene in scenes}
        prompts = [(question.text, [images[scene.seed]]) for scene, question in asked]
        answers = answer_questions(model, tokenizer, prompts)
        for (scene, question), answer in zip(asked, answers, strict=True):
            if answer and not is_right(question, answer):
                yield Preference(scene.seed, question.kind, question.text, question.answer, answer)
                found += 1
                if found == wanted:
                    return


def write_preferences(path: Path, preferences: Sequence[Preference]) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(preference)) + "\n" for preference in preferences))


def read_preferences(path: Path) -> list[Preference]:
    """Read a file of ``write_preferences``."""
    return [Preference(**json.loads(line)) for line in path.read_text().splitlines()]


class PreferenceDataset(Dataset[Batch]):
    """Batches of preferences, round and round; question 2i is chosen, 2i + 1 rejected."""

    def __init__(
        self,
        preferences: Sequence[Preference],
        recipe: Recipe,
        tokenizer: NanoTokenizer,
        visual_tokens: int,
    ) -> None:
        self.preferences, self.recipe = preferences, recipe
        self.tokenizer, self.visual_tokens = tokenizer, visual_tokens

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> Batch:
        first = step * self.recipe.images
        part = [
            self.preferences[(first + index) % len(self.preferences)]
            for index in range(self.recipe.images)
        ]
        rows = []
        for index, preference in enumerate(part):
            prompt = self.tokenizer.prompt_ids(prompt_text(preference.text, 1))
            shared = prompt.index(IMAGE_TOKEN_ID) + 1
            row = start_row(prompt[:shared], [index], self.visual_tokens)
            for answer in (preference.chosen, preference.rejected):
                ids = self.tokenizer.answer_ids(answer)
                kind = ALL_KINDS.index(preference.kind)
                if not add_block(row, prompt[shared:], ids, kind, self.recipe.length):
                    raise ValueError(f"{self.recipe.name}: rows of {self.recipe.length} are short")
            rows.append(row)
        scenes = [sample_scene(preference.seed) for preference in part]
        return collate(rows, scenes, with_targets=False)


class PreferenceObjective:
    """DPO's loss plus the ordinary loss of the chosen answers, which keeps them likely."""

    def __init__(self, reference: NanoModel) -> None:
        self.reference = reference.eval()

    def __call__(self, trainee: Trainee, recipe: Recipe, batch: Batch) -> Losses:
        """Counts a preference as right when the true answer is the likelier one."""
        with torch.no_grad():
            before = answer_likelihoods(self.reference, batch)
        now = answer_likelihoods(trainee.nano, batch)
        gain = (now - before).view(-1, 2)
        preference = -F.logsigmoid(recipe.beta * (gain[:, 0] - gain[:, 1])).mean()
        lengths = torch.zeros_like(now).index_add(
            0, batch.owners, torch.ones_like(batch.owners, dtype=now.dtype)
        )
        language = -(now / lengths).view(-1, 2)[:, 0].mean()
        zero = torch.zeros((), device=now.device)
        pairs = now.detach().view(-1, 2)
        kinds = batch.kinds.view(-1, 2)[:, 0]
        tally = torch.zeros(len(ALL_KINDS), device=now.device)
        return Losses(
            total=preference + language,
            language=language,
            dense=zero,
            grounding=zero,
            balance=zero,
            right=tally.index_add(0, kinds, (pairs[:, 0] > pairs[:, 1]).float()),
            asked=tally.index_add(0, kinds, torch.ones_like(pairs[:, 0])),
        )


def answer_likelihoods(model: NanoModel, batch: Batch) -> Tensor:
    """Log probability of each answer of a batch: (questions)."""
    visual = model.encode_images(normalized(batch.pixels))
    logs = decode(model, batch, visual).logits.log_softmax(dim=-1)
    tokens = logs.gather(1, batch.labels[:, None])[:, 0]
    return torch.zeros(len(batch.kinds), device=tokens.device).index_add(0, batch.owners, tokens)
