"""Recipes: which precision each part of a model is exported in, and how far it may drift.

A recipe is named (``int4``) or read from a TOML file with the same fields as the dataclass; a part
or layer that is a text there (``decoder = "q4"``) means that precision with everything else left as
it is.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mobilevlm.errors import MobileVLMError
from mobilevlm.export.quantize.blocks import Scheme
from mobilevlm.regular_file import read_regular
from mobilevlm.spec import GGUFType, KVCache, from_dict

Precision: TypeAlias = Literal["fp32", "fp16", "int8", "q8", "q4", "q2", "qdq8", "qdq16"]
"""How the weights of a linear layer are stored and multiplied.

``fp32``, ``fp16``: float; ``int8``: 8-bit weights, activations quantized while running;
``q8``, ``q4``, ``q2``: 8-, 4- or 2-bit weights in blocks (MatMulNBits, which has no 3-bit kernel);
``qdq8``, ``qdq16``: a whole stage in fixed point, 8-bit weights and 8- or 16-bit activations whose
scales are constants (export/fixed_shapes/vision.py); the decoder only in graphs for NPUs
(export/fixed_shapes/decoder.py).
"""

QuantizerName: TypeAlias = Literal["rtn", "hqq", "gptq"]
ScalingName: TypeAlias = Literal["none", "awq", "smoothquant"]
CalibratorName: TypeAlias = Literal["minmax", "percentile", "entropy"]
WeightBits: TypeAlias = Literal[7, 8]

QDQ: tuple[Precision, ...] = ("qdq8", "qdq16")
"""Precisions of fixed-point graphs: QuantizeLinear and DequantizeLinear around every operator."""

BLOCK_BITS: dict[Precision, int] = {"q8": 8, "q4": 4, "q2": 2}
"""Bits of the precisions whose weights are in blocks."""
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Blocks that MatMulNBits takes at every bit width."""

_GGUF_TYPES: dict[Precision, GGUFType] = {
    "fp32": "f32",
    "fp16": "f16",
    "int8": "q8_0",
    "q8": "q8_0",
    "q4": "q4_0",
    "q2": "q4_0",
    "qdq8": "q8_0",
    "qdq16": "q8_0",
}


_USES: dict[str, tuple[Precision, ...]] = {
    "quantizer": ("int8", *BLOCK_BITS),
    "block_size": tuple(BLOCK_BITS),
    "symmetric": tuple(BLOCK_BITS),
    "activations": ("int8",),
    "weight_bits": ("int8", "qdq8"),
    "calibrator": QDQ,
}
"""Precisions that a setting has a meaning for."""
_SCALED: dict[ScalingName, tuple[Precision, ...]] = {
    "awq": tuple(BLOCK_BITS),
    "smoothquant": ("int8", *QDQ),
}
MOST_FILE = 1 << 24
"""Bytes of a recipe file"""
PARTS = ("tower", "projector", "decoder", "lm_head")
"""Parts of a model whose linear layers have a format of their own."""
PREFILL = "prefill"
"""The decoder's layers once more, for prompts."""


