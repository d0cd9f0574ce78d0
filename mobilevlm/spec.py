"""ModelSpec: everything known about a model, as one tree of frozen dataclasses.

A family fills it from a checkpoint; the torch reference, the graph authors and the runtime read
only this. It is stored in a bundle's manifest, so a field added here must have a default.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeAlias, TypeVar

from mobilevlm.errors import MobileVLMError

IMAGE_TOKEN_ID = -200
"""Marks an image in a list of input ids, as the reference code of LLaVA and MobileVLM does."""

IMAGE_PLACEHOLDER = "<image>"
"""Marks an image in prompt text."""


@dataclass(frozen=True)
class FixedImage:
    """Preparation of an image as one square of uint8 pixels ``(size, size, 3)``."""

    size: int
    """Edge of the square that the tower takes, in pixels."""
    shortest_edge: int
    """The shorter edge is resized to this before the centre crop."""
    aspect: Literal["pad", "crop", "resize"]
    """``pad``: first pad to a square with the mean colour; ``crop``: centre crop cuts the rest;
    ``resize``: straight to the square, whatever the shape."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    kind: Literal["fixed_image"] = "fixed_image"

    @property
    def pad_color(self) -> tuple[int, int, int]:
        """The mean colour as the reference code rounds it: ``int(mean * 255)``."""
        red, green, blue = (int(channel * 255) for channel in self.mean)
        return red, green, blue


