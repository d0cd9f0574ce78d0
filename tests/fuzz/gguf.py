"""Mutated GGUF files, language model and image encoder: each is answered from, described, or
opened for export, or refused. Headers stay well-formed nearly always: keys, types, arrays, shapes
and offsets are wrong, so that cases reach the checks and the libraries behind them."""

from __future__ import annotations

import math
import os
import random
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

import mobilevlm
from fuzz.harness import Fuzzer
from fuzz.mutations import NUMBERS, TEXTS, mutate_bytes
from mobilevlm.cli.inspect import _show_gguf
from mobilevlm.export.gguf.source import open_gguf

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_PACKED: dict[tuple[int, int], bytes] = {}
"""The arrays of the well-formed files, by identity and type of their items."""
_FORMS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B",
          U64: "Q", I64: "q", F64: "d"}  # fmt: skip
HIDDEN, WIDE, LAYERS, HEADS = 32, 64, 2, 2
Random = random.Random
os.environ["GGML_NO_BACKTRACE"] = "1"  # an abort would start a debugger, and count as a hang


@dataclass
class Value:
    """One value of the metadata. ``item``: type of an array's values."""

    kind: int
    value: Any
    item: int = U32


@dataclass
class Tensor:
    name: str
    shape: list[int]
    """Outermost first."""
    kind: int
    data: bytes
    offset: int | None = None
    """Written in place of the true one."""


