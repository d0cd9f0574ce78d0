"""Recipe: the precision of each part of a model in an export, and how far it may drift.

A bundle's manifest holds it. Named recipes and recipe files are in export/recipes/.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from mobilevlm.spec import GGUFType, KVCache

Precision: TypeAlias = Literal["fp32", "fp16", "int8", "q8", "q4", "q2", "qdq8", "qdq16"]
"""How the weights of a linear layer are stored and multiplied.

``fp32``, ``fp16``: float; ``int8``: 8-bit weights, activations quantized while running;
``q8``, ``q4``, ``q2``: 8-, 4- or 2-bit weights in blocks (MatMulNBits, which has no 3-bit kernel);
``qdq8``, ``qdq16``: a whole stage in fixed point, 8-bit weights and 8- or 16-bit activations whose
scales are constants (export/fixed_shapes/vision.py); the decoder only in graphs for NPUs
(export/fixed_shapes/decoder.py).
"""

QuantizerName: TypeAlias = Literal["rtn", "mse", "hqq", "gptq"]
ScalingName: TypeAlias = Literal["none", "awq", "smoothquant", "rotation"]
CalibratorName: TypeAlias = Literal["minmax", "percentile", "entropy"]
WeightBits: TypeAlias = Literal[7, 8]

QDQ: tuple[Precision, ...] = ("qdq8", "qdq16")
"""Precisions of fixed-point graphs: QuantizeLinear and DequantizeLinear around every operator."""

BLOCK_BITS: dict[Precision, int] = {"q8": 8, "q4": 4, "q2": 2}
"""Bits of the precisions whose weights are in blocks."""
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Blocks that MatMulNBits takes at every bit width."""

HALVED: tuple[Precision, ...] = ("int8", "qdq8")
"""Precisions whose weights have 7 bits where sums of products saturate."""

_GGUF_TYPES: dict[Precision, GGUFType] = {
    "fp32": "f32",
    "fp16": "f16",
    "int8": "q8_0",
    "q8": "q8_0",
    "q4": "q4_k_m",
    "q2": "q4_k_m",
    "qdq8": "q8_0",
    "qdq16": "q8_0",
}

PARTS = ("tower", "projector", "decoder", "lm_head")
"""Parts of a model whose linear layers have a format of their own."""
PREFILL = "prefill"
PREFILL_LAYERS = "prefill_layers"
"""The decoder's layers once more, for prompts, and the single ones among them."""
OWN, SCENES = "own", "scenes"
DATA_NAMES = (OWN, SCENES)
"""Names of calibration data: the model's own answers, drawn scenes. Any other is a JSONL file."""