@dataclass(frozen=True)
class LinearFormat:
    """How the linear layers of one part of a model are stored."""

    precision: Precision
    quantizer: QuantizerName = "rtn"
    """What chooses the integers: ``rtn`` and ``hqq`` need no data, ``gptq`` is calibrated."""
    scaling: ScalingName = "none"
    """What moves between a layer's inputs and its weights before: ``awq`` for weights in blocks,
    ``smoothquant`` for ``int8`` and fixed point. Both are calibrated."""
    block_size: int = 32
    """Weights that share a scale in ``q8``, ``q4`` and ``q2``."""
    symmetric: bool = True
    """Without, each of those blocks has a zero point too."""
    activations: Literal["token", "tensor"] = "token"
    """What shares a scale of the 8-bit activations of ``int8``: each token by itself, or all."""
    weight_bits: Literal["auto", 7, 8] = "auto"
    """Of ``int8`` and ``qdq8``: 7 where sums of products saturate (x86 without VNNI), 8 elsewhere.
    ``auto``: as the exporting machine needs it; until that is settled 7, which is right
    everywhere."""
    calibrator: CalibratorName = "minmax"
    """What chooses the ranges of activations in fixed point: all values on the calibration data,
    all but the outermost hundred-thousandth, or those that keep most of the distribution."""

    @property
    def is_calibrated(self) -> bool:
        return self.needs_reference or self.precision in QDQ

    @property
    def needs_reference(self) -> bool:
        """Whether calibration runs the float32 reference, which takes torch."""
        return self.quantizer == "gptq" or self.scaling != "none"

    @property
    def int8_weight_bits(self) -> int:
        """7 or 8 of weights that meet 8-bit activations, else 0."""
        if self.precision not in _USES["weight_bits"]:
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
    """What an artifact may lose against the float32 reference before the export fails."""

    vision_relative_error: float
    """Of the visual tokens, as a ratio of Euclidean norms."""
    decoder_kl: float
    """Mean Kullback–Leibler divergence of the next-token distributions, in nats."""
    vision_cosine: float | None = None
    """Least cosine of a visual token."""
    top1_agreement: float | None = None
    """Least share of positions where the likeliest token is the reference's."""
    perplexity_ratio: float | None = None
    """Of the samples' answers, over the reference's."""
    greedy_match: float | None = None
    """Least mean share of a greedy answer before it leaves the reference's."""
    accuracy_loss: float | None = None
    """Share of a suite's questions that the reference answers right, less the bundle's."""
    prefill_kl: float | None = None
    """As ``decoder_kl``, of the graph for prompts."""


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
    graph does both. It has no single ``layers`` of other formats."""
    layers: dict[str, LinearFormat] = dataclasses.field(default_factory=dict)
    """Of single layers instead of their part's: by canonical name, which stands for the layers that
    are one product with it too, or by a pattern with ``*`` (export/recipes/layer_formats.py). GGUF
    files have one type for all."""
    experts: Literal["fused", "plain", "dense"] = "fused"
    """Sparse experts as one operator of ONNX Runtime, as standard operators around each, or all of
    them on every token (export/graph/experts.py)."""
    chunk_length: int = 64
    """Positions that a graph for NPUs takes of a prompt at once."""
    context_length: int = 1024
    """Positions that it has room for, where the model's own context is not shorter."""
    layer_norm: Literal["fused", "centred", "spelled"] = "fused"
    """Layer norms of graphs for NPUs: one operator, or a root-mean-square norm of what is left when
    the mean is taken away, for chips that lack the first, or mean, square and root one by one."""
    operators: Literal["runtime", "elementary"] = "runtime"
    """Of the vision stage in float, and of all float graphs with fixed shapes: what ONNX Runtime's
    processors like best, or those that mobile accelerators take too (docs/mobile.md)."""
    calibration: str = "scenes"
    """Data for calibrated methods: ``scenes``, or a JSONL file (export/calibration/samples.py)."""
    gguf: GGUFType | None = None
    """Type of the GGUF decoder; by default what is nearest to ``decoder``."""
    gguf_mmproj: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Type of the GGUF tower and projector; by default ``f32`` for ``fp32``, else ``f16``."""
    gguf_imatrix: str | None = None
    """Importance matrix for rounding the GGUF decoder: a file of llama.cpp's format."""
    gguf_calibration: str | None = None
    """Data to collect one from: ``scenes``, or a JSONL file (export/calibration/samples.py)."""

    def for_manifest(self) -> dict[str, Any]:
        """All fields; of files only their names, since folders say nothing elsewhere."""
        fields = asdict(self)
        for name in ("calibration", "gguf_imatrix", "gguf_calibration"):
            fields[name] = fields[name] and Path(fields[name]).name
        return fields

    @property
    def is_calibrated(self) -> bool:
        """Whether a method of the ONNX artifacts needs data."""
        return self.kv_cache != "fp32" or any(layers.is_calibrated for layers in self._formats)

    @property
    def _formats(self) -> tuple[LinearFormat, ...]:
        """All that the ONNX artifacts are made in."""
        prefill = () if self.prefill is None else (self.prefill,)
        parts = self.tower, self.projector, self.decoder, self.lm_head
        return *parts, *prefill, *self.layers.values()

    def for_prefill(self) -> Recipe:
        """What the second graph of the decoder is made by. Each of its experts multiplies the
        tokens that chose it, since the operator for all of them has no 8-bit activations."""
        assert self.prefill is not None
        tower = {name: item for name, item in self.layers.items() if not _is_decoder(name)}
        formats = {"decoder": self.prefill, "lm_head": self.prefill, "layers": tower}
        return replace(self, **formats, experts="plain", prefill=None)  # type: ignore[arg-type]

    @property
    def is_for_npu(self) -> bool:
        """Whether all of it is in fixed point, which the decoder is only for NPUs."""
        parts = self.tower, self.projector, self.decoder, self.lm_head
        return all(layers.precision in QDQ for layers in parts)

    @property
    def is_float(self) -> bool:
        """Whether all linear layers are float32."""
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
        return self.tower if part == "vision" else self.projector

    @property
    def has_int8(self) -> bool:
        """Whether a layer is multiplied with 8-bit activations."""
        return any(layers.int8_weight_bits for layers in self._formats)

    @property
    def needs_reference(self) -> bool:
        """Whether a calibrated method of the ONNX artifacts takes torch."""
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
        )

    @property
    def gguf_type(self) -> GGUFType:
        return self.gguf or _GGUF_TYPES[self.decoder.precision]

    @property
    def mmproj_type(self) -> GGUFType:
        return self.gguf_mmproj or ("f32" if self.tower.precision == "fp32" else "f16")


