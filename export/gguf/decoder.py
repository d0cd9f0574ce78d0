"""The decoder as a GGUF file: of an architecture of llama.cpp, or of one of our own.

Names and metadata as llama.cpp's converter writes them (ggml-org/llama.cpp, conversion/{llama,qwen,
gemma}.py); those of experts as for its models with experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import gguf
import numpy as np
from numpy.typing import NDArray

from mobilevlm.checkpoint import Weights
from mobilevlm.console.progress import Advance
from mobilevlm.decoder_spec import DecoderSpec, DeltaSpec, ExpertsSpec
from mobilevlm.export.gguf.fallbacks import say_fallbacks
from mobilevlm.export.gguf.imatrix import ImportanceMatrix
from mobilevlm.export.gguf.llama_quantizer import quantize_file
from mobilevlm.export.gguf.tensors import FILE_TYPES, TYPES, Tensor, TensorType, write_file
from mobilevlm.export.gguf.vocabulary import vocabulary_of
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.gguf.architectures import PATTERNS, delta_interval, gguf_architecture, is_own
from mobilevlm.gguf.names import Entry, Groups, decoder_entries
from mobilevlm.gguf.spec import EXPERT_COUNTS, OWN_FLAGS, OWN_KINDS
from mobilevlm.model import Model
from mobilevlm.spec import GGUFType, ModelSpec

T = TypeVar("T", bound=np.generic)

_QUANTIZATION_VERSION = 2


def write_decoder(
    model: Model,
    kind: GGUFType,
    path: Path,
    advance: Advance,
    matrix: ImportanceMatrix | None = None,
) -> dict[str, float]:
    """Writes the decoder in a type. Returns each quantized tensor's relative error (none for the
    K-quants that llama.cpp makes from a float16 file). ``matrix``: for the types that can heed
    it; without, every weight counts the same."""
    entries = decoder_entries(model.spec.decoder)
    matrices = [entry.theirs for entry in entries if entry.store == "matrix"]
    if kind in TYPES or is_own(gguf_architecture(model.spec.decoder)):
        errors = _write(model, kind, path, advance, matrix)
        say_fallbacks(path, kind, matrices)
        return errors
    half = path.with_name(f"{path.name}.f16")
    try:
        _write(model, "f16", half, advance, matrix)
        quantize_file(half, path, kind, _importance(matrix))
    finally:
        half.unlink(missing_ok=True)
    say_fallbacks(path, kind, matrices)
    return {}


def _write(
    model: Model, kind: GGUFType, path: Path, advance: Advance, matrix: ImportanceMatrix | None
) -> dict[str, float]:
    spec = model.spec
    describe_vocabulary = vocabulary_of(model)

    def describe(writer: gguf.GGUFWriter) -> None:
        _describe(writer, spec, kind)
        if matrix is not None:
            _describe_importance(writer, matrix)
        describe_vocabulary(writer)
        writer.add_chat_template(spec.conversation.chat_template)

    tensors = decoder_tensors(model.weights, spec.decoder, kind, advance, _importance(matrix))
    return write_file(path, gguf_architecture(spec.decoder), describe, tensors)


def _importance(matrix: ImportanceMatrix | None) -> dict[str, Float32]:
    """Return the importance of each matrix' columns, by the names of the file."""
    entries = matrix.entries if matrix is not None else {}
    return {name: entry.importance for name, entry in entries.items()}


