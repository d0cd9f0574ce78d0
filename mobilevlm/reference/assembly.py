"""Visual tokens of an image from those of the encoder's runs, as the official code makes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mobilevlm.prompt import Assembly


def assemble_rows(parts: Sequence[Tensor], assembly: Assembly | None) -> Tensor:
    """Return ``(rows, hidden_size)``. ``parts``: of each run, with the newline at the end where
    there is an ``assembly`` (LLaVA-NeXT: tiles as one grid, each of its rows before the newline).
    """
    if assembly is None:
        return torch.cat(list(parts))
    if assembly.tiles == (0, 0):
        return parts[0]
    (down, across), side = assembly.tiles, assembly.side
    tiles = torch.stack([part[:-1] for part in parts[1:]])
    grid = tiles.view(down, across, side, side, -1).permute(4, 0, 2, 1, 3)
    grid = grid.flatten(3, 4).flatten(1, 2)  # (hidden_size, rows, columns)
    above, left = assembly.margins
    grid = grid[:, above : down * side - above, left : across * side - left]
    if grid.shape[1:] != assembly.size:
        grid = F.interpolate(grid[None], assembly.size, mode="bilinear")[0]
    newline = parts[0][-1]
    lines = torch.cat([grid, newline[:, None, None].expand(-1, grid.shape[1], 1)], dim=2)
    return torch.cat([parts[0][:-1], lines.flatten(1).T])
