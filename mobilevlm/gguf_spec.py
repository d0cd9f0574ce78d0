"""What a GGUF file says about its decoder, as a DecoderSpec."""

from __future__ import annotations

from typing import Any, TypeVar

from mobilevlm.errors import BundleError
from mobilevlm.gguf_file import GgufFile
from mobilevlm.spec import DecoderSpec

T = TypeVar("T", int, float)


def decoder_spec(file: GgufFile) -> DecoderSpec:
    """The spec of a dense ``llama`` decoder.

    Raises:
        BundleError: another architecture, experts, or a key is missing or of the wrong kind.
    """
    if file.architecture != "llama":
        raise BundleError(f"{file.path}: architecture {file.architecture!r:.60}, expected 'llama'")
    if file.metadata.get("llama.expert_count"):
        raise BundleError(f"{file.path}: a decoder with experts, expected a dense one")
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise BundleError(f"{file.path}: rope scaling {scaling!r:.60}, expected 'linear'")
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is None:
        raise BundleError(f"{file.path}: tensor 'token_embd.weight' is missing")
    hidden = _value(file, "embedding_length", int)
    heads = _value(file, "attention.head_count", int)
    if hidden % heads:
        raise BundleError(f"{file.path}: {heads} heads do not divide {hidden} channels")
    return DecoderSpec(
        vocab_size=embeddings.shape[0],
        hidden_size=hidden,
        intermediate_size=_value(file, "feed_forward_length", int),
        num_hidden_layers=_value(file, "block_count", int),
        num_attention_heads=heads,
        num_key_value_heads=_value(file, "attention.head_count_kv", int, heads),
        head_dim=_value(file, "attention.key_length", int, hidden // heads),
        norm_eps=_value(file, "attention.layer_norm_rms_epsilon", float),
        rope_theta=_value(file, "rope.freq_base", float, 10000.0),
        rope_scaling=_value(file, "rope.scaling.factor", float, 1.0),
        context_length=_value(file, "context_length", int),
        tie_word_embeddings="output.weight" not in file.tensors,
    )


def _value(file: GgufFile, key: str, kind: type[T], default: T | None = None) -> T:
    """A positive number of the metadata."""
    value: Any = file.metadata.get(f"llama.{key}", default)
    if type(value) is not kind or not value > 0:
        raise BundleError(
            f"{file.path}: 'llama.{key}' is {value!r:.60}, expected a positive {kind.__name__}"
        )
    return value