@dataclass(frozen=True)
class Scheme:
    """The integers that stand for weights, and how many weights share a scale."""

    bits: int
    """2, 3, 4 or 8. MatMulNBits has no kernel for 3."""
    block_size: int | None
    """Weights along the input that share a scale, a multiple of 8; none: all of an output."""
    symmetric: bool = True
    """The zero point is in mid-range, else each block has its own."""
    half_range: bool = False
    """Only the inner half of the codes, ±64 of 8 bits: x86 without VNNI adds pairs of u8 × s8
    products in 16 bits (``vpmaddubsw``), and 2 · 255 · 64 is the most that fits."""

    @property
    def middle(self) -> int:
        """The zero point of symmetric schemes."""
        return 1 << (self.bits - 1)

    @property
    def lowest(self) -> int:
        return self.middle // 2 if self.half_range else 0

    @property
    def highest(self) -> int:
        return self.middle + self.middle // 2 if self.half_range else 2 * self.middle - 1

    def block(self, in_size: int) -> int:
        """Weights in a block."""
        return in_size if self.block_size is None else self.block_size

    def blocks(self, in_size: int) -> int:
        """Blocks in a row; the last may be padded."""
        return -(-in_size // self.block(in_size))


@dataclass(frozen=True)
class LinearFormat:
    """How the linear layers of one part of a model are stored."""

    precision: Precision
    quantizer: QuantizerName = "rtn"
    """Method that chooses the integers: ``rtn``, ``mse`` and ``hqq`` need no data, ``gptq`` is
    calibrated."""
    scaling: ScalingName = "none"
    """Scaling between a layer's inputs and its weights before quantization: ``awq`` for weights in
    blocks, ``smoothquant`` for ``int8`` and fixed point. Both are calibrated. ``rotation``, of the
    decoder: its residual stream is rotated, in the prefill graph and in the head too, which needs
    no data (export/quantize/rotation.py)."""
    block_size: int = 32
    """Weights that share a scale in ``q8``, ``q4`` and ``q2``."""
    symmetric: bool = True
    """Without, each of those blocks has a zero point too."""
    activations: Literal["token", "tensor"] = "token"
    """Extent of one scale of the 8-bit activations of ``int8``: one token, or the whole tensor."""
    weight_bits: Literal["auto", 7, 8] = "auto"
    """Bits of ``int8`` and ``qdq8`` weights: 7 where sums of products saturate (x86 without VNNI),
    8 elsewhere. ``auto``: as the exporting machine needs it; until that is settled 7, which is
    right everywhere."""
    calibrator: CalibratorName = "minmax"
    """Method that chooses the ranges of activations in fixed point: all values on the calibration
    data, all but the outermost hundred-thousandth, or those that keep most of the distribution."""

    @property
    def is_calibrated(self) -> bool:
        return self.needs_reference or self.precision in QDQ

    @property
    def needs_reference(self) -> bool:
        """Return whether calibration runs the float32 model."""
        return self.quantizer == "gptq" or self.has_factors

    @property
    def has_factors(self) -> bool:
        """Return whether factors of single channels move, which calibration chooses."""
        return self.scaling in ("awq", "smoothquant")

    def without_data(self) -> LinearFormat:
        """Return the format of layers that are rounded without calibration."""
        scaling = "none" if self.has_factors else self.scaling
        quantizer = "mse" if self.quantizer == "gptq" else self.quantizer
        return replace(self, quantizer=quantizer, scaling=scaling)

    @property
    def int8_weight_bits(self) -> int:
        """7 or 8 of weights that meet 8-bit activations, else 0."""
        if self.precision not in HALVED:
            return 0
        return 8 if self.weight_bits == 8 else 7

    @property
    def scheme(self) -> Scheme | None:
        """The integers that stand for weights; none for floats."""
        if self.precision == "int8" or self.precision in QDQ:
            return Scheme(8, None, half_range=self.int8_weight_bits == 7)
        if self.precision in BLOCK_BITS:
            return Scheme(BLOCK_BITS[self.precision], self.block_size, self.symmetric)
        return None


@dataclass(frozen=True)
class Limits:
    """Largest losses against the float32 reference; the export fails beyond them."""

    vision_relative_error: float
    """Error of the visual tokens, as a ratio of Euclidean norms."""
    decoder_kl: float
    """Mean Kullback–Leibler divergence of the next-token distributions, in nats."""
    vision_cosine: float | None = None
    """Least cosine of a visual token."""
    top1_agreement: float | None = None
    """Least share of positions where the likeliest token is the reference's."""
    perplexity_ratio: float | None = None
    """Perplexity of the samples' answers, over the reference's."""
    greedy_match: float | None = None
    """Least mean share of a greedy answer before it leaves the reference's."""
    accuracy_loss: float | None = None
    """Share of a suite's questions that the reference answers right, less the bundle's."""
    prefill_kl: float | None = None
    """As ``decoder_kl``, of the prefill graph."""


@dataclass(frozen=True)
class Recipe:
    """Precisions of one export."""

    name: str
    tower: LinearFormat
    """Linear layers of the vision tower; its convolution and norms stay float."""
    projector: LinearFormat
    decoder: LinearFormat
    lm_head: LinearFormat
    embeddings: Literal["fp32", "fp16"]
    limits: Limits
    kv_cache: KVCache = "fp32"
    """How the ONNX decoder stores keys and values: in ``int8`` each channel of each head has a
    scale, measured on calibration data (export/finish/kv_cache.py)."""
    prefill: LinearFormat | None = None
    """The decoder's linear layers and the head in a second graph that computes prompts; none: one
    graph does both."""
    prefill_layers: dict[str, LinearFormat] = dataclasses.field(default_factory=dict)
    """As ``layers``, of the decoder in that graph."""
    layers: dict[str, LinearFormat] = dataclasses.field(default_factory=dict)
    """Formats of single layers instead of their part's: by canonical name, which covers the layers
    that are one product with it too, or by a pattern with ``*`` (export/recipes/layer_formats.py).
    GGUF files have one type for all."""
    experts: Literal["fused", "plain", "dense"] = "fused"
    """Sparse experts as one operator of ONNX Runtime, as standard operators around each, or all of
    them on every token (export/graph/experts.py)."""
    chunk_length: int = 64
    """Positions that a graph for NPUs takes of a prompt at once."""
    context_length: int = 1024
    """Positions that it has room for, where the model's own context is not shorter."""
    layer_norm: Literal["fused", "centred"] = dataclasses.field(
        default="fused", metadata={"formerly_said": {"spelled": "fused"}}
    )
    """Layer norms of graphs for NPUs: one operator, or a root-mean-square norm of what is left when
    the mean is taken away, for chips that lack the first."""
    operators: Literal["runtime", "elementary"] = "runtime"
    """Operators of the vision stage in float, and of all float graphs with fixed shapes: those that
    are fastest in ONNX Runtime on CPUs, or those that mobile accelerators run too
    (docs/how-to/mobile.md)."""
    calibration: str = OWN
    """Data for calibrated methods: ``own`` answers of the model, drawn ``scenes``, or a JSONL file
    (export/calibration/samples.py)."""
    gguf: GGUFType | None = None
    """Type of the GGUF decoder; by default what is nearest to ``decoder``."""
    gguf_mmproj: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Type of the GGUF tower and projector; by default ``f32`` for ``fp32``, else ``f16``."""
    gguf_imatrix: str | None = None
    """Importance matrix for rounding the GGUF decoder: a file of llama.cpp's format."""
    gguf_calibration: str | None = None
    """Data to collect one from, as of ``calibration``."""

    def for_manifest(self) -> Recipe:
        """Return the recipe with files by their names only, since folders say nothing elsewhere."""
        files = {
            name: value and Path(value).name
            for name in ("calibration", "gguf_imatrix", "gguf_calibration")
            if isinstance(value := getattr(self, name), str)
        }
        return replace(self, **files)  # type: ignore[arg-type]

    @property
    def is_calibrated(self) -> bool:
        """Return whether a method of the ONNX artifacts needs data."""
        return self.decoder_is_calibrated or any(
            layers.is_calibrated for layers in self._vision_formats
        )

    @property
    def decoder_is_calibrated(self) -> bool:
        """Return whether a method of the ONNX decoder needs text, the model's own or given."""
        if self.kv_cache != "fp32":
            return True
        prefill = () if self.prefill is None else (self.prefill, *self.prefill_layers.values())
        layers = (item for name, item in self.layers.items() if _is_decoder(name))
        return any(item.is_calibrated for item in (self.decoder, self.lm_head, *prefill, *layers))

    @property
    def _vision_formats(self) -> tuple[LinearFormat, ...]:
        """Formats of tower and projector."""
        layers = (item for name, item in self.layers.items() if not _is_decoder(name))
        return self.tower, self.projector, *layers

    @property
    def _formats(self) -> tuple[LinearFormat, ...]:
        """All that the ONNX artifacts are made in."""
        prefill = () if self.prefill is None else (self.prefill, *self.prefill_layers.values())
        parts = self.tower, self.projector, self.decoder, self.lm_head
        return *parts, *prefill, *self.layers.values()

    def for_prefill(self) -> Recipe:
        """Return what the second graph of the decoder is made by. Each of its experts multiplies
        the tokens that chose it, since the operator for all of them has no 8-bit activations."""
        assert self.prefill is not None
        tower = {name: item for name, item in self.layers.items() if not _is_decoder(name)}
        decoder = replace(self.prefill, scaling="rotation") if self.is_rotated else self.prefill
        layers = {**tower, **self.prefill_layers}
        return replace(
            self,
            decoder=decoder,
            lm_head=self.prefill,
            layers=layers,
            experts="plain",
            prefill=None,
            prefill_layers={},
        )

    @property
    def is_for_npu(self) -> bool:
        """True if all parts are in fixed point; a decoder in fixed point is only for NPUs."""
        parts = self.tower, self.projector, self.decoder, self.lm_head
        return all(layers.precision in QDQ for layers in parts)

    @property
    def is_rotated(self) -> bool:
        """Return whether the residual stream of the ONNX decoder is rotated, in all its graphs."""
        return self.decoder.scaling == "rotation"

    def without_rotation(self) -> Recipe:
        """Return the recipe for graphs that have none."""
        if not self.is_rotated:
            return self
        return replace(self, decoder=replace(self.decoder, scaling="none"))

    @property
    def is_float(self) -> bool:
        """True if all linear layers are float32."""
        return all(layers.precision == "fp32" for layers in self._formats)

    @property
    def elementary(self) -> bool:
        """See ``operators``."""
        return self.operators == "elementary"

    def format_of(self, name: str) -> LinearFormat:
        """The format of the linear layer with this canonical name. Patterns have no effect here:
        :func:`mobilevlm.export.recipes.layer_formats.expand_layers` comes before."""
        if name in self.layers:
            return self.layers[name]
        part, _, rest = name.partition(".")
        if part == "decoder":
            return self.lm_head if rest.startswith("lm_head") else self.decoder
        return self.tower if part in ("vision", "audio") else self.projector

    @property
    def has_int8(self) -> bool:
        """True if a layer is multiplied with 8-bit activations."""
        return any(layers.int8_weight_bits for layers in self._formats)

    @property
    def needs_reference(self) -> bool:
        """Return whether a calibrated method of the ONNX artifacts runs the float32 model."""
        return any(layers.needs_reference for layers in self._formats)

    def with_weight_bits(self, bits: WeightBits, *, auto_only: bool) -> Recipe:
        """With these bits of weights that meet 8-bit activations, or only where they are
        ``auto``."""

        def settled(layers: LinearFormat) -> LinearFormat:
            if not layers.int8_weight_bits or (auto_only and layers.weight_bits != "auto"):
                return layers
            return replace(layers, weight_bits=bits)

        return replace(
            self,
            tower=settled(self.tower),
            projector=settled(self.projector),
            decoder=settled(self.decoder),
            lm_head=settled(self.lm_head),
            prefill=self.prefill and settled(self.prefill),
            layers={name: settled(layers) for name, layers in self.layers.items()},
            prefill_layers={name: settled(layers) for name, layers in self.prefill_layers.items()},
        )

    @property
    def gguf_type(self) -> GGUFType:
        return self.gguf or _GGUF_TYPES[self.decoder.precision]

    @property
    def mmproj_type(self) -> GGUFType:
        return self.gguf_mmproj or ("f32" if self.tower.precision == "fp32" else "f16")


def _is_decoder(name: str) -> bool:
    """Return whether a layer's name, or a role such as ``@down_proj``, is the decoder's."""
    return name.startswith(("decoder.", "@")) and not name.startswith("@tower_")
