"""Architectures of GGUF decoders: the one of llama.cpp that a DecoderSpec is, or one of our own.

Source of what llama.cpp's have: ggml-org/llama.cpp, src/models, llama.cpp, qwen2.cpp, qwen3.cpp,
qwen2vl.cpp, qwen3vl.cpp, qwen35.cpp, gemma2.cpp, gemma3.cpp and lfm2.cpp.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import MobileVLMError

OWN = "mobilevlm"
OWN_PREFIX = "moe-llava-"
"""Begins the names of architectures for sparse experts in known backbones."""

_BACKBONES = {
    ("rms", False, False): "llama",
    ("rms", True, False): "qwen",
    ("layer", False, False): "stablelm",
    ("layer", True, False): "stablelm",
    ("layer", True, True): "phi2",
}
"""Names of backbones with experts by kind of norm, biases of query, key and value, and parallel
residual."""


@dataclass(frozen=True)
class Stock:
    """An architecture of llama.cpp, by the fields in which its decoders differ from the defaults of
    a DecoderSpec."""

    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


_SLIDING = {"sliding_window", "sliding_layers", "sliding_rope_theta"}
_GEMMA = {"hidden_act", "embed_scale", "post_norms"}
STOCK: dict[str, Stock] = {
    "llama": Stock(),
    "qwen2": Stock(frozenset({"qkv_bias"}), frozenset({"lm_head_bias"})),
    "qwen3": Stock(frozenset({"qk_norm"})),
    "qwen2vl": Stock(frozenset({"qkv_bias", "rope_sections"}), frozenset({"lm_head_bias"})),
    "qwen3vl": Stock(
        frozenset({"qk_norm", "rope_sections", "rope_interleaved"}), frozenset({"deep_layers"})
    ),
    "qwen35": Stock(
        frozenset(
            {
                "qk_norm",
                "rope_sections",
                "rope_interleaved",
                "rotary_dim",
                "attention_gate",
                "delta",
            }
        )
    ),
    "lfm2": Stock(frozenset({"qk_norm", "conv_layers", "conv_kernel"})),
    "gemma2": Stock(
        frozenset(
            {*_GEMMA, "sliding_window", "sliding_layers", "attention_softcap", "logit_softcap"}
        ),
        frozenset({"sliding_rope_theta", "attention_scale"}),
    ),
    "gemma3": Stock(
        frozenset({*_GEMMA, "qk_norm"}),
        frozenset({*_SLIDING, "attention_scale", "logit_softcap", "image_blocks"}),
    ),
}
OURS = frozenset(
    {
        "norm", "rotary_dim", "attention_scale", "qkv_bias", "o_bias", "mlp", "hidden_act",
        "mlp_bias", "parallel_residual", "lm_head_bias", "experts", "embed_scale", "qk_norm",
        "post_norms", "attention_softcap", "logit_softcap", *_SLIDING,
    }
)  # fmt: skip
"""Fields that decoders of our own architectures may set: what the engine ``ggml`` computes."""

PATTERNS = {"gemma2": 2, "gemma3": 6}
"""Architectures with sliding windows: all layers but each so-manieth slide, unless the file says
otherwise."""
SOFTCAPS = {"gemma2": (50.0, 30.0), "gemma3": (None, None)}
"""Soft caps of attention scores and logits where the file has none."""
_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, by which llama.cpp tells that their attention scale is another one."""


def gguf_architecture(spec: DecoderSpec) -> str:
    """Return ``general.architecture`` of a decoder: one that llama.cpp runs, else one of our own.

    Raises:
        MobileVLMError: there is none; names the part that none has.
    """
    fields = _fields(spec)
    for name, stock in STOCK.items():
        if stock.required <= fields <= stock.required | stock.optional and _fits(name, spec):
            return name
    if spec.layer_input_size:
        raise MobileVLMError(
            "GGUF files of decoders with per-layer embeddings are not written yet: use --format "
            "onnx"
        )
    if spec.sound_rank:
        raise MobileVLMError(
            "a GGUF decoder has no products that act where a prompt has sound (Granite Speech's "
            "adapter): use --format onnx"
        )
    if strange := sorted(fields - OURS):
        raise MobileVLMError(
            f"the GGUF writer knows no architecture for this decoder: none has its {strange[0]}: "
            f"use --format onnx"
        )
    backbone = _BACKBONES.get((spec.norm, spec.qkv_bias, spec.parallel_residual))
    return OWN if spec.experts is None or backbone is None else OWN_PREFIX + backbone