@dataclass
class File:
    """A GGUF file before it is written."""

    keys: list[tuple[str, Value]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    version: int = 3

    def add(self, key: str, kind: int, value: Any, item: int = U32) -> None:
        self.keys.append((key, Value(kind, value, item)))

    def copy(self) -> File:
        """Return a copy to change: lists of values are replaced, not written to."""
        keys = [(key, replace(value)) for key, value in self.keys]
        tensors = [replace(tensor, shape=list(tensor.shape)) for tensor in self.tensors]
        return File(keys, tensors, self.version)

    def packed(self) -> bytes:
        """Return the bytes of the file."""
        head = [b"GGUF", struct.pack("<IQQ", self.version, len(self.tensors), len(self.keys))]
        for key, value in self.keys:
            head += [_text(key), struct.pack("<I", value.kind), _packed(value)]
        data, position = [], 0
        for tensor in self.tensors:
            offset = position if tensor.offset is None else tensor.offset
            head += [_text(tensor.name), struct.pack("<I", len(tensor.shape))]
            head += [struct.pack("<Q", size % 2**64) for size in reversed(tensor.shape)]
            head.append(struct.pack("<IQ", tensor.kind, offset % 2**64))
            data.append(tensor.data + b"\0" * (-len(tensor.data) % 32))
            position += len(data[-1])
        header = b"".join(head)
        return header + b"\0" * (-len(header) % 32) + b"".join(data)


def _text(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _packed(value: Value) -> bytes:
    if value.kind != ARRAY:
        return _scalar(value.kind, value.value)
    if (ready := _PACKED.get((id(value.value), value.item))) is not None:
        return ready
    items = value.value if isinstance(value.value, list) else [value.value]
    packed = b"".join(_scalar(value.item, item) for item in items)
    return struct.pack("<IQ", value.item, len(items)) + packed


def _scalar(kind: int, value: Any) -> bytes:
    """Return a value as a type that it may not fit into."""
    if kind == STRING:
        return _text(value if isinstance(value, str | bytes) else str(value))
    if kind not in _FORMS:
        return b"\0" * 8
    if isinstance(value, str | bytes | list | None):
        value = len(value or ())
    form = _FORMS[kind]
    if form in "fd":
        try:
            return struct.pack(f"<{form}", float(value))
        except OverflowError:
            return struct.pack(f"<{form}", math.inf)
    size = struct.calcsize(form)
    number: int = int(value) if isinstance(value, int) or math.isfinite(value) else 0
    return (number % (1 << 8 * size)).to_bytes(size, "little")


# The well-formed files.


def _tensor(source: np.random.Generator, name: str, *shape: int, kind: int = 0) -> Tensor:
    values = source.standard_normal(shape, np.float32) * np.float32(0.1)
    if "norm" in name or ".ln" in name or "pre_ln" in name:
        values += np.float32(name.endswith("weight"))
    stored = {0: "F32", 1: "F16", 2: "Q4_0", 8: "Q8_0"}[kind]
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[stored])
    return Tensor(name, list(shape), kind, data.tobytes())


def decoder_file(kind: int, architecture: str = "llama") -> File:
    """Return a language model with matrices in a ggml type, dense or with experts."""
    file, source = File(), np.random.default_rng(1)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁the", "he", "th"]
    tokens += [f"<extra{index}>" for index in range(-len(tokens) % 32)]
    own, arch = architecture.startswith("moe"), architecture
    is_gemma, has_norms = arch.startswith("gemma"), arch in ("qwen3", "gemma3")
    head = 2 * HIDDEN // HEADS if has_norms else HIDDEN // HEADS
    file.add("general.architecture", STRING, arch)
    file.add("general.name", STRING, "tiny")
    file.add("general.file_type", U32, 0)
    for key, number in (
        ("context_length", 512), ("embedding_length", HIDDEN), ("block_count", LAYERS),
        ("feed_forward_length", WIDE), ("attention.head_count", HEADS),
        ("attention.head_count_kv", 1), ("rope.dimension_count", head), ("vocab_size", len(tokens)),
    ):  # fmt: skip
        file.add(f"{arch}.{key}", U32, number)
    file.add(f"{arch}.attention.layer_norm_rms_epsilon", F32, 1e-5)
    file.add(f"{arch}.rope.freq_base", F32, 10000.0)
    if has_norms:
        file.add(f"{arch}.attention.key_length", U32, head)
        file.add(f"{arch}.attention.value_length", U32, head)
    if is_gemma:
        file.add(f"{arch}.attention.sliding_window", U32, 8)
        file.add(f"{arch}.attention.sliding_window_pattern", ARRAY, [True, False], BOOL)
        file.add(f"{arch}.rope.freq_base_swa", F32, 500.0)
        file.add(f"{arch}.final_logit_softcapping", F32, 30.0)
    if arch == "gemma2":
        file.add(f"{arch}.attn_logit_softcapping", F32, 50.0)
    if own:
        file.add(f"{arch}.expert_count", U32, 3)
        file.add(f"{arch}.expert_used_count", U32, 2)
        file.add(f"{arch}.expert_weights_norm", BOOL, True)
        file.add(f"{arch}.expert_counts", ARRAY, [3, 0], I32)
        for name in ("attention.qkv_bias", "attention.output_bias", "feed_forward.bias"):
            file.add(f"{arch}.{name}", BOOL, False)
        file.add(f"{arch}.output_bias", BOOL, False)
        file.add(f"{arch}.use_parallel_residual", BOOL, False)
        file.add(f"{arch}.feed_forward.kind", STRING, "gated")
        file.add(f"{arch}.hidden_activation", STRING, "silu")
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    if arch.startswith("qwen"):
        types = [3, 3, 3, *[1] * (len(tokens) - 3)]
        file.add("tokenizer.ggml.merges", ARRAY, ["t h", "h e"], STRING)
    byte_level = arch.startswith("qwen")
    file.add("tokenizer.ggml.model", STRING, "gpt2" if byte_level else "llama")
    file.add("tokenizer.ggml.pre", STRING, "qwen2" if byte_level else "default")
    file.add("tokenizer.ggml.tokens", ARRAY, tokens, STRING)
    file.add("tokenizer.ggml.scores", ARRAY, [-float(i) for i in range(len(tokens))], F32)
    file.add("tokenizer.ggml.token_type", ARRAY, types, I32)
    for name, index in (("bos", 1), ("eos", 2), ("unknown", 0), ("padding", 0)):
        file.add(f"tokenizer.ggml.{name}_token_id", U32, index)
    file.add("tokenizer.ggml.add_bos_token", BOOL, True)
    file.add("tokenizer.ggml.add_eos_token", BOOL, False)
    file.add(
        "tokenizer.chat_template",
        STRING,
        "{% for turn in messages %}{{ turn.content }}{% endfor %}",
    )

    def add(name: str, *shape: int, kind: int = 0) -> None:
        file.tensors.append(_tensor(source, name, *shape, kind=kind))

    add("token_embd.weight", len(tokens), HIDDEN, kind=kind)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        for part, size in (("q", HEADS * head), ("k", head), ("v", head)):
            add(f"blk.{layer}.attn_{part}.weight", size, HIDDEN, kind=kind)
            if arch == "qwen2":
                add(f"blk.{layer}.attn_{part}.bias", size)
        for part in "qk" if has_norms else "":
            add(f"blk.{layer}.attn_{part}_norm.weight", head)
        for name in ("post_attention_norm", "post_ffw_norm") if is_gemma else ():
            add(f"blk.{layer}.{name}.weight", HIDDEN)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HEADS * head, kind=kind)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        sparse = own and layer == 0
        outer, ending = ((3,), "_exps") if sparse else ((), "")
        if sparse:
            add(f"blk.{layer}.ffn_gate_inp.weight", 3, HIDDEN)
        add(f"blk.{layer}.ffn_gate{ending}.weight", *outer, WIDE, HIDDEN, kind=kind)
        add(f"blk.{layer}.ffn_up{ending}.weight", *outer, WIDE, HIDDEN, kind=kind)
        add(f"blk.{layer}.ffn_down{ending}.weight", *outer, HIDDEN, WIDE, kind=kind)
    add("output_norm.weight", HIDDEN)
    if arch != "gemma2":
        add("output.weight", len(tokens), HIDDEN, kind=kind)
    return file


