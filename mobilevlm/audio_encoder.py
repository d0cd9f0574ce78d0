"""Encoders of sound as frozen dataclasses: part of the ModelSpec (spec.py), with its rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class WhisperEncoder:
    """Two convolutions over log-mel frames, the second of stride 2, and a transformer (Whisper,
    Radford et al. 2022, section 2.2); its activation is exact GELU."""

    bins: int
    """Numbers of a frame."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    positions: int
    """Rows of its table of positions: those of a whole window."""
    pooling: int = 1
    """Neighbouring positions whose mean goes through the final norm (Qwen2-Audio)."""
    cut: bool = False
    """Positions behind the sound are left out behind the convolutions, which official code masks.
    The frames that it is given are then those of the sound and one more, so its convolutions add
    none behind them. Otherwise it reads whole windows, silence included."""
    layer_norm_eps: float = 1e-5
    kind: Literal["whisper"] = "whisper"

    @property
    def hidden_act(self) -> Literal["gelu"]:
        return "gelu"

    @property
    def key_bias(self) -> bool:
        """Presence of a bias in the layers that make keys: it would change no attention."""
        return False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def frames(self) -> int:
        """Frames of a whole window."""
        return 2 * self.positions


@dataclass(frozen=True)
class ConformerEncoder:
    """Blocks of half an MLP, attention, a convolution and another half of an MLP (Conformer, Gulati
    et al. 2020), as Granite Speech has them: frames see those of their own block of positions, by
    content and distance, and half-way the guess of a CTC head is added."""

    bins: int
    """Numbers of a frame."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    block: int
    """Frames that see each other."""
    distances: int
    """Longest distance with a vector of its own, on either side."""
    conv_kernel: int
    conv_size: int
    """Channels inside the convolution."""
    guesses: int
    """Outputs of the head whose probabilities are added after half of the layers."""
    norm_eps: float = 1e-5
    kind: Literal["conformer"] = "conformer"

    @property
    def guess_layer(self) -> int:
        """Layer behind which they are added."""
        return self.num_hidden_layers // 2 - 1


SoundEncoder = WhisperEncoder | ConformerEncoder
"""An encoder of log-mel frames."""
