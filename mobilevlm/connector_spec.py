"""Connectors of encoders with the decoder, as frozen dataclasses: part of the ModelSpec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class QFormerSpec:
    """Learned queries that read the tower's features by cross-attention (BLIP-2, section 3.1): a
    BERT with norms behind the sums, of which only the queries' states come out."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    cross_attention_frequency: int
    """Layers whose index is a multiple of this have cross-attention."""
    num_queries: int
    layer_norm_eps: float
    vocab_size: int = 0
    """Vocabulary of the instruction, which queries see by self-attention (InstructBLIP); 0: it
    reads none."""
    max_positions: int = 0
    """Tokens that an instruction may have."""
    window: int = 0
    """Features that one set of queries reads; each window of them has the queries anew, the last
    one is filled with zeros (Granite Speech). 0: one set reads all."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def has_cross_attention(self, layer: int) -> bool:
        return layer % self.cross_attention_frequency == 0

    def has_text(self, layer: int) -> bool:
        """Return whether the instruction's states continue after a layer's self-attention: those of
        the last layer are not read."""
        return self.vocab_size > 0 and layer < self.num_hidden_layers - 1


@dataclass(frozen=True)
class ConnectorSpec:
    """Tower features ``(num_features, in_size)`` to visual tokens ``(num_rows, out_size)``."""

    kind: Literal[
        "mlp", "ldp", "ldpv2", "mlp_downsample", "qformer", "merger", "pool", "stack", "llama.cpp"
    ]
    """``mlp`` with depth 1 is LLaVA's linear projector; with fewer patches going out than coming in
    it averages squares of them first. ``mlp_downsample`` (VILA; pixel shuffle in Idefics3 and
    InternVL) joins the patches of such a square in one vector, which a norm and the MLP follow.
    ``qformer`` has an MLP of depth 1 behind the Q-Former. ``merger`` (Qwen2-VL) normalises patches,
    joins those of a square, as a :class:`NativeEncoder` has them, and has an MLP. ``pool`` (Gemma
    4) averages the patches of such a square, and has an RMS norm without weight and an MLP.
    ``stack``, of sound, joins ``factor`` neighbouring features before its MLP. ``llama.cpp``: any
    that llama.cpp alone knows."""
    in_size: int
    out_size: int
    depth: int
    """Linear layers of the MLP (LDP and LDPv2 begin with one of depth 2)."""
    grid: int
    """Patches per edge that come in; 0 where images have their own."""
    out_grid: int
    """Visual tokens per edge that go out; 0 where they form no grid, or images have their own."""
    order: Literal["rows", "columns"] = "rows"
    """How ``mlp_downsample`` gives its squares out: row by row or column by column."""
    qformer: QFormerSpec | None = None
    factor: int = 2
    """Patches along each edge of the squares of ``mlp_downsample``; a grid that is no multiple is
    padded with zeros below and on the right."""
    norm: bool = True
    """``mlp_downsample`` has a LayerNorm before its MLP."""
    bias: bool = True
    """The Linears of the MLP have biases."""
    pool_norm_eps: float | None = None
    """Epsilon of an RMS norm, ``projector.norm``, before the MLP of ``mlp``, behind its pooling
    (Gemma 3); there is none when none is given."""
    inner_size: int = 0
    """Outputs of the MLP's Linears but the last; ``out_size`` when 0."""
    newline: bool = False
    """A learned row, ``projector.newline``, comes out behind the visual tokens. It ends the rows of
    a grid that tiles are put together as (mobilevlm/assembly.py)."""
    norm_kind: Literal["rms", "layer"] = "layer"
    """Norm of a ``merger``."""
    norm_eps: float = 1e-5
    deep: int = 0
    """Further mergers, each of the output of one of the encoder's ``deep_layers``. They normalise
    behind the joining, by layer norms."""

    @property
    def mlp_sizes(self) -> list[int]:
        """Sizes before, between and after the Linears of the MLP."""
        joins = {"mlp_downsample": self.factor**2, "merger": self.factor**2, "stack": self.factor}
        in_size = self.in_size * joins.get(self.kind, 1)
        if self.qformer is not None:
            in_size = self.qformer.hidden_size
        inner = self.inner_size or self.out_size
        return [in_size, *[inner] * (self.depth - 1), self.out_size]

    @property
    def num_tokens(self) -> int:
        if self.qformer is not None:
            return self.qformer.num_queries
        return self.out_grid * self.out_grid

    @property
    def num_rows(self) -> int:
        """Rows that come out: visual tokens, and the newline where there is one."""
        return self.num_tokens + self.newline

    @property
    def reads_text(self) -> bool:
        """True if the visual tokens depend on the question."""
        return self.qformer is not None and self.qformer.vocab_size > 0

    @property
    def array_names(self) -> tuple[str, ...]:
        """Named arrays that it reads beside the features."""
        return ("instruction_ids",) if self.reads_text else ()

    @property
    def deep_names(self) -> tuple[str, ...]:
        """Named outputs beside the visual tokens: what is added after the decoder's
        ``deep_layers``."""
        return tuple(f"deep.{index}" for index in range(self.deep))

    @property
    def squeeze_size(self) -> int:
        """Channels inside LDP's squeeze-and-excitation: a quarter, rounded to a multiple of 8
        without losing more than a tenth (``_make_divisible`` of MobileNetV3)."""
        quarter = self.out_size / 4
        rounded = max(8, int(quarter + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * quarter else rounded