def legacy(encoder: File) -> File:
    """Return an image encoder as llama.cpp's first converter wrote it: the layers of each MLP have
    each other's names, and nothing says which layer's features are used."""
    encoder = encoder.copy()
    dropped = ("clip.vision.feature_layer", "clip.vision.mm_patch_merge_type")
    encoder.keys = [pair for pair in encoder.keys if pair[0] not in dropped]
    for tensor in encoder.tensors:
        up, down = ".ffn_up.", ".ffn_down."
        if up in tensor.name:
            tensor.name = tensor.name.replace(up, down)
        else:
            tensor.name = tensor.name.replace(down, up)
    return encoder


def mmproj_file(projector: str) -> File:
    """Return an image encoder of 2 × 2 patches (``mlp``) or 24 × 24 (``ldpv2``)."""
    file, source = File(), np.random.default_rng(2)
    patch, grid = (14, 2) if projector == "mlp" else (2, 24)
    file.add("general.architecture", STRING, "clip")
    file.add("general.type", STRING, "mmproj")
    file.add("general.file_type", U32, 1)
    file.add("clip.has_vision_encoder", BOOL, True)
    file.add("clip.has_llava_projector", BOOL, True)
    file.add("clip.projector_type", STRING, projector)
    for key, number in (
        ("projection_dim", HIDDEN), ("image_size", patch * grid), ("patch_size", patch),
        ("embedding_length", HIDDEN), ("feed_forward_length", WIDE), ("block_count", LAYERS),
        ("attention.head_count", HEADS),
    ):  # fmt: skip
        file.add(f"clip.vision.{key}", U32, number)
    file.add("clip.vision.feature_layer", ARRAY, [LAYERS], I32)
    file.add("clip.vision.attention.layer_norm_epsilon", F32, 1e-5)
    file.add("clip.vision.image_mean", ARRAY, [0.5, 0.5, 0.5], F32)
    file.add("clip.vision.image_std", ARRAY, [0.25, 0.25, 0.25], F32)
    file.add("clip.use_gelu", BOOL, False)
    file.add("clip.vision.mm_patch_merge_type", STRING, "flat")

    def add(name: str, *shape: int, kind: int = 0) -> None:
        file.tensors.append(_tensor(source, name, *shape, kind=kind))

    def pair(name: str, *shape: int, kind: int = 0) -> None:
        add(f"{name}.weight", *shape, kind=kind)
        add(f"{name}.bias", shape[0])

    add("v.class_embd", HIDDEN)
    add("v.patch_embd.weight", HIDDEN, 3, patch, patch, kind=1)
    add("v.position_embd.weight", grid * grid + 1, HIDDEN)
    pair("v.pre_ln", HIDDEN)
    for layer in range(LAYERS):
        pair(f"v.blk.{layer}.ln1", HIDDEN)
        for part in ("q", "k", "v", "out"):
            pair(f"v.blk.{layer}.attn_{part}", HIDDEN, HIDDEN, kind=1)
        pair(f"v.blk.{layer}.ln2", HIDDEN)
        pair(f"v.blk.{layer}.ffn_up", WIDE, HIDDEN, kind=1)
        pair(f"v.blk.{layer}.ffn_down", HIDDEN, WIDE, kind=1)
    first = "mm.{}" if projector == "mlp" else "mm.model.mlp.{}"
    pair(first.format(0), HIDDEN, HIDDEN, kind=1)
    pair(first.format(2), HIDDEN, HIDDEN, kind=1)
    if projector == "ldpv2":
        add("mm.model.peg.0.weight", HIDDEN, 1, 3, 3, kind=1)
        add("mm.model.peg.0.bias", HIDDEN)
    return file


