"""Outputs of a model beside text, as frozen dataclasses: codes that the decoder chooses one after
the other, and what makes an image of them. Part of the ModelSpec (spec.py), with its rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True)
class CodeDecoder:
    """A convolutional decoder of a grid of codes (VQGAN, Esser et al. 2021, section 3.1): vectors
    of a codebook, normalised to length 1, through levels of doubled resolution to pixels from -1
    to 1."""

    latent_size: int
    """Channels of the grid that the first convolution reads."""
    widths: tuple[int, ...]
    """Channels of each level, the lowest resolution first."""
    blocks: int
    """Residual blocks of each level."""
    attention_levels: tuple[int, ...] = (0,)
    """Levels with attention over all positions behind each block, in ascending order."""
    groups: int = 32
    """Groups of channels of each norm."""
    norm_eps: float = 1e-6
    kind: Literal["vq"] = "vq"

    @property
    def scale(self) -> int:
        """Pixels along each edge of what one code becomes."""
        return 1 << (len(self.widths) - 1)

    @property
    def block_widths(self) -> list[list[tuple[int, int]]]:
        """Channels before and after each block, by level."""
        before, found = self.widths[0], []
        for width in self.widths:
            found.append(list(pairwise([before, *[width] * self.blocks])))
            before = width
        return found


@dataclass(frozen=True)
class ImageOutput:
    """Images as a square of codes, row by row. A head chooses each code from the decoder's states;
    an embedding of the code is the decoder's next row (Janus, Chen et al. 2025, section 2)."""

    num_codes: int
    code_size: int
    """Channels of a code's embedding before its MLP, and of a vector of the codebook."""
    grid: int
    """Codes along each edge."""
    head_size: int
    """Channels between the two Linears of the head."""
    decoder: CodeDecoder
    chat_template: str
    """Template of the prompts that images are drawn from, as of
    :class:`mobilevlm.spec.ConversationSpec`."""
    begin_ids: tuple[int, ...]
    """Follow the prompt; the first code comes next."""
    empty_id: int
    """Stands for each id of a prompt in the unconditional prompt of guidance."""
    kept_ids: tuple[int, ...]
    """Ids that stay as they are there."""
    guidance: float = 5.0
    """Usual scale of guidance."""
    embed_depth: int = 2
    """Linear layers of the MLP behind the embedding of a code."""

    @property
    def num_tokens(self) -> int:
        """Codes of an image."""
        return self.grid * self.grid

    @property
    def edge(self) -> int:
        """Edge of an image, in pixels."""
        return self.grid * self.decoder.scale
