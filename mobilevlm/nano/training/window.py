"""Tower attention that begins as a 3 x 3 window, and can be trained as one at a third of the cost.

A vision transformer that starts from nothing needs very many images to find out that neighbours
matter. Here every head of a tower layer starts by looking at one neighbour of each patch, so that
the tower starts as a convolutional network does (structured initialization, Zheng et al. 2024):
position codes stand in the first ``CODE_SIZE`` channels, and queries are the codes shifted by the
head's offset. While nothing writes to those channels the attention is known beforehand, so training
may gather the neighbour's values and compute no scores; ``sharpen`` then sets queries and keys such
that the computed attention does the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.reference.clip import ClipAttention, ClipLayer, ClipTower

PERIODS = (5.2, 8.5, 29.0)
"""Wave lengths of the codes in patches: of three, those that tell 26 places apart best."""
WAVES = 4 * len(PERIODS)
CODE_SIZE = WAVES + 2
"""Channels of a code: sine and cosine of row and column, and two constants."""
AMPLITUDE = 6.0
GAP = 0.93
"""By how much the code of a neighbour agrees less with a code than itself, of ``WAVES / 2``."""
MARGIN = 12.0
"""Least difference of attention scores between the wanted patch and the next, for most patches."""
NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
WINDOW_TRAINED = (
    r"(?!nano\.vision\.(layers\.\d+\.(norm1|attn\.[qk]_proj)\.|pre_norm\.|class_|position_)).*"
)
"""Names of the parameters that may be trained while the window holds."""


class WindowAttention(ClipAttention):
    """CLIP's attention; with ``window`` set each head takes the value of its neighbour."""

    def __init__(self, spec: TransformerEncoder) -> None:
        super().__init__(spec)
        self.window = False
        self.grid = spec.grid
        self.offsets = [NEIGHBOURS[head % 8] for head in range(spec.num_attention_heads)]
        self.register_buffer("source", self._source(), persistent=False)

    def _source(self) -> Tensor:
        """For each (patch, head) the (patch, head) whose value it takes; borders repeat."""
        along = torch.arange(self.grid)
        sources = []
        for head, (down, right) in enumerate(self.offsets):
            rows, columns = ((along + step).clamp(0, self.grid - 1) for step in (down, right))
            patch = rows[:, None] * self.grid + columns[None, :]
            sources.append(patch.flatten() * self.num_heads + head)
        return torch.stack(sources, dim=1).flatten()

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.window:
            return super().forward(hidden)
        value = self.v_proj(hidden)
        parts = value[:, 1:].unflatten(2, (self.num_heads, self.head_dim)).flatten(1, 2)
        mixed = parts.index_select(1, self.source).unflatten(1, (-1, self.num_heads)).flatten(2)
        out: Tensor = self.out_proj(torch.cat((value[:, :1], mixed), dim=1))
        return out

    def aim(self, scale: float) -> None:
        """Sets queries and keys so that a score is ``scale`` x (agreement of codes - the most).

        The agreement is at its most for the head's neighbour, so that the score there is 0
        whatever the size of the key's code, and negative elsewhere.
        """
        query, key = (torch.zeros_like(self.q_proj.weight) for _ in range(2))
        gain = math.sqrt(scale * math.sqrt(self.head_dim)) / AMPLITUDE
        for head, offset in enumerate(self.offsets):
            first = head * self.head_dim
            for axis in range(2):
                for index, period in enumerate(PERIODS):
                    at = 2 * (axis * len(PERIODS) + index)
                    angle = 2 * math.pi * offset[axis] / period
                    turn = torch.tensor(
                        ((math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle)))
                    )
                    query[first + at : first + at + 2, at : at + 2] = turn
                    key[first + at : first + at + 2, at : at + 2] = torch.eye(2)
            query[first + WAVES, WAVES : WAVES + 2] = torch.tensor((-0.25, 0.25)) * WAVES
            key[first + WAVES, WAVES : WAVES + 2] = torch.tensor((0.5, -0.5))
        with torch.no_grad():
            self.q_proj.weight.copy_(gain * query)
            self.k_proj.weight.copy_(gain * key)
            self.q_proj.bias.zero_()
            self.k_proj.bias.zero_()


def codes(grid: int) -> Tensor:
    """Codes of the class token and the patches, ``(1 + grid * grid, CODE_SIZE)``.

    The class token's has no waves and a larger constant, so that no patch looks at it.
    """
    angles = torch.arange(grid)[:, None] * (2 * torch.pi / torch.tensor(PERIODS))
    waves = torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1)
    code = torch.zeros(1 + grid * grid, CODE_SIZE)
    code[1:, : WAVES // 2] = waves.repeat_interleave(grid, dim=0)
    code[1:, WAVES // 2 : WAVES] = waves.repeat(grid, 1)
    code[:, WAVES], code[:, WAVES + 1] = 1.0, -1.0
    code[0] *= 2
    return AMPLITUDE * code


def install(tower: ClipTower, spec: TransformerEncoder) -> None:
    """Gives a tower window attention and position codes."""
    for layer in layers(tower):
        layer.attn = WindowAttention(spec)
    with torch.no_grad():
        tower.position_embedding.weight.zero_()
        tower.position_embedding.weight[:, :CODE_SIZE] = codes(spec.grid)


def layers(tower: ClipTower) -> list[ClipLayer]:
    """The layers, first to last."""
    return [layer for layer in tower.layers if isinstance(layer, ClipLayer)]


def attentions(tower: ClipTower) -> list[WindowAttention]:
    """The attention of each layer."""
    found = [layer.attn for layer in layers(tower)]
    return [attention for attention in found if isinstance(attention, WindowAttention)]


def set_window(tower: ClipTower, window: bool) -> None:
    """Set whether the layers gather neighbours instead of computing attention."""
    for attention in attentions(tower):
        attention.window = window


@torch.no_grad()
def keep_codes(tower: ClipTower) -> None:
    """Takes out of every weight what would write to the codes, also by way of the norms' mean."""
    writers: list[nn.Linear | nn.Conv2d] = [tower.patch_embedding]
    for layer in layers(tower):
        writers += [layer.attn.out_proj, layer.mlp.fc2]
    for writer in writers:
        for parameter in (writer.weight, writer.bias):
            if parameter is not None:
                parameter[:CODE_SIZE] = 0
                parameter[CODE_SIZE:] -= parameter[CODE_SIZE:].mean(dim=0, keepdim=True)


@torch.no_grad()
def sharpen(tower: ClipTower, pixels: Tensor) -> None:
    """Aims each layer so that computed attention equals the window for these images.

    ``pixels`` is normalised, (images, 3, edge, edge).
    """
    hidden = tower.embed(pixels)
    for layer, attention in zip(layers(tower), attentions(tower), strict=True):
        normed = layer.norm1(hidden)[:, 1:]
        sizes = (normed[..., WAVES] - normed[..., WAVES + 1]).flatten() / (2 * AMPLITUDE)
        low = sizes.kthvalue(max(1, len(sizes) // 50)).values.item()
        attention.aim(MARGIN / (GAP * low * low))
        hidden = layer(hidden)