Resampling: TypeAlias = Literal["bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class Tiles:
    """Preparation of an image as a grid of square tiles and itself made small, each uint8 pixels
    ``(size, size, 3)`` of one run of the encoder (media/tiles.py)."""

    size: int
    """Edge of a tile, in pixels."""
    longest_edge: int
    """The longer edge is resized to this, then both to multiples of a tile."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    thumbnail: Literal["none", "first", "last"] = "last"
    """Place of the image made small as a tile, where it has several."""
    resample: Resampling = "lanczos"
    kind: Literal["tiles"] = "tiles"

    @property
    def most_per_edge(self) -> int:
        """Tiles along the longer edge."""
        return -(-self.longest_edge // self.size)


@dataclass(frozen=True)
class DynamicImage:
    """Preparation of an image near its own size, as uint8 pixels ``(height, width, 3)`` whose edges
    are multiples of ``factor`` (media/dynamic_image.py)."""

    patch_size: int
    merge_size: int
    """Patches along each edge of the square that becomes one visual token."""
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Resampling = "bicubic"
    kind: Literal["dynamic_image"] = "dynamic_image"

    @property
    def factor(self) -> int:
        """Pixels along each edge of what becomes one visual token."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class Mel:
    """Preparation of sound as log-mel spectrograms float32 ``(bins, frames)``, one for each window
    (mobilevlm/audio.py)."""

    bins: int
    sampling_rate: int = 16_000
    """Samples in a second."""
    window: int = 400
    """Samples of a Fourier transform."""
    hop: int = 160
    """Samples from one frame to the next."""
    frames: int = 3000
    kind: Literal["mel"] = "mel"


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
    """Of the patch embedding."""
    pre_norm: bool = True
    """A norm before the first layer."""
    post_norm: bool = False
    """The features are those after the tower's final norm."""
    class_feature: bool = False
    """The class token's state is among the features, first; else it is dropped."""

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
    """Of the instruction, which queries see by self-attention (InstructBLIP); 0: it reads none."""
    max_positions: int = 0
    """Tokens that an instruction may have."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def has_cross_attention(self, layer: int) -> bool:
        return layer % self.cross_attention_frequency == 0

    def has_text(self, layer: int) -> bool:
        """Whether the instruction's states go on after a layer's self-attention: nobody reads those
        of the last."""
        return self.vocab_size > 0 and layer < self.num_hidden_layers - 1


@dataclass(frozen=True)
class ConnectorSpec:
    """Tower features ``(num_features, in_size)`` to visual tokens ``(num_tokens, out_size)``."""

    kind: Literal["mlp", "ldp", "ldpv2", "mlp_downsample", "qformer"]
    """``mlp`` with depth 1 is LLaVA's linear projector; with fewer patches going out than coming in
    it averages squares of them first. ``mlp_downsample`` (VILA) joins the four patches of such a
    square in one vector, which a norm and the MLP follow. ``qformer`` has an MLP of depth 1 behind
    the Q-Former."""
    in_size: int
    out_size: int
    depth: int
    """Linear layers of the MLP (LDP and LDPv2 begin with one of depth 2)."""
    grid: int
    """Patches per edge that come in."""
    out_grid: int
    """Visual tokens per edge that go out; 0 where they form no grid."""
    order: Literal["rows", "columns"] = "rows"
    """How ``mlp_downsample`` gives its squares out: row by row or column by column."""
    qformer: QFormerSpec | None = None

    @property
    def mlp_sizes(self) -> list[int]:
        """Sizes before, between and after the Linears of the MLP."""
        in_size = self.in_size * (4 if self.kind == "mlp_downsample" else 1)
        if self.qformer is not None:
            in_size = self.qformer.hidden_size
        return [in_size] + [self.out_size] * self.depth

    @property
    def num_tokens(self) -> int:
        if self.qformer is not None:
            return self.qformer.num_queries
        return self.out_grid * self.out_grid

    @property
    def reads_text(self) -> bool:
        """Whether the visual tokens depend on what is asked."""
        return self.qformer is not None and self.qformer.vocab_size > 0

    @property
    def array_names(self) -> tuple[str, ...]:
        """Named arrays that it reads beside the features."""
        return ("instruction_ids",) if self.reads_text else ()

    @property
    def squeeze_size(self) -> int:
        """Channels inside LDP's squeeze-and-excitation: a quarter, rounded to a multiple of 8
        without losing more than a tenth (``_make_divisible`` of MobileNetV3)."""
        quarter = self.out_size / 4
        rounded = max(8, int(quarter + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * quarter else rounded


@dataclass(frozen=True)
class ExpertsSpec:
    """Sparse experts in place of the MLP of some decoder layers (MoE-LLaVA, section 3.2).

    Router logits → softmax over all experts → the best ``top_k``; nothing is dropped.
    """

    layers: tuple[int, ...]
    """Decoder layers that have them, in ascending order."""
    num_experts: tuple[int, ...]
    """Of each of these layers."""
    top_k: int
    """Experts that a token uses."""
    renormalize: bool = True
    """Weights of the chosen experts are divided by their sum."""
    use_residual: bool = False
    """A dense MLP beside the experts, both weighted by a softmax of two (DeepSpeed's Residual-MoE,
    Rajbhandari et al. 2022)."""


@dataclass(frozen=True)
class RelativePositions:
    """Learned numbers, one for each head and bucket of distances, that are added to attention
    scores (T5, Raffel et al. 2020, section 2.1). All layers of a stack share them."""

    num_buckets: int
    max_distance: int
    """Where the last bucket begins; buckets grow with the logarithm up to there."""


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
    """Of products of query and key; ``1 / sqrt(head_dim)`` when none is given."""
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

    @property
    def only_onnx(self) -> tuple[str, ...]:
        """Names of parts that only graphs of the ONNX decoder for CPUs have."""
        parts = {
            "positions of several axes": self.rope_sections,
            "short convolutions": self.conv_layers,
            "rows added after some layers (DeepStack)": self.deep_layers,
        }
        return tuple(name for name, layers in parts.items() if layers)

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
    def mlp_linears(self) -> tuple[tuple[str, ...], str]:
        """Canonical names of the linear layers of an MLP: those that read its input, and the one
        that makes its output."""
        if self.mlp == "gated":
            return ("gate_proj", "up_proj"), "down_proj"
        return ("fc1",), "fc2"

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
        """What products of query and key are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def num_experts(self, layer: int) -> int:
        """Experts of a decoder layer; 0 where it has one dense MLP."""
        if self.experts is None or layer not in self.experts.layers:
            return 0
        return self.experts.num_experts[self.experts.layers.index(layer)]


@dataclass(frozen=True)
class ConversationSpec:
    """What turns chat messages into input ids and ends an answer."""

    chat_template: str
    """Jinja template over ``messages``, as in tokenizer_config.json of the Hugging Face hub."""
    eos_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    tokenization: Literal["apart", "joined", "images_first"] = "apart"
    """``apart``: text between images is tokenized piece by piece; ``joined``: as one string, where
    ``<image>`` is a token of the tokenizer; ``images_first``: apart, and images that begin the text
    stand before the ids that begin a text."""


@dataclass(frozen=True)
class LayoutSpec:
    """Ids around the visual tokens of an image, in the prompt and in official code."""

    end_ids: tuple[int, ...] = ()
    """Follow each image."""
    placeholder_ids: tuple[int, ...] = (IMAGE_TOKEN_ID,)
    """Ids of the official code for an image, visual tokens and ``end_ids``."""
    tile_ids: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Ids before each tile, by row and column; without any, tiles are not marked."""
    row_end_ids: tuple[int, ...] = ()
    """Ids between two rows of tiles."""
    between_ids: tuple[int, ...] = ()
    """Ids between the tiles and the image made small."""
    thumbnail_ids: tuple[int, ...] = ()
    """Ids before the image made small, or before an image that is one tile."""

    @property
    def ids(self) -> tuple[int, ...]:
        """All that may stand in a prompt."""
        tiles = chain.from_iterable(self.tile_ids)
        others = self.end_ids, self.row_end_ids, self.between_ids, self.thumbnail_ids
        return tuple(chain(*others, *tiles))


@dataclass(frozen=True)
class InputSpec:
    """One kind of input beside text: prepared, encoded, and brought into the decoder's space."""

    preparation: FixedImage | Tiles | DynamicImage | Mel
    encoder: TransformerEncoder
    connector: ConnectorSpec
    layout: LayoutSpec = LayoutSpec()

    @property
    def square(self) -> FixedImage | Tiles:
        """The preparation of an encoder that takes squares of one size.

        Raises:
            MobileVLMError: it takes images of other shapes.
        """
        if isinstance(self.preparation, FixedImage | Tiles):
            return self.preparation
        raise MobileVLMError(
            f"an input prepared as {self.preparation.kind!r} needs an encoder that this version "
            f"does not have: use a later one"
        )


@dataclass(frozen=True)
class ModelSpec:
    """One multimodal language model: its inputs, its decoder, and what surrounds them."""

    family: str
    name: str
    inputs: dict[str, InputSpec]
    """Inputs beside text by their kind: ``image``; none of a plain language model."""
    decoder: DecoderSpec
    conversation: ConversationSpec
    variant: str = ""
    """Which of several official behaviours, for families that have them."""

    @property
    def image(self) -> InputSpec:
        """The input for images.

        Raises:
            MobileVLMError: the model takes no images.
        """
        if "image" not in self.inputs:
            raise MobileVLMError(f"{self.name}: this model takes no images: leave them out")
        return self.inputs["image"]


def with_image(spec: ModelSpec, **parts: Any) -> ModelSpec:
    """Return a spec with other parts (fields of :class:`InputSpec`) of its image input."""
    image = dataclasses.replace(spec.image, **parts)
    return dataclasses.replace(spec, inputs={**spec.inputs, "image": image})


GGUFType: TypeAlias = Literal[
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_m", "q5_k_m", "q6_k"
]
"""How GGUF files store matrices. The last three are made by llama.cpp's own quantizer."""

KVCache: TypeAlias = Literal["fp32", "int8"]
"""How an ONNX decoder stores keys and values."""

GGUF_TYPES: tuple[GGUFType, ...] = typing.get_args(GGUFType)

T = TypeVar("T")


def to_dict(value: Any) -> Any:
    """A spec as plain JSON types."""
    return dataclasses.asdict(value)


def from_dict(cls: type[T], data: Any, where: str, strict: bool = False) -> T:
    """Rebuilds a dataclass tree from JSON types; ``where`` names the place in error messages.

    ``strict``: keys that no field has are an error (what a person wrote, with a typing mistake);
    else they are ignored (what a later version wrote).

    Raises:
        MobileVLMError: a key is missing or unknown, or a value has the wrong type.
    """
    value = _convert(cls, data, where, strict)
    return typing.cast(T, value)


def _convert(expected: Any, data: Any, where: str, strict: bool) -> Any:
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        if not isinstance(data, dict):
            raise MobileVLMError(f"{where}: expected an object, found {data!r:.60}")
        hints = typing.get_type_hints(expected)
        unknown = [key for key in data if key not in hints]
        if strict and unknown:
            raise MobileVLMError(
                f"{where}: key {unknown[0]!r} is not known: expected {', '.join(hints)}"
            )
        values = {}
        for field in dataclasses.fields(expected):
            key = field.name
            if key not in data and field.metadata.get("formerly") in data:
                key = field.metadata["formerly"]  # written by an earlier version
            if key in data:
                value = data[key]
                if not strict and isinstance(value, str):  # a value of an earlier version
                    value = field.metadata.get("formerly_said", {}).get(value, value)
                values[field.name] = _convert(hints[field.name], value, f"{where}.{key}", strict)
            elif field.default is field.default_factory is dataclasses.MISSING:
                raise MobileVLMError(f"{where}: key {field.name!r} is missing")
        return expected(**values)  # type: ignore[operator]
    if origin is tuple:
        if not isinstance(data, (list, tuple)) or (args[-1] is not ... and len(data) != len(args)):
            raise MobileVLMError(f"{where}: expected a list, found {data!r:.60}")
        kinds = args[:1] * len(data) if args[-1] is ... else args
        return tuple(
            _convert(kind, item, f"{where}[{index}]", strict)
            for index, (kind, item) in enumerate(zip(kinds, data, strict=True))
        )
    if origin is dict:
        if not isinstance(data, dict):
            raise MobileVLMError(f"{where}: expected an object, found {data!r:.60}")
        return {
            key: _convert(args[1], item, f"{where}.{key}", strict) for key, item in data.items()
        }
    if origin is Literal:
        if data not in args:
            known = ", ".join(map(repr, args))
            raise MobileVLMError(f"{where}: expected one of {known}, found {data!r:.60}")
        return data
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        among = [arg for arg in args if arg is not type(None)]
        chosen = among[0] if len(among) == 1 else _of_kind(among, data, where)
        return _convert(chosen, data, where, strict)
    if expected is float and type(data) is int and abs(data) < 1 << 1023:
        return float(data)
    if expected is not Any and type(data) is not expected:
        raise MobileVLMError(f"{where}: expected {expected.__name__}, found {data!r:.60}")
    return data


def _of_kind(kinds: list[Any], data: Any, where: str) -> Any:
    """Return the dataclass of a union that the data's ``kind`` names."""
    named = {one.kind: one for one in kinds}
    kind = data.get("kind") if isinstance(data, dict) else data
    if not isinstance(kind, str) or kind not in named:
        raise MobileVLMError(
            f"{where}: expected the kind {' or '.join(map(repr, named))}, found {kind!r:.60}"
        )
    return named[kind]