def _uniform(
    name: str,
    vision: Precision,
    decoder: Precision,
    embeddings: Literal["fp32", "fp16"],
    limits: Limits,
) -> Recipe:
    tower, layers = LinearFormat(vision), LinearFormat(decoder)
    return Recipe(name, tower, tower, layers, layers, embeddings, limits)


def _is_decoder(name: str) -> bool:
    """Of a layer's canonical name."""
    return name.startswith("decoder.")


def _limits(vision: float, kl: float, perplexity: float, accuracy: float) -> Limits:
    """The first two are wide enough for random weights, which quantize worse than any trained
    model (with experts in 4 bits a KL of 0.52): they find a broken artifact. The others are for
    answers that mean something: int8 may cost half a point of accuracy and int4 one, and nano loses
    less than a tenth of the perplexity that is allowed here (docs/quality.md)."""
    return Limits(vision, kl, perplexity_ratio=perplexity, accuracy_loss=accuracy)


def _int4() -> Recipe:
    """Blocks of 128, since a token's time is that of reading weights: with blocks of 32 and
    onnxruntime's scale and sum in float32 for each, it reads a third more. HQQ makes up for the
    larger blocks (benchmarks/RESULTS.md)."""
    layers = LinearFormat("q4", "hqq", block_size=128)
    base = _uniform("int4", "int8", "q4", "fp16", _limits(0.15, 0.6, 1.1, 0.01))
    return replace(base, decoder=layers, lm_head=layers)


_INT4 = _int4()
_INT8 = _uniform("int8", "int8", "int8", "fp16", _limits(0.15, 0.1, 1.05, 0.005))
_CALIBRATED = LinearFormat("int8", "gptq", "smoothquant")

RECIPES = {
    recipe.name: recipe
    for recipe in (
        _uniform("fp32", "fp32", "fp32", "fp32", _limits(1e-4, 1e-6, 1.001, 0.001)),
        _uniform("fp16-weights", "fp16", "fp16", "fp16", _limits(5e-3, 1e-4, 1.01, 0.002)),
        _INT8,
        replace(
            _INT8,
            name="int8-calibrated",
            tower=_CALIBRATED,
            projector=replace(_CALIBRATED, scaling="none"),
            decoder=_CALIBRATED,
            lm_head=_CALIBRATED,
            # Sharp attention turns the rounding of queries and keys into other answers.
            layers={"vision.layers.*.attn.q_proj": LinearFormat("fp16")},
        ),
        _INT4,
        replace(
            _INT4,
            name="fast",
            prefill=LinearFormat("int8"),
            limits=replace(_INT4.limits, prefill_kl=0.1),
        ),
        _uniform("a16w8", "qdq16", "qdq16", "fp16", _limits(0.15, 0.2, 1.1, 0.015)),
        _uniform("a8w8", "qdq8", "qdq8", "fp16", _limits(0.5, 1.5, 2.0, 0.2)),
    )
}


def find_recipe(name: str) -> Recipe:
    """A recipe by its name, or from a ``.toml`` file.

    Raises:
        MobileVLMError: no such recipe, or the file's fields are wrong.
    """
    return _find_recipe(name, ())