def _describe(writer: gguf.GGUFWriter, spec: ModelSpec, kind: GGUFType) -> None:
    decoder = spec.decoder
    writer.add_type("model")
    writer.add_name(spec.name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_vocab_size(decoder.vocab_size)
    writer.add_context_length(decoder.context_length)
    writer.add_embedding_length(decoder.hidden_size)
    writer.add_block_count(decoder.num_hidden_layers)
    writer.add_feed_forward_length(decoder.intermediate_size)
    writer.add_head_count(decoder.num_attention_heads)
    if decoder.conv_layers:
        layers = range(decoder.num_hidden_layers)
        counts = [
            0 if layer in decoder.conv_layers else decoder.num_key_value_heads for layer in layers
        ]
        writer.add_head_count_kv(counts)  # by which llama.cpp tells the layers apart
        writer.add_shortconv_l_cache(decoder.conv_kernel)
    else:
        writer.add_head_count_kv(decoder.num_key_value_heads)
    if decoder.delta is not None:
        _describe_delta(writer, decoder, decoder.delta)
    if decoder.norm == "rms":
        writer.add_layer_norm_rms_eps(decoder.norm_eps)
    else:
        writer.add_layer_norm_eps(decoder.norm_eps)
    writer.add_rope_dimension_count(decoder.rotary_channels)
    writer.add_rope_freq_base(decoder.rope_theta)
    if decoder.rope_scaling != 1.0:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(decoder.rope_scaling)
    is_ours = is_own(writer.arch)
    if is_ours or decoder.head_dim * decoder.num_attention_heads != decoder.hidden_size:
        writer.add_key_length(decoder.head_dim)
        writer.add_value_length(decoder.head_dim)
    if is_ours:
        _describe_own(writer, decoder)
    _describe_sliding(writer, decoder)
    if decoder.rope_sections:
        writer.add_rope_dimension_sections([*decoder.rope_sections, 0])
    if decoder.deep_layers:
        writer.add_num_deepstack_layers(len(decoder.deep_layers))
    if decoder.attention_softcap is not None:
        writer.add_attn_logit_softcapping(decoder.attention_softcap)
    if decoder.logit_softcap is not None:
        writer.add_final_logit_softcapping(decoder.logit_softcap)


def _describe_delta(writer: gguf.GGUFWriter, decoder: DecoderSpec, delta: DeltaSpec) -> None:
    writer.add_ssm_conv_kernel(delta.kernel)
    writer.add_ssm_state_size(delta.key_dim)
    writer.add_ssm_group_count(delta.key_heads)
    writer.add_ssm_time_step_rank(delta.value_heads)
    writer.add_ssm_inner_size(delta.value_size)
    writer.add_full_attention_interval(delta_interval(decoder))


def _describe_own(writer: gguf.GGUFWriter, decoder: DecoderSpec) -> None:
    """Add what llama.cpp knows of an architecture without being told."""
    if decoder.experts is not None:
        _describe_experts(writer, decoder, decoder.experts)
    for key, field in OWN_FLAGS.items():
        writer.add_bool(f"{writer.arch}.{key}", getattr(decoder, field))
    for key, field in OWN_KINDS.items():
        writer.add_string(f"{writer.arch}.{key}", getattr(decoder, field))
    if decoder.embed_scale != 1.0:
        writer.add_embedding_scale(decoder.embed_scale)
    if decoder.attention_scale is not None:
        writer.add_attention_scale(decoder.attention_scale)


def _describe_experts(writer: gguf.GGUFWriter, decoder: DecoderSpec, experts: ExpertsSpec) -> None:
    writer.add_expert_count(max(experts.num_experts))
    writer.add_expert_used_count(experts.top_k)
    writer.add_expert_weights_norm(experts.renormalize)
    if experts.use_residual:
        writer.add_expert_shared_count(1)
    counts = [decoder.num_experts(layer) for layer in range(decoder.num_hidden_layers)]
    writer.add_array(f"{writer.arch}.{EXPERT_COUNTS}", counts)


def _describe_sliding(writer: gguf.GGUFWriter, decoder: DecoderSpec) -> None:
    """Add window, layers and rotary base of sliding layers, the layers unless they are those that
    llama.cpp takes for granted."""
    if not decoder.sliding_layers:
        return
    layers = range(decoder.num_hidden_layers)
    slides = [layer in decoder.sliding_layers for layer in layers]
    usual = PATTERNS.get(writer.arch)
    writer.add_sliding_window(decoder.sliding_window)
    if usual is None or slides != [(layer + 1) % usual > 0 for layer in layers]:
        writer.add_sliding_window_pattern(slides)
    base = decoder.sliding_rope_theta
    if base is None and writer.arch == "gemma3":
        base = decoder.rope_theta
    if base is not None:
        writer.add_rope_freq_base_swa(base)


def _describe_importance(writer: gguf.GGUFWriter, matrix: ImportanceMatrix) -> None:
    """The keys of llama.cpp's quantizing tool, but for the file's name."""
    writer.add_string("quantize.imatrix.dataset", ", ".join(matrix.datasets))
    writer.add_uint32("quantize.imatrix.entries_count", len(matrix.entries))
    writer.add_uint32("quantize.imatrix.chunks_count", matrix.chunk_count)


def decoder_tensors(
    weights: Weights,
    spec: DecoderSpec,
    kind: GGUFType,
    advance: Advance,
    importance: Mapping[str, Float32] = MappingProxyType({}),
) -> list[Tensor]:
    """All tensors in the order of the file: matrices in ``kind``, norms in float32.

    ``importance``: of each matrix' columns, by the names of the file.
    """

    def read(entry: Entry, ours: str) -> Float32:
        advance(math.prod(entry.shape))
        values = weights.read(ours, entry.shape).reshape(entry.stored[bool(entry.stack) :])
        if entry.negative_exponent:
            values = -np.exp(values)
        if entry.groups is not None:
            values = by_member(values, entry.groups)
        return interleave(values, entry.heads) if entry.heads else values

    def tensor(entry: Entry) -> Tensor:
        store = matrix_type(entry.theirs, kind, spec) if entry.store == "matrix" else "f32"
        parts = [partial(read, entry, ours) for ours in entry.parts]
        return Tensor(entry.theirs, entry.stored, store, parts, importance.get(entry.theirs))

    return [tensor(entry) for entry in decoder_entries(spec)]


def matrix_type(name: str, kind: GGUFType, spec: DecoderSpec) -> TensorType:
    """Return the type that a matrix is stored in: float32 for what says how much a gated delta
    layer takes in and keeps. A K-quant is a mixture, as llama.cpp's quantizer has it for other
    decoders (src/llama-quant.cpp): the head, and values and MLP outputs of some layers, get Q6_K.
    """
    if re.search(r"\.ssm_(alpha|beta)\.", name) and kind != "f16":
        return "f32"
    if kind not in ("q4_k_m", "q5_k_m"):
        return kind
    usual: TensorType = "q4_k" if kind == "q4_k_m" else "q5_k"
    head = "token_embd.weight" if spec.tie_word_embeddings else "output.weight"
    if name == head:
        return "q6_k"
    if not name.startswith("blk.") or not re.search(r"\.(attn_v|ffn_down(_exps|_shexp)?)\.", name):
        return usual
    layer, eighth = int(name.split(".")[1]), spec.num_hidden_layers // 8
    more = layer < eighth or layer >= 7 * spec.num_hidden_layers // 8 or (layer - eighth) % 3 == 2
    return "q6_k" if more else usual


def by_member(values: NDArray[T], groups: Groups, *, back: bool = False) -> NDArray[T]:
    """Return an array with heads in llama.cpp's order, or ``back`` in ours."""
    axis, begin, count, members = groups
    if values.ndim == 1:
        axis = 0
    kept, heads = np.split(values, [begin], axis=axis)
    sizes = (members, count) if back else (count, members)
    apart = heads.reshape(*heads.shape[:axis], *sizes, -1, *heads.shape[axis + 1 :])
    turned = apart.swapaxes(axis, axis + 1).reshape(heads.shape)
    return np.concatenate([kept, turned], axis=axis)


def interleave(weight: Float32, heads: int) -> Float32:
    """Rows of a query or key projection ``(heads * head_dim, hidden_size)`` from half-split rotary
    pairs (i, i + head_dim / 2) to llama.cpp's neighbours (2 i, 2 i + 1)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, 2, rows // heads // 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def half_split(weight: NDArray[T], heads: int) -> NDArray[T]:
    """Undo :func:`interleave`, on whatever the rows hold."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
