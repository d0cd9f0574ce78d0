"""Vision transformers on images near their own size, and videos as they take them, as frozen
dataclasses: part of the ModelSpec (spec.py), with its rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mobilevlm.decoder_spec import MLP_LINEARS

BOUNDS = ("input_min", "input_max", "output_min", "output_max")
"""Numbers that a clipped linear layer has beside its weight."""
MOST_FRAMES = 1 << 16
"""Frames of a clip."""


@dataclass(frozen=True)
class NativeEncoder:
    """A vision transformer on images of any size (Qwen2-VL, Wang et al. 2024, section 2.1).

    Its patches stand in squares of ``merge_size`` along each edge, which become one visual token
    each: squares row by row, patches row by row in each. Queries and keys rotate by the patch's row
    and column. Nothing normalises the features.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    merge_size: int
    """Patches along each edge of a square."""
    hidden_act: Literal["silu", "quick_gelu", "gelu_tanh"]
    norm: Literal["rms", "layer"]
    norm_eps: float
    mlp: Literal["gated", "plain"]
    frames: int = 2
    """Frames of a video that a patch covers; a still image fills them all."""
    patch_bias: bool = False
    """Presence of a bias in the patch embedding."""
    position_grid: int = 0
    """Rows and columns of a table of learned positions, which is resized bilinearly, its corners on
    those of the image; 0: there is none."""
    window: int = 0
    """Squares along each edge of a window, which patches see in most layers; 0: they see all."""
    full_layers: tuple[int, ...] = ()
    """Layers whose patches see the whole image in spite of ``window``, in ascending order."""
    deep_layers: tuple[int, ...] = ()
    """Layers whose output the connector reads beside the features (DeepStack), in ascending
    order."""
    rope_theta: float = 10000.0
    bias: bool = True
    """Linear layers have biases."""
    head_norms: bool = False
    """RMS norms over the channels of each head: of queries and keys, and, without weight, of
    values. Products of query and key are not divided then (Gemma 4)."""
    post_norms: bool = False
    """Outputs of attention and MLP are normalised too before they are added."""
    clipped: bool = False
    """Inputs and outputs of linear layers are clipped to bounds that each has (Gemma 4)."""
    axis_positions: int = 0
    """Rows of each of two tables of learned positions, by row and by column of a patch, which are
    added as they are (Gemma 4); 0: there are none."""
    kind: Literal["native"] = "native"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_values(self) -> int:
        """Numbers that a patch is made of."""
        return 3 * self.frames * self.patch_size**2

    @property
    def square(self) -> int:
        """Patches that become one visual token."""
        return self.merge_size**2

    @property
    def mlp_linears(self) -> tuple[tuple[str, ...], str]:
        """Names of the linear layers of an MLP: those that read its input, and the one that makes
        its output."""
        return MLP_LINEARS[self.mlp]

    def window_of(self, layer: int) -> int:
        """Squares along each edge of a layer's windows; 0: patches see the whole image."""
        return 0 if layer in self.full_layers else self.window


@dataclass(frozen=True)
class ClipSpec:
    """Frames of a video, their size and their times (Qwen2-VL, section 2.1)."""

    min_pixels: int
    max_pixels: int
    """Pixels of a frame at least."""
    total_pixels: int = 0
    """Pixels of all frames together at most; ``min_pixels`` is of all together then. 0: each frame
    is resized by itself."""
    frames_per_second: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    sampling: Literal["parts", "ends"] = "ends"
    """Places of the frames: ``ends``: the first, the last, and those between at equal distances;
    ``parts``: the first of each of equal parts, as many as fill whole time steps."""
    positions_per_second: float = 0.0
    """Positions of a second (Qwen2.5-VL); 0: each time step has the next one."""
    tells_times: bool = False
    """Each time step is an image of its own, behind a text with its seconds (Qwen3-VL)."""