DECODERS = (
    decoder_file(0),
    decoder_file(1),
    decoder_file(2),
    decoder_file(8),
    decoder_file(1, "qwen2"),
    decoder_file(0, "qwen3"),
    decoder_file(1, "gemma2"),
    decoder_file(0, "gemma3"),
    decoder_file(1, "moe-llava-llama"),  # the last: llama.cpp does not run it
)
ENCODERS = (mmproj_file("mlp"), mmproj_file("ldpv2"), legacy(mmproj_file("mlp")))


_PACKED.update(
    ((id(value.value), value.item), _packed(value))
    for file in (*DECODERS, *ENCODERS)
    for _, value in file.keys
    if value.kind == ARRAY
)


# What is made wrong.


def _known_keys() -> list[str]:
    """Return the keys that gguf-py knows, and older or unwritten ones that libraries read."""
    found: list[str] = []

    def collect(holder: type) -> None:
        for name, value in vars(holder).items():
            if isinstance(value, type):
                collect(value)
            elif isinstance(value, str) and not name.startswith("_"):
                found.append(value.replace("{arch}", "llama").replace("{id}", "0"))

    collect(gguf.Keys)
    return [
        *found, "llama.rope.scale_linear", "clip.minicpmv_version", "clip.has_text_encoder",
        "clip.minicpmv_query_num", "clip.vision.image_grid_pinpoints", "clip.vision.feature_layer",
        "clip.vision.attention.head_count_kv", "clip.vision.attention.head_dim",
        "clip.vision.mm_patch_merge_type", "clip.use_silu", "clip.has_gen_audio_encoder",
        "llama.expert_used_count", "tokenizer.ggml.suppress_tokens",
        "llama.classifier.pooling_type",
    ]  # fmt: skip


KNOWN = _known_keys()
TENSORS = (
    "rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.attn_k.bias", "blk.1.attn_v.bias",
    "blk.0.attn_output.bias", "blk.0.ffn_up.bias", "blk.0.ffn_gate.bias", "blk.1.ffn_down.bias",
    "blk.0.attn_qkv.weight", "blk.0.attn_q_norm.weight", "blk.0.ffn_gate_inp.weight",
    "blk.2.attn_norm.weight", "output.bias", "output_norm.bias", "rope_factors_long.weight",
    "blk.0.attn_q.scale", "blk.0.attn_q.input_scale", "model.image_newline", "mm.1.weight",
    "mm.3.weight", "mm.4.weight", "v.post_ln.weight", "v.post_ln.bias", "v.patch_embd.bias",
    "v.patch_embd.weight.1", "v.blk.0.attn_qkv.weight", "v.blk.0.ls1.weight",
    "v.blk.0.attn_q_norm.weight", "v.blk.0.ffn_gate.weight", "v.blk.0.attn_sinks",
    "v.blk.0.ffn_gate_exps.weight", "v.blk.2.ln1.weight", "v.norm_embd.weight",
    "blk.0.post_attention_norm.weight", "blk.1.post_ffw_norm.weight", "blk.0.attn_k_norm.weight",
)  # fmt: skip
WORDS = ("llama", "gpt2", "bert", "t5", "clip", "mlp", "ldp", "ldpv2", "resampler", "linear",
         "none", "yarn", "longrope", "gelu_new", "no_vocab", "spatial_unpad", "qwen2vl_merger",
         "mlp_norm", "moe-llava-phi2", "plain", "{{ messages }}", "\udcff")  # fmt: skip
