"""Images out: the head that chooses codes, the embedding of codes, and the decoder of a grid of
codes (VQGAN, Esser et al. 2021), in float32 torch."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.output_spec import CodeDecoder, ImageOutput


class GeluMLP(nn.Module):
    """Linears with exact GELU between, ``(…, sizes[0])`` to ``(…, sizes[-1])``."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.mlp = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))

    def forward(self, hidden: Tensor) -> Tensor:
        for index, linear in enumerate(self.mlp):
            hidden = linear(F.gelu(hidden) if index else hidden)
        return hidden


class CodeHead(GeluMLP):
    """States after the decoder's last norm to logits of codes ``(…, num_codes)``."""

    def __init__(self, spec: ImageOutput, hidden_size: int) -> None:
        super().__init__([hidden_size, spec.head_size, spec.num_codes])


class CodeEmbedding(GeluMLP):
    """Codes ``(…,)`` to rows for the decoder ``(…, hidden_size)``."""

    def __init__(self, spec: ImageOutput, hidden_size: int) -> None:
        super().__init__([spec.code_size, *[hidden_size] * spec.embed_depth])
        self.embed = nn.Embedding(spec.num_codes, spec.code_size)

    def forward(self, codes: Tensor) -> Tensor:
        return super().forward(self.embed(codes))


class ImageDecoder(nn.Module):
    """Codes ``(batch, grid²)``, row by row, to values of pixels ``(batch, edge, edge, 3)``, about
    -1 to 1."""

    def __init__(self, output: ImageOutput) -> None:
        super().__init__()
        spec = output.decoder
        self.grid, self.top = output.grid, len(spec.widths) - 1
        self.codebook = nn.Embedding(output.num_codes, output.code_size)
        self.post_quant = nn.Conv2d(output.code_size, spec.latent_size, 1)
        self.conv_in = nn.Conv2d(spec.latent_size, spec.widths[0], 3, padding=1)
        self.mid = Middle(spec)
        self.levels = nn.ModuleList(Level(spec, level) for level in range(len(spec.widths)))
        self.norm_out = nn.GroupNorm(spec.groups, spec.widths[-1], spec.norm_eps)
        self.conv_out = nn.Conv2d(spec.widths[-1], 3, 3, padding=1)

    def vectors(self, codes: Tensor) -> Tensor:
        """Return the normalised vectors of codes ``(batch, code_size, grid, grid)``."""
        rows = F.normalize(self.codebook(codes), dim=-1).transpose(1, 2)
        return rows.reshape(*rows.shape[:2], self.grid, self.grid)

    def forward(self, codes: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(self.post_quant(self.vectors(codes))))
        for level in self.levels:
            hidden = level(hidden)
        out: Tensor = self.conv_out(F.silu(self.norm_out(hidden)))
        return out.permute(0, 2, 3, 1)


class Middle(nn.Module):
    """Two blocks with attention between."""

    def __init__(self, spec: CodeDecoder) -> None:
        super().__init__()
        width = spec.widths[0]
        self.before, self.attn = ResidualBlock(spec, width, width), GridAttention(spec, width)
        self.after = ResidualBlock(spec, width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.after(self.attn(self.before(hidden)))
        return out


class Level(nn.Module):
    """Blocks of one resolution, attention behind each in some levels; but for the last level, each
    position becomes four."""

    def __init__(self, spec: CodeDecoder, level: int) -> None:
        super().__init__()
        width = spec.widths[level]
        self.blocks = nn.ModuleList(ResidualBlock(spec, *pair) for pair in spec.block_widths[level])
        attends = level in spec.attention_levels
        self.attns = nn.ModuleList(GridAttention(spec, width) for _ in self.blocks if attends)
        self.grows = level < len(spec.widths) - 1
        if self.grows:
            self.upsample = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            hidden = block(hidden)
            if self.attns:
                hidden = self.attns[index](hidden)
        if not self.grows:
            return hidden
        out: Tensor = self.upsample(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        return out


class ResidualBlock(nn.Module):
    def __init__(self, spec: CodeDecoder, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(spec.groups, before, spec.norm_eps)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = nn.GroupNorm(spec.groups, after, spec.norm_eps)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.widens = before != after
        if self.widens:
            self.shortcut = nn.Conv2d(before, after, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        made = self.conv1(F.silu(self.norm1(hidden)))
        made = self.conv2(F.silu(self.norm2(made)))
        out: Tensor = made + (self.shortcut(hidden) if self.widens else hidden)
        return out


class GridAttention(nn.Module):
    """Attention of one head among all positions of a map."""

    def __init__(self, spec: CodeDecoder, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(spec.groups, width, spec.norm_eps)
        self.q_proj, self.k_proj = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.v_proj, self.out_proj = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        query, key, value = (
            proj(normed).flatten(2).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = hidden + self.out_proj(mixed.transpose(1, 2).reshape(hidden.shape))
        return out


def guided(logits: Tensor, scale: float) -> Tensor:
    """Return logits ``(num_codes,)`` of rows of the prompt and of the unconditional prompt ``(2,
    num_codes)``, moved away from the latter (Ho & Salimans 2022); of one row that row."""
    if len(logits) == 1:
        return logits[0]
    return logits[1] + scale * (logits[0] - logits[1])
