"""Language models as frozen dataclasses: part of the ModelSpec (spec.py), with its rules."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

MLP_LINEARS: dict[Literal["gated", "plain"], tuple[tuple[str, ...], str]] = {
    "gated": (("gate_proj", "up_proj"), "down_proj"),
    "plain": (("fc1",), "fc2"),
}
"""Names of the linear layers of an MLP: those that read its input, and the one that makes its
output."""


@dataclass(frozen=True)
class ExpertsSpec:
    """Sparse experts in place of the MLP of some decoder layers (MoE-LLaVA, section 3.2).

    Router logits → softmax over all experts → the best ``top_k``; nothing is dropped.
    """

    layers: tuple[int, ...]
    """Decoder layers that have them, in ascending order."""
    num_experts: tuple[int, ...]
    """Number of experts in each of these layers."""
    top_k: int
    """Experts that a token uses."""
    renormalize: bool = True
    """Weights of the chosen experts are divided by their sum."""
    use_residual: bool = False
    """A dense MLP beside the experts, both weighted by a softmax of two (DeepSpeed's Residual-MoE,
    Rajbhandari et al. 2022)."""


@dataclass(frozen=True)
class DeltaSpec:
    """Linear attention by the gated delta rule (Yang et al. 2024) in place of attention in some
    layers (Qwen3.5): each value head keeps a matrix of its past, which decays, and in which a key's
    value replaces what the key gave before."""

    layers: tuple[int, ...]
    """Decoder layers that have it, in ascending order."""
    key_heads: int
    """Heads of queries and of keys"""
    value_heads: int
    """A multiple of ``key_heads``; as many neighbours share a key head"""
    key_dim: int
    value_dim: int
    """Channels of a head"""
    kernel: int
    """Positions that the convolution of queries, keys and values reads, its own included."""

    @property
    def key_size(self) -> int:
        """Channels of all key heads."""
        return self.key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        """Channels of all value heads."""
        return self.value_heads * self.value_dim

    @property
    def mixed_size(self) -> int:
        """Channels of queries, keys and values together."""
        return 2 * self.key_size + self.value_size


@dataclass(frozen=True)
class RelativePositions:
    """Learned numbers, one for each head and bucket of distances, that are added to attention
    scores (T5, Raffel et al. 2020, section 2.1). All layers of a stack share them."""

    num_buckets: int
    max_distance: int
    """Distance at which the last bucket begins; up to there buckets grow logarithmically."""


@dataclass(frozen=True)
class DecoderSpec:
    """A language model, decoder-only where it has no ``encoder_layers``; by default a Llama."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float = dataclasses.field(metadata={"formerly": "rms_norm_eps"})
    rope_theta: float
    rope_scaling: float
    """Linear position interpolation: positions are divided by this factor (1.0: none)."""
    context_length: int
    tie_word_embeddings: bool
    norm: Literal["rms", "layer"] = "rms"
    """Root-mean-square norms without bias, or layer norms with."""
    rotary_dim: int | None = None
    """Channels of each head that are rotated, the first ones; all of them when none is given."""
    learned_positions: bool = False
    """A learned vector for each position is added to the embeddings."""
    relative_positions: RelativePositions | None = None
    attention_scale: float | None = None
    """Factor of query-key products; ``1 / sqrt(head_dim)`` if none is given."""
    encoder_layers: int = 0
    """Layers of an encoder, whose positions all see each other. The prompt passes it, and each
    layer of the decoder reads its output by cross-attention; the answer begins with
    ``start_token_id``."""
    start_token_id: int = 0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp: Literal["gated", "plain"] = "gated"
    """``gated``: ``down_proj(act(gate_proj x) · up_proj x)``; ``plain``: ``fc2(act(fc1 x))``."""
    hidden_act: Literal["silu", "gelu_new", "relu"] = "silu"
    """``gelu_new`` is GELU by its tanh approximation."""
    mlp_bias: bool = False
    parallel_residual: bool = False
    """Attention and MLP read the same norm, and both are added to the residual stream at once."""
    lm_head_bias: bool = False
    experts: ExpertsSpec | None = None
    embed_scale: float = 1.0
    """Factor of the rows of the embedding table as they are looked up (Gemma). Rows that an encoder
    gives are not multiplied."""
    qk_norm: bool = False
    """RMS norms over the channels of each query and key head before they are rotated:
    ``attn.q_norm`` and ``attn.k_norm`` (Qwen3, Gemma 3)."""
    post_norms: bool = False
    """Outputs of attention and MLP are normalised too before they are added to the residual stream:
    ``attn_output_norm`` and ``mlp_output_norm`` (Gemma)."""
    sliding_window: int = 0
    """Positions that a query sees in the sliding layers, its own included."""
    sliding_layers: tuple[int, ...] = ()
    """Layers with a sliding window, in ascending order; the others see the whole past."""
    sliding_rope_theta: float | None = None
    """Rotary base of the sliding layers, whose positions are then not divided by ``rope_scaling``;
    when none is given, they rotate as the others do."""
    attention_softcap: float | None = None
    """Scores before the mask become ``cap · tanh(score / cap)`` (Gemma 2)."""
    logit_softcap: float | None = None
    """Logits become ``cap · tanh(logit / cap)`` (Gemma 2)."""
    image_blocks: bool = False
    """Rows of an image see each other in both directions, within the window of sliding layers
    (Gemma 3); all else sees the past."""

    rope_sections: tuple[int, ...] = ()
    """Pairs of rotary channels that each axis of a position turns (M-RoPE, Qwen2-VL); positions
    have one axis when none are given."""
    rope_interleaved: bool = False
    """Axes take turns among the pairs, and the first has what is left (Qwen3-VL); else the pairs of
    one axis stand behind those of the other."""
    conv_layers: tuple[int, ...] = ()
    """Layers with a short convolution in place of attention (LFM2), in ascending order."""
    conv_kernel: int = 0
    """Positions that a short convolution reads, its own included."""
    conv_bias: bool = False
    """Biases of a short convolution and of the products around it."""
    deep_layers: tuple[int, ...] = ()
    """Layers after which rows of an encoder are added to the hidden states (DeepStack, Qwen3-VL),
    in ascending order."""
    attention_gate: bool = False
    """``q_proj`` gives each head a gate behind its query; the sigmoid of it multiplies what
    attention gives (Qwen3.5)."""
    delta: DeltaSpec | None = None

    global_head_dim: int = 0
    """Channels of each head in the layers that see the whole past, where sliding layers have others
    (Gemma 4); 0: ``head_dim``."""
    turned_pairs: int | None = None
    """Pairs of rotary channels that turn in the layers that see the whole past, the first ones; the
    angle of the others is 0, and all count as channels of the base (Gemma 4's ``proportional``)."""
    value_norm: bool = False
    """RMS norms without weight over the channels of each value head (Gemma 4)."""
    shared_kv_layers: int = 0
    """Last layers that read the keys and values of the last layer of their kind, sliding or not,
    before them all (Gemma 3n, Gemma 4)."""
    shared_intermediate_size: int = 0
    """Inner size of the MLPs in these layers; 0: ``intermediate_size``."""
    layer_input_size: int = 0
    """Channels of an input of its own that each layer has: a row of a table by token beside a
    projection of the embedding, which gates the residual stream behind the MLP (per-layer
    embeddings of Gemma 3n and Gemma 4). 0: there is none."""
    layer_input_id: int = 0
    """Token whose rows of that table stand for visual tokens."""
    layer_scale: bool = False
    """The output of each layer is multiplied by a learned number (Gemma 4)."""

    sound_rank: int = 0
    """Rank of products that are added to queries and values where a prompt has sound:
    ``attn.q_down`` and ``attn.q_up``, ``attn.v_down`` and ``attn.v_up`` (Granite Speech's LoRA); 0:
    there are none."""

    @property
    def rare_parts(self) -> tuple[str, ...]:
        """Names of parts that only the ONNX decoder for CPUs and llama.cpp have."""
        parts = {
            "positions of several axes": self.rope_sections,
            "short convolutions": self.conv_layers,
            "rows added after some layers (DeepStack)": self.deep_layers,
            "gated delta layers": self.delta,
            "gates behind attention": self.attention_gate,
            "products that act where a prompt has sound": self.sound_rank,
            "heads of two sizes": self.global_head_dim,
            "keys and values that layers share": self.shared_kv_layers,
            "per-layer embeddings": self.layer_input_size,
        }
        return tuple(name for name, layers in parts.items() if layers)

    def mixer(self, layer: int) -> Literal["attn", "short_conv", "delta"]:
        """Return the name of what mixes positions in a layer."""
        if layer in self.conv_layers:
            return "short_conv"
        return "delta" if self.delta is not None and layer in self.delta.layers else "attn"

    def kv_layer(self, layer: int) -> int:
        """Return the layer whose keys and values a layer reads."""
        first = self.num_hidden_layers - self.shared_kv_layers
        if layer < first:
            return layer
        kind = self.window(layer)
        return next(index for index in reversed(range(first)) if self.window(index) == kind)

    @property
    def kv_sources(self) -> set[int]:
        """Layers whose keys and values others read."""
        layers = range(self.num_hidden_layers)
        return {source for layer in layers if (source := self.kv_layer(layer)) != layer}

    def at(self, layer: int) -> DecoderSpec:
        """Return the decoder with the sizes that one layer has."""
        if not (self.global_head_dim or self.shared_intermediate_size or self.turned_pairs):
            return self
        sizes: dict[str, int | None] = {"global_head_dim": 0, "shared_intermediate_size": 0}
        if self.window(layer):
            sizes["turned_pairs"] = None
        elif self.global_head_dim:
            sizes["head_dim"] = self.global_head_dim
        if self.shared_intermediate_size and self.kv_layer(layer) != layer:
            sizes["intermediate_size"] = self.shared_intermediate_size
        return dataclasses.replace(self, **sizes)  # type: ignore[arg-type]

    @property
    def attention_layers(self) -> int:
        """Number of layers with attention."""
        return sum(self.mixer(layer) == "attn" for layer in range(self.num_hidden_layers))

    @property
    def position_axes(self) -> int:
        """Numbers that a position has."""
        return max(1, len(self.rope_sections))

    def window(self, layer: int) -> int:
        """Positions that a query sees in a layer, its own included; 0: all of the past."""
        return self.sliding_window if layer in self.sliding_layers else 0

    def has_sliding_rope(self, layer: int) -> bool:
        """Return whether a layer rotates by ``sliding_rope_theta``."""
        return self.sliding_rope_theta is not None and self.window(layer) > 0

    def rope(self, sliding: bool) -> tuple[float, float]:
        """Rotary base, and the factor that positions are divided by. ``sliding``: of layers for
        which :meth:`has_sliding_rope`."""
        if sliding and self.sliding_rope_theta is not None:
            return self.sliding_rope_theta, 1.0
        return self.rope_theta, self.rope_scaling

    @property
    def rotary_channels(self) -> int:
        """Channels of each head that are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def cache_head_dim(self) -> int:
        """Channels of each head in the keys and values of an ONNX decoder on the CPU, whose
        attention takes multiples of 8: those beyond ``head_dim`` are 0."""
        return -(-self.head_dim // 8) * 8

    @property
    def layer_input_width(self) -> int:
        """Channels of the inputs that all layers have together."""
        return self.num_hidden_layers * self.layer_input_size

    @property
    def mlp_linears(self) -> tuple[tuple[str, ...], str]:
        """Canonical names of the linear layers of an MLP: those that read its input, and the one
        that makes its output."""
        return MLP_LINEARS[self.mlp]

    def mlp_names(self, layer: int) -> list[str]:
        """Canonical names of a layer's MLPs: its experts and the dense one beside them, or one."""
        mlp = f"decoder.layers.{layer}.mlp"
        count = self.num_experts(layer)
        names = [f"{mlp}.experts.{index}" for index in range(count)] or [mlp]
        if count and self.experts is not None and self.experts.use_residual:
            names.append(f"{mlp}.residual")
        return names

    @property
    def score_scale(self) -> float:
        """Factor that query-key products are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def num_experts(self, layer: int) -> int:
        """Experts of a decoder layer; 0 where it has one dense MLP."""
        if self.experts is None or layer not in self.experts.layers:
            return 0
        return self.experts.num_experts[self.experts.layers.index(layer)]