SIZES = (0, 1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 64, 128, 256, 512, 1000, 4096, 2**16, 2**24, 2**31,
         2**32, 2**63)  # fmt: skip


def _change_number(random: Random, file: File) -> None:
    index = random.randrange(len(file.keys))
    value = file.keys[index][1]
    if value.kind in _FORMS:
        value.value = random.choice((*SIZES, *NUMBERS))
    elif value.kind == STRING:
        value.value = random.choice((*WORDS, *TEXTS))
    else:
        _change_array(random, value)


def _change_array(random: Random, value: Value) -> None:
    kind = random.randrange(6)
    items = value.value = list(value.value) if isinstance(value.value, list) else [value.value]
    if kind == 0:
        del items[random.randrange(len(items) + 1) :]
    elif kind == 1:
        value.value = items * random.choice((2, 3))
    elif kind == 2:
        value.item = random.choice((*_FORMS, STRING, ARRAY, 99))
    elif items:
        for _ in range(random.choice((1, 1, 4))):
            at = random.randrange(len(items))
            if value.item == STRING:
                others = (items[random.randrange(len(items))], b"\xff\xfe", "", "<0x0A>", "</s>")
                items[at] = random.choice((*others, *WORDS, *TEXTS))
            else:
                items[at] = random.choice((*SIZES, *NUMBERS))


def _change_type(random: Random, file: File) -> None:
    value = random.choice(file.keys)[1]
    value.kind = random.choice((*_FORMS, STRING, ARRAY, ARRAY, 99))


def _add_key(random: Random, file: File) -> None:
    key = random.choice(KNOWN)
    if key.startswith("llama."):  # of the file's own architecture
        key = key.replace("llama", str(file.keys[0][1].value), 1)
    if random.random() < 0.2:
        key = random.choice(file.keys)[0] + random.choice(("", "x", ".0"))
    kind = random.choice((U32, U32, I32, F32, BOOL, STRING, ARRAY, U64))
    pool = (*WORDS, *TEXTS) if kind == STRING else (*SIZES, *NUMBERS)
    value: Any = random.choice(pool)
    if kind == ARRAY:
        value = [random.choice(SIZES) for _ in range(random.randrange(9))]
    file.keys = [pair for pair in file.keys if pair[0] != key or random.random() < 0.1]
    file.add(key, kind, value, random.choice((U32, I32, F32, STRING)))


def _drop_key(random: Random, file: File) -> None:
    del file.keys[random.randrange(len(file.keys))]


