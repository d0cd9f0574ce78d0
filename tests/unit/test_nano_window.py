"""The tower's window attention, and the optimizer that trains it."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("torch")

import torch

from mobilevlm.nano.training.model import NanoModel
from mobilevlm.nano.training.optimizer import orthogonal
from mobilevlm.nano.training.packing import normalized
from mobilevlm.nano.training.recipes import SIZES
from mobilevlm.nano.training.window import CODE_SIZE, attentions, keep_codes, set_window, sharpen


@pytest.fixture
def model() -> NanoModel:
    """Two layers of eight heads whose weights have moved away from where they began."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        SIZES["test"], vision_hidden_size=128, vision_heads=8, vision_layers=2
    )
    model = NanoModel(config)
    with torch.no_grad():
        for layer in model.vision.layers:
            layer.mlp.fc2.weight.add_(0.05 * torch.randn_like(layer.mlp.fc2.weight))
            layer.attn.v_proj.bias.add_(0.1 * torch.randn_like(layer.attn.v_proj.bias))
    return model


def pictures() -> torch.Tensor:
    smooth = torch.rand(2, 6, 6, 3) * 255
    pixels = smooth.repeat_interleave(32, dim=1).repeat_interleave(32, dim=2)
    return normalized((pixels + 20 * torch.rand_like(pixels)).clamp(0, 255).to(torch.uint8))


@torch.no_grad()
def test_sharpened_attention_equals_the_window(model: NanoModel) -> None:
    keep_codes(model.vision)
    pixels = pictures()
    sharpen(model.vision, pixels)
    computed = model.vision(pixels)
    set_window(model.vision, True)
    window = model.vision(pixels)
    assert (computed - window).norm() < 0.02 * window.norm()


@torch.no_grad()
def test_writing_to_the_codes_would_break_it(model: NanoModel) -> None:
    """Without keep_codes the same comparison fails."""
    pixels = pictures()
    for layer in model.vision.layers:
        layer.mlp.fc2.weight[:CODE_SIZE] += torch.randn_like(layer.mlp.fc2.weight[:CODE_SIZE])
    sharpen(model.vision, pixels)
    computed = model.vision(pixels)
    set_window(model.vision, True)
    window = model.vision(pixels)
    assert (computed - window).norm() > 0.05 * window.norm()


@torch.no_grad()
def test_each_head_takes_the_value_of_one_neighbour(model: NanoModel) -> None:
    attention = attentions(model.vision)[0]
    attention.window = True
    hidden = torch.randn(1, 577, 128)
    attention.out_proj.weight.copy_(torch.eye(128))
    attention.out_proj.bias.zero_()
    out = attention(hidden)[0, 1:].view(24, 24, 8, 16)
    values = attention.v_proj(hidden)[0, 1:].view(24, 24, 8, 16)
    torch.testing.assert_close(out[5, 7, 0], values[4, 6, 0])  # up and left
    torch.testing.assert_close(out[5, 7, 4], values[5, 8, 4])  # right
    torch.testing.assert_close(out[0, 0, 0], values[0, 0, 0])  # borders repeat
    torch.testing.assert_close(out[23, 7, 6], values[23, 7, 6])


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_orthogonal_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_orthogonal_keeps_the_singular_vectors_and_their_signs(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = left.T @ orthogonal(matrix) @ right.T
    assert values.diagonal().min() > 0.5
    assert (values - values.diagonal().diag()).abs().max() < 1e-5  # measured: 1.6e-6
    torch.testing.assert_close(orthogonal(1e3 * matrix), orthogonal(matrix))
