"""Training of nano: reproducible, resumable, saved in the official layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from mobilevlm.errors import CheckpointError
from mobilevlm.nano.drawing import render
from mobilevlm.nano.questions import questions
from mobilevlm.nano.scenes import sample_scene
from mobilevlm.nano.training.answering import answer_questions
from mobilevlm.nano.training.packed_attention import attention_mask, packing
from mobilevlm.nano.training.packing import make_batch, normalized
from mobilevlm.nano.training.preference import (
    Preference,
    PreferenceDataset,
    PreferenceObjective,
    read_preferences,
    write_preferences,
)
from mobilevlm.nano.training.recipes import RECIPES, SIZES, Recipe
from mobilevlm.nano.training.saving import load_checkpoint, save_checkpoint
from mobilevlm.nano.training.tokenizer import NanoTokenizer, train_tokenizer
from mobilevlm.nano.training.train import Run, Trainee, load_state, measure, train

CONFIG = SIZES["test"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are fastest on one thread, and do not wait for a busy core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> NanoTokenizer:
    return train_tokenizer(CONFIG.vocab_size, scenes=300)


def small(name: str, steps: int) -> Recipe:
    rows = 0 if name == "vision" else 1
    length = 0 if name == "vision" else 384
    return dataclasses.replace(
        RECIPES[name], steps=steps, images=4, pair_rows=rows, text_rows=rows, length=length
    )


def losses(
    folder: Path, recipe: Recipe, tokenizer: NanoTokenizer, **options: Any
) -> list[dict[str, Any]]:
    run = Run(folder, seed=3, log_every=1)
    records = list(train(CONFIG, recipe, tokenizer, run, **options))
    return [{key: value for key, value in r.items() if key != "seconds"} for r in records]


def test_the_same_seed_gives_the_same_losses(tmp_path: Path, tokenizer: NanoTokenizer) -> None:
    recipe = small("sft", 20)
    first = losses(tmp_path / "one", recipe, tokenizer)
    assert first == losses(tmp_path / "two", recipe, tokenizer)
    assert len(first) == 20 and first[-1]["loss"] < first[0]["loss"]


def test_resuming_after_a_kill_equals_never_stopping(
    tmp_path: Path, tokenizer: NanoTokenizer
) -> None:
    recipe = small("pretrain", 8)
    whole = losses(tmp_path / "whole", recipe, tokenizer)
    before = losses(tmp_path / "killed", recipe, tokenizer, stop_after=5)
    (tmp_path / "killed" / recipe.name / "state.tmp").write_bytes(b"half a checkpoint")
    after = losses(tmp_path / "killed", recipe, tokenizer)
    assert before + after == whole
    one, other = (
        load_state(tmp_path / name / recipe.name / "state.pt") for name in ("whole", "killed")
    )
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])


def test_a_later_stage_starts_from_an_earlier_one(tmp_path: Path, tokenizer: NanoTokenizer) -> None:
    losses(tmp_path, small("vision", 2), tokenizer)
    start = tmp_path / "vision" / "state.pt"
    records = losses(tmp_path, small("sft", 1), tokenizer, start=start)
    scratch = losses(tmp_path / "scratch", small("sft", 1), tokenizer)
    assert records[0]["loss"] != scratch[0]["loss"]


def test_packed_questions_see_what_inference_sees(tokenizer: NanoTokenizer) -> None:
    """A question packed among others gives the same losses as the same question alone."""
    torch.manual_seed(0)
    model = Trainee(CONFIG).nano
    recipe = small("sft", 1)
    batch = make_batch(recipe, tokenizer, CONFIG.visual_tokens, 0, 0)
    visual = model.encode_images(normalized(batch.pixels))
    assert len(batch.groups) >= 3  # text only, one picture, two pictures
    for group in batch.groups:
        mask = packing(group.blocks, group.prefix)
        packed = model.hidden_states(group.ids, group.slots, group.positions, mask, visual)
        for question in (1, 2, int(group.blocks[0].max())):
            alone = (group.blocks[0] == 0) | (group.blocks[0] == question)
            ids, slots = group.ids[:1, alone], group.slots[:1, alone]
            positions = torch.arange(ids.shape[1])[None]
            assert torch.equal(positions, group.positions[:1, alone])
            causal = attention_mask(torch.zeros_like(ids))
            single = model.hidden_states(ids, slots, positions, causal, visual)
            torch.testing.assert_close(packed[:1, alone], single, rtol=1e-4, atol=1e-4)


def test_packed_attention_is_what_the_mask_says(tokenizer: NanoTokenizer) -> None:
    """Its backward pass, too: what a GPU computes from the mask is what a processor computes."""
    torch.manual_seed(0)
    batch = make_batch(small("sft", 1), tokenizer, CONFIG.visual_tokens, 0, 0)
    gradients: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = []
    for masks in (packing, lambda blocks, _: attention_mask(blocks)):
        model = Trainee(CONFIG).nano
        model.load_state_dict(gradients[0][0] if gradients else model.state_dict())
        loss = torch.zeros(())
        for group in batch.groups:
            visual = model.encode_images(normalized(batch.pixels))
            mask = masks(group.blocks, group.prefix)
            states = model.hidden_states(group.ids, group.slots, group.positions, mask, visual)
            loss = loss + states.flatten(0, 1)[group.places].square().sum().sqrt()
        loss.backward()  # type: ignore[no-untyped-call]
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append((model.state_dict(), found))
    (_, packed), (_, masked) = gradients
    assert packed.keys() == masked.keys() and "decoder.layers.0.attn.k_proj.weight" in packed
    for name, gradient in packed.items():
        scale = masked[name].abs().max().item()
        torch.testing.assert_close(gradient, masked[name], rtol=1e-3, atol=1e-4 * scale + 1e-6)


def test_experts_start_as_copies_and_change_nothing(
    tmp_path: Path, tokenizer: NanoTokenizer
) -> None:
    dense = small("sft", 2)
    losses(tmp_path, dense, tokenizer)
    sparse = dataclasses.replace(CONFIG, num_experts=4, moe_layers=(0,))
    start = tmp_path / "sft" / "state.pt"
    recipe = small("moe", 2)
    records = list(train(sparse, recipe, tokenizer, Run(tmp_path, log_every=1), start))
    trainee = Trainee(CONFIG)
    trainee.load_state_dict(load_state(start)["model"])
    batch = make_batch(recipe, tokenizer, CONFIG.visual_tokens, 0, 0)
    expected = measure(trainee, recipe, batch).language.item()
    assert records[0]["language"] == pytest.approx(expected, abs=1e-4)
    assert records[0]["balance"] > 0.9  # 1 when the load is even
    before, after = (load_state(tmp_path / name / "state.pt")["model"] for name in ("sft", "moe"))
    moved = {name for name in before if name in after and not before[name].equal(after[name])}
    assert not moved  # MoE-tuning trains experts and routers only


def test_preferences_move_the_model_towards_the_true_answers(
    tmp_path: Path, tokenizer: NanoTokenizer
) -> None:
    recipe = dataclasses.replace(
        RECIPES["dpo"], steps=12, images=4, length=320, learning_rate=1e-3, warmup=0.0
    )
    scenes = [sample_scene(seed) for seed in range(4)]
    asked = [questions(scene, 1)[0] for scene in scenes]
    wrong = [
        Preference(scene.seed, q.kind, q.text, q.answer, "nothing at all")
        for scene, q in zip(scenes, asked, strict=True)
    ]
    write_preferences(tmp_path / "preferences.jsonl", wrong)
    assert read_preferences(tmp_path / "preferences.jsonl") == wrong
    losses(tmp_path, small("vision", 1), tokenizer)
    start = tmp_path / "vision" / "state.pt"
    trainee = Trainee(CONFIG)
    trainee.load_state_dict(load_state(start)["model"])
    records = losses(
        tmp_path,
        recipe,
        tokenizer,
        start=start,
        dataset=PreferenceDataset(wrong, recipe, tokenizer, CONFIG.visual_tokens),
        objective=PreferenceObjective(trainee.nano),
    )
    # Before the first step policy and reference agree: the preference loss is log 2.
    first = records[0]["loss"] - records[0]["language"]
    last = records[-1]["loss"] - records[-1]["language"]
    assert first == pytest.approx(0.6931, abs=1e-3) and last < 0.6


def test_saved_weights_answer_the_same(tmp_path: Path, tokenizer: NanoTokenizer) -> None:
    torch.manual_seed(1)
    model = Trainee(CONFIG).nano
    save_checkpoint(model, tokenizer, tmp_path / "nano", "nano")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        save_checkpoint(model, tokenizer, tmp_path / "mine", "nano")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "nano"]
    loaded, _ = load_checkpoint(tmp_path / "nano")
    half = {key: value.half().float() for key, value in model.state_dict().items()}
    model.load_state_dict(half)
    scene = sample_scene(5)
    asked = [(q.text, [render(scene)]) for q in questions(scene, 3)]
    assert answer_questions(loaded, tokenizer, asked, 4) == answer_questions(
        model, tokenizer, asked, 4
    )


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        load_state(tmp_path / "state.pt")


def test_going_on_with_another_size_is_refused(tmp_path: Path, tokenizer: NanoTokenizer) -> None:
    losses(tmp_path, small("vision", 1), tokenizer)
    other = dataclasses.replace(CONFIG, vision_layers=2)
    with pytest.raises(CheckpointError, match="other sizes"):
        list(train(other, small("vision", 1), tokenizer, Run(tmp_path)))
