"""What a GGUF file says about its decoder, as a DecoderSpec."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.gguf.file import GgufFile
from mobilevlm.gguf.keys import check_keys
from mobilevlm.gguf.names import OWN_PREFIX, decoder_entries, gguf_architecture, is_own
from mobilevlm.spec import DecoderSpec, ExpertsSpec, from_dict, to_dict

T = TypeVar("T", bool, int, float, str)

EXPERT_COUNTS = "expert_counts"
"""Of each layer, 0 where it is dense. This and the next are keys of our own architectures, each
behind the architecture's name."""

OWN_FLAGS = {
    "attention.qkv_bias": "qkv_bias",
    "attention.output_bias": "o_bias",
    "feed_forward.bias": "mlp_bias",
    "output_bias": "lm_head_bias",
    "use_parallel_residual": "parallel_residual",
}
OWN_KINDS = {"feed_forward.kind": "mlp", "hidden_activation": "hidden_act"}
"""The field of the spec that each is."""
_LIMIT = 1 << 31
"""No number of a model is as large."""


def decoder_spec(file: GgufFile) -> DecoderSpec:
    """The spec of a dense ``llama`` decoder, or of one of our own architectures.

    Raises:
        BundleError: another architecture, or a key is missing or of the wrong kind.
    """
    if is_own(file.architecture):
        check_keys(file, "own decoder")
        return _with_experts(file, _shared(file))
    if file.architecture != "llama":
        raise BundleError(
            f"{file.path}: architecture {file.architecture!r:.60}, expected 'llama' or one that "
            f"begins with {OWN_PREFIX!r}"
        )
    if file.metadata.get("llama.expert_count"):
        raise BundleError(f"{file.path}: a decoder with experts, expected a dense one")
    check_keys(file, "decoder")
    spec = _shared(file)
    if _value(file, "rope.dimension_count", int, spec.head_dim) != spec.head_dim:
        raise BundleError(f"{file.path}: rope.dimension_count is not the size of a head")
    return spec


def _shared(file: GgufFile) -> DecoderSpec:
    """What all architectures say in the same words."""
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is None:
        raise BundleError(f"{file.path}: tensor 'token_embd.weight' is missing")
    hidden = _value(file, "embedding_length", int)
    heads = _value(file, "attention.head_count", int)
    if hidden % heads:
        raise BundleError(f"{file.path}: {heads} heads do not divide {hidden} channels")
    shared = _value(file, "attention.head_count_kv", int, heads)
    if heads % shared:
        raise BundleError(f"{file.path}: {heads} heads do not divide by {shared} of keys")
    head_dim = _value(file, "attention.key_length", int, hidden // heads)
    if head_dim % 2:
        raise BundleError(f"{file.path}: heads of {head_dim} channels, expected an even number")
    norm: Literal["rms", "layer"] = "rms"
    eps = "attention.layer_norm_rms_epsilon"
    if f"{file.architecture}.{eps}" not in file.metadata and is_own(file.architecture):
        eps, norm = "attention.layer_norm_epsilon", "layer"
    return DecoderSpec(
        vocab_size=embeddings.shape[0],
        hidden_size=hidden,
        intermediate_size=_value(file, "feed_forward_length", int),
        num_hidden_layers=_value(file, "block_count", int),
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=head_dim,
        norm_eps=_value(file, eps, float),
        norm=norm,
        rope_theta=_value(file, "rope.freq_base", float, 10000.0),
        rope_scaling=_rope_scaling(file),
        context_length=_value(file, "context_length", int),
        tie_word_embeddings="output.weight" not in file.tensors,
    )


def _rope_scaling(file: GgufFile) -> float:
    """Return the factor of linear scaling as llama.cpp takes it: of the type ``none`` there is
    none, zero means one, and the older key counts where the newer one is missing."""
    scaling = file.metadata.get(f"{file.architecture}.rope.scaling.type", "linear")
    if scaling not in ("none", "linear"):
        raise BundleError(f"{file.path}: rope scaling {scaling!r:.60}, expected 'linear'")
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        value = file.metadata.get(f"{file.architecture}.{key}")
        if value is not None:
            factor = 1.0 if value == 0.0 else _value(file, key, float)
            return 1.0 if scaling == "none" else factor
    return 1.0


def _with_experts(file: GgufFile, spec: DecoderSpec) -> DecoderSpec:
    counts = file.metadata.get(f"{file.architecture}.{EXPERT_COUNTS}")
    top_k = _value(file, "expert_used_count", int)
    if (
        not isinstance(counts, list)
        or len(counts) != spec.num_hidden_layers
        or not all(type(count) is int and (count == 0 or count >= top_k) for count in counts)
        or not any(counts)
    ):
        raise BundleError(
            f"{file.path}: '{file.architecture}.{EXPERT_COUNTS}' is {counts!r:.60}, expected the "
            f"number of experts of each layer"
        )
    channels = _value(file, "rope.dimension_count", int)
    flags = {field: _value(file, key, bool) for key, field in OWN_FLAGS.items()}
    kinds = {field: _value(file, key, str) for key, field in OWN_KINDS.items()}
    experts = ExpertsSpec(
        layers=tuple(layer for layer, count in enumerate(counts) if count),
        num_experts=tuple(count for count in counts if count),
        top_k=top_k,
        renormalize=_value(file, "expert_weights_norm", bool),
        use_residual=bool(file.metadata.get(f"{file.architecture}.expert_shared_count")),
    )
    rotary = None if channels == spec.head_dim else channels
    data = {**to_dict(spec), **flags, **kinds, "rotary_dim": rotary, "experts": to_dict(experts)}
    try:
        found = from_dict(DecoderSpec, data, str(file.path))
        expected = gguf_architecture(found)
    except MobileVLMError as error:
        raise BundleError(f"{file.path}: damaged or of a later version: {error}") from None
    if expected != file.architecture or channels > spec.head_dim or channels % 2:
        raise BundleError(
            f"{file.path}: architecture {file.architecture!r:.60} does not fit what the file says "
            f"of its decoder"
        )
    return found


def bytes_per_token(file: GgufFile, spec: DecoderSpec) -> int:
    """Bytes of weights that a decoding step reads: of sparse experts those that a token uses; of an
    embedding table a row, unless it is the head too."""
    total = 0
    for entry in decoder_entries(spec):
        tensor = file.tensors.get(entry.theirs)
        if tensor is None:
            continue
        if entry.stack and spec.experts is not None:
            total += tensor.size * spec.experts.top_k // entry.stack
        elif entry.ours == "decoder.embed_tokens.weight" and not spec.tie_word_embeddings:
            total += tensor.row_size
        else:
            total += tensor.size
    return total


def _value(file: GgufFile, key: str, kind: type[T], default: T | None = None) -> T:
    """A value of the metadata; numbers are positive."""
    key = f"{file.architecture}.{key}"
    value: Any = file.metadata.get(key, default)
    is_number = kind in (int, float)
    if type(value) is not kind or (is_number and not 0 < float(value) < _LIMIT):
        expected = f"a positive {kind.__name__}" if is_number else kind.__name__
        raise BundleError(f"{file.path}: {key!r} is {value!r:.60}, expected {expected}")
    found: T = value
    return found