def is_own(architecture: str) -> bool:
    """Return whether only our engine ``ggml`` runs files of this architecture."""
    return architecture == OWN or architecture.startswith(OWN_PREFIX)


def needs_own_engine(spec: DecoderSpec) -> bool:
    """Return whether a GGUF file of this decoder is for our engine ``ggml`` alone."""
    try:
        return is_own(gguf_architecture(spec))
    except MobileVLMError:
        return False


def has_neighbouring_pairs(architecture: str) -> bool:
    """Return whether rotary pairs are channels side by side, and not half a head apart as in
    checkpoints: rows of query and key projections are in another order then."""
    return architecture == "llama"


def embed_scale(architecture: str, hidden_size: int) -> float:
    """Return the factor of embedding rows, which llama.cpp itself applies to tokens."""
    return math.sqrt(hidden_size) if architecture in PATTERNS else 1.0


def scales_rows(architecture: str) -> bool:
    """Return whether llama.cpp multiplies rows that it is given in place of tokens, too."""
    return architecture == "gemma2"


def attention_scale(architecture: str, sizes: DecoderSpec) -> float | None:
    """Return llama.cpp's attention scale where it is not ``1 / sqrt(head_dim)``."""
    if sizes.num_hidden_layers != _LARGEST.get(architecture):
        return None
    return float((sizes.hidden_size // sizes.num_attention_heads) ** -0.5)


def delta_interval(spec: DecoderSpec) -> int:
    """Return the number n for which every n-th layer has attention and all others are gated delta
    layers; 0 where there is none."""
    layers = range(spec.num_hidden_layers)
    first = next((layer for layer in layers if spec.mixer(layer) == "attn"), -1) + 1
    is_regular = all((spec.mixer(layer) == "attn") == ((layer + 1) % first == 0) for layer in layers
                     if first)  # fmt: skip
    return first if is_regular else 0


def _fields(spec: DecoderSpec) -> frozenset[str]:
    """Return the names of fields that are not as in Llama."""
    neutral: dict[str, Any] = {"rotary_dim": spec.head_dim, "attention_scale": spec.head_dim**-0.5}
    return frozenset(
        field.name
        for field in dataclasses.fields(spec)
        if field.default is not dataclasses.MISSING
        and getattr(spec, field.name) not in (field.default, neutral.get(field.name, field.default))
    )


def _fits(architecture: str, spec: DecoderSpec) -> bool:
    """Return whether the fields of a decoder have the values that llama.cpp computes with."""
    if spec.deep_layers != tuple(range(len(spec.deep_layers))):
        return False  # llama.cpp adds rows after the first layers
    if architecture in ("qwen2", "qwen2vl", "lfm2"):
        return spec.num_attention_heads * spec.head_dim == spec.hidden_size
    if spec.delta is not None:
        interval = delta_interval(spec)
        return interval > 0 and spec.delta.key_dim == spec.delta.value_dim
    if architecture not in PATTERNS:
        return True
    is_gemma_2 = architecture == "gemma2"
    if spec.rope_scaling != 1.0 and spec.sliding_layers:
        # Gemma 2's sliding layers scale positions as the others do, Gemma 3's never.
        rotates = (spec.sliding_rope_theta is None) == is_gemma_2
    else:
        rotates = True
    scales = (
        (spec.score_scale, attention_scale(architecture, spec) or spec.head_dim**-0.5),
        (spec.embed_scale, embed_scale(architecture, spec.hidden_size)),
    )
    return (
        rotates
        and spec.hidden_act == "gelu_new"
        and (spec.tie_word_embeddings or not is_gemma_2)
        and all(math.isclose(*pair, rel_tol=1e-6) for pair in scales)
    )