def _change_shape(random: Random, file: File) -> None:
    tensor = random.choice(file.tensors)
    kind = random.randrange(5)
    if kind == 0:
        tensor.shape[random.randrange(len(tensor.shape))] = random.choice(SIZES)
    elif kind == 1:
        tensor.shape.reverse()
    elif kind == 2:
        tensor.shape = [math.prod(tensor.shape)]
    elif kind == 3:
        tensor.shape.insert(random.randrange(len(tensor.shape) + 1), 1)
    else:
        tensor.shape = [2, *tensor.shape[:-1], tensor.shape[-1] // 2]


def _change_storage(random: Random, file: File) -> None:
    """Give tensors other types, with bytes enough for most of them, or other places."""
    chosen = random.sample(file.tensors, random.choice((1, 1, 3, len(file.tensors))))
    kind = random.choice((*range(42), 0, 1, 2, 8, 1 << 31))
    for tensor in chosen:
        if random.random() < 0.2:
            tensor.offset = random.choice((0, 32, 64, 33, 2**20, 2**40, 2**64 - 32))
            continue
        tensor.kind = kind
        tensor.data = (tensor.data * 8)[: 8 * math.prod(tensor.shape)]


def _change_values(random: Random, file: File) -> None:
    tensor = random.choice(file.tensors)
    fill = random.choice((b"\xff", b"\x00", b"\x7f", b"\x00\x00\x80\x7f", random.randbytes(64)))
    tensor.data = (fill * len(tensor.data))[: len(tensor.data)]


def _change_names(random: Random, file: File) -> None:
    tensor = random.choice(file.tensors)
    if random.random() < 0.5:
        other = replace(tensor)
        shapes = ([HIDDEN], [HIDDEN // HEADS], [WIDE], [HIDDEN // HEADS // 2], other.shape)
        other.shape = list(random.choice(shapes))
        other.kind, other.name = 0, random.choice(TENSORS)
        other.data = b"\0\0\x80\x3f" * math.prod(other.shape)
        file.tensors.append(other)
    else:
        names = [random.choice(file.tensors).name, random.choice(TENSORS), "", "x" * 70, "\0"]
        tensor.name = random.choice(names)


def _drop_tensor(random: Random, file: File) -> None:
    del file.tensors[random.randrange(len(file.tensors))]


def _change_layers(random: Random, file: File) -> None:
    """Say another number of something, rightly named and typed."""
    endings = ("block_count", "head_count", "head_count_kv", "image_size", "patch_size",
               "rope.dimension_count", "feed_forward_length", "context_length", "vocab_size",
               "expert_used_count", "expert_count", "projection_dim", "key_length",
               "sliding_window")  # fmt: skip
    ending = random.choice(endings)
    number = random.choice((*SIZES, 24, 28, 48, 1000))
    for key, value in file.keys:
        if key.endswith(ending):
            value.value = number


_MUTATIONS: tuple[Callable[[Random, File], None], ...] = (
    _change_number, _change_number, _change_type, _add_key, _add_key, _drop_key, _change_shape,
    _change_storage, _change_values, _change_names, _drop_tensor, _change_layers,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    verb: str
    """``gguf`` or ``ggml``: an answer of this engine; ``inspect``; ``export``."""
    model: Path
    mmproj: Path


def prepare(folder: Path) -> None:
    """Write the well-formed files; load the libraries, which every case would need."""
    for index, file in enumerate(DECODERS):
        (folder / f"decoder{index}.gguf").write_bytes(file.packed())
    for index, file in enumerate(ENCODERS):
        (folder / f"mmproj{index}.gguf").write_bytes(file.packed())


def mutate(base: Path, random: Random, scratch: Path) -> Case:
    """Write a pair of files of which one, seldom both, is wrong."""
    verb = random.choice(("gguf", "gguf", "ggml", "ggml", "inspect", "export"))
    chosen = random.randrange(len(DECODERS) - (verb == "gguf"))
    decoder = base / f"decoder{chosen}.gguf"
    image = random.randrange(len(ENCODERS)) if random.random() < 0.2 else 0
    mmproj = base / f"mmproj{image}.gguf"
    which = random.choice(("decoder", "decoder", "mmproj", "mmproj", "both"))
    if which != "mmproj":
        decoder = _mutated(random, DECODERS[chosen], scratch / "model.gguf")
    if which != "decoder":
        mmproj = _mutated(random, ENCODERS[image], scratch / "mmproj.gguf")
    return Case(verb, decoder, mmproj)


def _mutated(random: Random, file: File, path: Path) -> Path:
    file = file.copy()
    for _ in range(random.choice((1, 1, 1, 1, 2, 3))):
        if file.keys and file.tensors:
            random.choice(_MUTATIONS)(random, file)
    content = file.packed()
    if random.random() < 0.05:
        content = mutate_bytes(random, content)
    elif random.random() < 0.02:
        file.version = random.choice((0, 1, 2, 4, 2**31))
        content = file.packed()
    path.write_bytes(content)
    return path


def attempt(case: Case) -> None:
    """Do with the files what the verb says; an answer has one token of an image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.verb == "inspect":
            _show_gguf(case.model, as_json=True)
            _show_gguf(case.mmproj, as_json=False)
        elif case.verb == "export":
            model = open_gguf(case.model, case.mmproj)
            for name in model.weights:
                ref = model.weights._refs[name]
                model.weights.read(name, ref.files.shape(ref.name))
        else:
            picture = np.zeros((28, 28, 3), np.uint8)
            with mobilevlm.load(case.model, case.verb, 1, case.mmproj) as vlm:
                vlm.generate("a the", [picture], max_new_tokens=1)


MEMORY = 128 << 20
"""Bytes that a case may add: the libraries at a worker's first, four times a file of 0.2 MB, and
keys and values, which are bounded by gguf_checks.KEY_VALUE_ALLOWANCE."""
SECONDS = 20.0
"""Seconds of a case: files that say another family are tried in a process of its own."""
FUZZER = Fuzzer(prepare, mutate, attempt, seconds=SECONDS, memory=MEMORY)
