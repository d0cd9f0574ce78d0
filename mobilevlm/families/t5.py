"""T5 1.1 and Flan-T5 as a language model: an encoder for the prompt, a decoder for the answer.

Official code: transformers (models/t5).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobilevlm.checkpoint import TensorRef, TensorSource
from mobilevlm.decoder_spec import DecoderSpec, RelativePositions
from mobilevlm.errors import CheckpointError
from mobilevlm.families.config import config_value

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "n_positions": 512,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
}
"""Defaults of ``T5Config``."""
_KINDS: dict[str, dict[str, Any]] = {
    "gated-gelu": {"mlp": "gated", "hidden_act": "gelu_new"},
    "gated-silu": {"mlp": "gated", "hidden_act": "silu"},
    "relu": {"mlp": "plain", "hidden_act": "relu"},
}
"""By ``feed_forward_proj``."""


def read_t5(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``T5Config``.

    Raises:
        CheckpointError: a value is missing, wrong or not supported.
    """
    kind = config_value(path, config, "feed_forward_proj", str, "relu")
    if kind not in _KINDS:
        raise CheckpointError(
            f"{path}: 'feed_forward_proj' is {kind!r:.60}, expected {', '.join(_KINDS)}"
        )
    tied = config_value(path, config, "tie_word_embeddings", bool, True)
    if tied and config.get("scale_decoder_outputs", True):
        raise CheckpointError(
            f"{path}: a head that is the embeddings scaled down (T5 1.0): expected T5 1.1 or "
            f"Flan-T5"
        )
    heads = config_value(path, config, "num_heads", int)
    layers = config_value(path, config, "num_layers", int)
    start = config.get("decoder_start_token_id")
    return DecoderSpec(
        vocab_size=config_value(path, config, "vocab_size", int),
        hidden_size=config_value(path, config, "d_model", int),
        intermediate_size=config_value(path, config, "d_ff", int),
        num_hidden_layers=config_value(path, config, "num_decoder_layers", int, layers),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=config_value(path, config, "d_kv", int),
        norm_eps=config_value(path, config, "layer_norm_epsilon", float),
        rope_theta=10000.0,
        rope_scaling=1.0,
        context_length=config_value(path, config, "n_positions", int),
        tie_word_embeddings=tied,
        rotary_dim=0,
        relative_positions=RelativePositions(
            config_value(path, config, "relative_attention_num_buckets", int),
            config_value(path, config, "relative_attention_max_distance", int),
        ),
        attention_scale=1.0,
        encoder_layers=layers,
        start_token_id=start if isinstance(start, int) else 0,
        **_KINDS[kind],
    )


def t5_refs(files: TensorSource, spec: DecoderSpec, model: str) -> dict[str, TensorRef]:
    """Return the locations of the tensors by canonical name; ``model``: the module that holds
    T5."""
    refs = {
        f"decoder.{ours}.weight": TensorRef(files, f"{model}.{theirs}.weight")
        for ours, theirs in _names(spec)
    }
    head = "shared" if spec.tie_word_embeddings else "lm_head"
    refs["decoder.lm_head.weight"] = TensorRef(files, f"{model}.{head}.weight")
    return refs


def skipped_t5_names(spec: DecoderSpec, model: str) -> list[str]:
    """Return regular expressions of copies of the embeddings that a file may hold too."""
    copies = r"(encoder|decoder)\.embed_tokens"
    return [rf"{model}\.({copies}{'|lm_head' * spec.tie_word_embeddings})\.weight$"]


def _names(spec: DecoderSpec) -> Iterator[tuple[str, str]]:
    yield "embed_tokens", "shared"
    for ours, stack in (("encoder.", "encoder"), ("", "decoder")):
        yield f"{ours}norm", f"{stack}.final_layer_norm"
        bias = "layer.0.SelfAttention.relative_attention_bias"
        yield f"{ours}relative_bias", f"{stack}.block.0.{bias}"
        count = spec.encoder_layers if ours else spec.num_hidden_layers
        for index in range(count):
            layer, block = f"{ours}layers.{index}", f"{stack}.block.{index}.layer"
            last = 1 if ours else 2
            yield f"{layer}.input_norm", f"{block}.0.layer_norm"
            for part in "qkvo":
                yield f"{layer}.attn.{part}_proj", f"{block}.0.SelfAttention.{part}"
            if not ours:
                yield from _cross_names(index, block)
            yield f"{layer}.post_attention_norm", f"{block}.{last}.layer_norm"
            readers, maker = spec.mlp_linears
            theirs = ("wi_0", "wi_1") if len(readers) == 2 else ("wi",)
            for linear, name in (*zip(readers, theirs, strict=True), (maker, "wo")):
                yield f"{layer}.mlp.{linear}", f"{block}.{last}.DenseReluDense.{name}"


def _cross_names(index: int, block: str) -> Iterator[tuple[str, str]]:
    """Keys and values belong to the encoder: they are made once for a prompt."""
    attention = f"{block}.1.EncDecAttention"
    yield f"layers.{index}.cross_norm", f"{block}.1.layer_norm"
    yield f"layers.{index}.cross.query_proj", f"{attention}.q"
    yield f"layers.{index}.cross.o_proj", f"{attention}.o"
    yield f"encoder.cross.{index}.key_proj", f"{attention}.k"
    yield f"encoder.cross.{index}.value_proj", f"{attention}.v"
