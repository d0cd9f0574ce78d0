"""Encoders of images, as frozen dataclasses: part of the ModelSpec (spec.py), with its rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from mobilevlm.decoder_spec import MLP_LINEARS

BOUNDS = ("input_min", "input_max", "output_min", "output_max")
"""Numbers that a clipped linear layer has beside its weight."""


@dataclass(frozen=True)
class TransformerEncoder:
    """A vision transformer, cut after the layer whose features are used; with all defaults CLIP's.

    SigLIP's (VILA) has no class token; BLIP-2's (of EVA's shape) gives its class token on, after
    the final norm.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    """Layers that are kept: those after the selected layer are dropped."""
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: Literal["quick_gelu", "gelu", "gelu_tanh"]
    """``gelu_tanh`` is GELU by its tanh approximation."""
    layer_norm_eps: float
    class_token: bool = True
    """A learned token before those of the patches, with a position of its own."""
    patch_bias: bool = False
    """Presence of a bias in the patch embedding."""
    pre_norm: bool = True
    """A norm before the first layer."""
    post_norm: bool = False
    """The features are those after the tower's final norm."""
    class_feature: bool = False
    """The class token's state is among the features, first; else it is dropped."""
    resized_positions: bool = False
    """Learned positions are resized to the patches of each image, bilinear with antialiasing
    (SigLIP 2, Tschannen et al. 2025, section 2.4); ``image_size`` is what their table is for."""
    kind: Literal["transformer"] = "transformer"

    @property
    def key_bias(self) -> bool:
        """Presence of a bias in the layers that make keys."""
        return True

    @property
    def grid(self) -> int:
        """Patches per edge."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid * self.grid

    @property
    def num_positions(self) -> int:
        """Tokens inside the tower."""
        return self.num_patches + self.class_token

    @property
    def num_features(self) -> int:
        """Tokens that come out of it."""
        return self.num_patches + self.class_feature

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ConvEncoder:
    """A hybrid of convolutions and attention in stages of halved resolution, with fused branches:
    FastViTHD (FastVLM, Vasu et al. 2024, section 3.2). Its features are the last map, row by row.
    """

    image_size: int
    widths: tuple[int, ...]
    """Channels of each stage."""
    depths: tuple[int, ...]
    """Blocks of each stage."""
    mlp_ratios: tuple[int, ...]
    """Channels inside the MLPs of each stage, in multiples of its width."""
    attention_stages: tuple[int, ...]
    """Stages that mix positions by attention, in ascending order; the others by convolutions."""
    head_dim: int = 32
    expansion: int = 2
    """Channels of the features, in multiples of the last width."""
    squeeze_ratio: int = 16
    """Channels of the features for each inside the squeeze-and-excitation."""
    layer_norm_eps: float = 1e-5
    kind: Literal["conv"] = "conv"

    @property
    def hidden_size(self) -> int:
        """Channels of the features."""
        return self.widths[-1] * self.expansion

    @property
    def squeeze_size(self) -> int:
        """Channels inside the squeeze-and-excitation."""
        return self.hidden_size // self.squeeze_ratio

    @property
    def stride(self) -> int:
        """Pixels along each edge of what becomes one feature."""
        return 4 << (len(self.widths) - 1)

    @property
    def grid(self) -> int:
        """Features per edge."""
        return self.stage_grid(len(self.widths) - 1)

    @property
    def num_features(self) -> int:
        return self.grid * self.grid

    @property
    def num_positions(self) -> int:
        """Vectors as wide as the features that the largest map between two steps would fill."""
        sizes = (self.stage_grid(stage) ** 2 * width for stage, width in enumerate(self.widths))
        return max(self.num_features, -(-max(sizes) // self.hidden_size))

    def stage_grid(self, stage: int) -> int:
        """Positions per edge of a stage's maps."""
        return self.image_size // (4 << stage)

    def mlp_size(self, stage: int) -> int:
        """Channels inside the MLPs of a stage."""
        return self.widths[stage] * self.mlp_ratios[stage]


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


SquareEncoder: TypeAlias = TransformerEncoder | ConvEncoder
"""An encoder with a grid of its own."""
ImageEncoder: TypeAlias = TransformerEncoder | ConvEncoder | NativeEncoder
"""An image encoder."""