def _find_recipe(name: str, extending: tuple[Path, ...]) -> Recipe:
    """``extending``: the files that lead here."""
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix != ".toml":
        raise MobileVLMError(
            f"recipe {name!r} is not known: expected {', '.join(RECIPES)}, or a .toml file"
        )
    try:
        data = tomllib.loads(read_regular(path, MOST_FILE).decode("utf-8"))
    except FileNotFoundError:
        raise MobileVLMError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MobileVLMError(f"{path}: not a TOML recipe: {error}") from None
    for part in (*PARTS, PREFILL):
        data |= _spelled_out(data, part)
    layers = data.get("layers")
    if isinstance(layers, dict):
        for key in layers:
            layers |= _spelled_out(layers, key)
    # What it names lies beside it.
    for key in ("gguf_imatrix", "gguf_calibration", "calibration"):
        if isinstance(data.get(key), str) and (key == "gguf_imatrix" or data[key] != "scenes"):
            data[key] = str(path.parent / data[key])
    if "extends" in data:
        data = _extended(data, path, (*extending, path.resolve()))
    recipe = from_dict(
        Recipe, {**data, "name": data.get("name", path.stem)}, str(path), strict=True
    )
    for part in PARTS:
        _check(getattr(recipe, part), f"{path}.{part}")
    if recipe.prefill is not None:
        _check(recipe.prefill, f"{path}.{PREFILL}")
    for key, single in recipe.layers.items():
        _check(single, f"{path}.layers.{key}")
    _check_fixed_point(recipe, str(path))
    if recipe.projector.scaling != "none":
        raise MobileVLMError(
            f"{path}.projector.scaling: nothing before its layers takes the factors: leave it out"
        )
    return recipe


def _extended(data: dict[str, Any], path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """Return a recipe file's data with what it leaves out as in the recipe that it extends.
    ``limits`` and ``layers`` are merged, layers of the file after the others (of patterns the last
    counts). A part with a precision is a new one; without, it changes the other's settings."""
    base = data.pop("extends")
    if not isinstance(base, str):
        raise MobileVLMError(
            f"{path}.extends: expected a recipe's name or file, found {base!r:.60}"
        )
    if base not in RECIPES:
        base = str(path.parent / base)
        if Path(base).resolve() in extending:
            raise MobileVLMError(f"{path}.extends: {base} extends itself: name another recipe")
    merged: dict[str, Any] = asdict(_find_recipe(base, extending))
    del merged["name"]
    for key, value in data.items():
        old = merged.get(key)
        if not (isinstance(value, dict) and isinstance(old, dict)):
            merged[key] = value
        elif key == "layers":
            kept = {name: layer for name, layer in old.items() if name not in value}
            merged[key] = {**kept, **value}
        else:
            is_new = key != "limits" and "precision" in value
            merged[key] = value if is_new else {**old, **value}
    return merged


def _spelled_out(table: dict[str, Any], key: str) -> dict[str, Any]:
    """The entry with a precision for a text; empty where it is no text."""
    return {key: {"precision": table[key]}} if isinstance(table.get(key), str) else {}


def _check_fixed_point(recipe: Recipe, where: str) -> None:
    """Fixed point is for whole graphs: tower and projector, decoder and head. That the recipe's
    ``layers`` leave them alone is known when patterns are expanded
    (export/recipes/layer_formats.py)."""
    if recipe.prefill is not None and recipe.prefill.precision in QDQ:
        raise MobileVLMError(
            f"{where}.{PREFILL}.precision: {recipe.prefill.precision} is for the tower and the "
            f"projector, or for all parts of a model for NPUs"
        )
    for key, layers in recipe.layers.items():
        if layers.precision in QDQ:
            raise MobileVLMError(
                f"{where}.layers.{key}.precision: {layers.precision} is for whole graphs (tower "
                f"and projector, decoder and lm_head), not for single layers"
            )
    for first, second in (("tower", "projector"), ("decoder", "lm_head")):
        ours, theirs = getattr(recipe, first), getattr(recipe, second)
        if {ours.precision, theirs.precision} & set(QDQ) and theirs != replace(
            ours, scaling="none"
        ):
            raise MobileVLMError(
                f"{where}.{second}: {first} and {second} are one graph, which is in fixed point as "
                f"a whole: give {second} the settings of {first}, except scaling"
            )


def _check(layers: LinearFormat, where: str) -> None:
    """Refuses settings that the precision has no use for, so that none is silently ignored."""
    precision = layers.precision
    if layers.block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise MobileVLMError(f"{where}.block_size: {layers.block_size}, expected one of {sizes}")
    plain = LinearFormat(precision)
    for field, kinds in _USES.items():
        if getattr(layers, field) != getattr(plain, field) and precision not in kinds:
            raise MobileVLMError(
                f"{where}.{field}: {precision} has none: it goes with {', '.join(kinds)}"
            )
    if layers.scaling != "none" and precision not in _SCALED[layers.scaling]:
        raise MobileVLMError(
            f"{where}.scaling: {layers.scaling} goes with {', '.join(_SCALED[layers.scaling])}, "
            f"not with {precision}"
        )
