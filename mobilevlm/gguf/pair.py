"""A pair of GGUF files, language model and image encoder, that llama.cpp alone knows: the part that
their metadata tell, for estimates of memory, and the checks that need no library.

Of families of our own every key and tensor is checked (checks.py). Of others only llama.cpp knows
which there must be; what is checked here holds for all, and llama.cpp itself tries the files in a
process of its own first (runtime/engines/llama/pair_probe.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError
from mobilevlm.gguf.architectures import STOCK, is_own
from mobilevlm.gguf.checks import MAX_LAYERS, MAX_VOCABULARY, check_key_values, other
from mobilevlm.gguf.conversation import pair_conversation
from mobilevlm.gguf.file import GgufFile
from mobilevlm.gguf.split import refuse_split
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import InputSpec, LibraryImage
from mobilevlm.spec import ModelSpec

OUR_PROJECTORS = ("mlp", "ldp", "ldpv2")
CLIP_PROJECTORS = ("mlp", "mlp_norm", "ldp", "ldpv2")
"""Projectors beside a CLIP tower, whose graph in llama.cpp has flaws that are mended
(runtime/engines/llama/clip_order.py, onnx/feature_layer.py)."""
MAX_PAIR_CONTEXT = 8192
"""Positions at most: a photo in tiles takes some thousands."""
_LIMIT = 1 << 31
_TILES = "clip.vision.image_grid_pinpoints"
"""Key of images that are cut into tiles (LLaVA-1.6)"""


@dataclass(frozen=True)
class PairFacts:
    """Answers of llama.cpp about an open pair."""

    width: int
    """Numbers in a row of an image"""
    fewest_rows: int
    """Positions that every image takes"""
    most_rows: int
    """Positions of a photo, those of marks included"""
    longest_run: int
    """Rows that are encoded together"""
    begins: bool
    """True if texts begin with a token that the tokenizer adds"""
    ends: tuple[int, ...]
    """Ids that end an answer"""


def is_ours(decoder: GgufFile, vision: GgufFile) -> bool:
    """Return whether a pair is of a family whose keys and tensors are all known here, or not a
    language model and an image encoder, to be refused."""
    kinds = decoder.architecture == "clip", vision.architecture == "clip"
    return kinds != (False, True) or not any(map(known_to_llama_alone, (decoder, vision)))


def known_to_llama_alone(file: GgufFile) -> bool:
    """Return whether a file calls itself of a family that is not supported. A file that calls
    itself nothing does not."""
    if file.architecture == "clip":
        is_tiled = bool(file.metadata.get(_TILES))
        return is_tiled or projector_name(file) not in OUR_PROJECTORS
    return not is_own(file.architecture) and file.architecture not in (*STOCK, "")


def projector_name(vision: GgufFile) -> str:
    """Return llama.cpp's name of the projector; the oldest files do not say that it is an MLP."""
    keys = ("clip.projector_type", "clip.vision.projector_type")
    found = next((vision.metadata[key] for key in keys if key in vision.metadata), "mlp")
    return found if isinstance(found, str) else ""


def check_pair(decoder: GgufFile, vision: GgufFile) -> DecoderSpec:
    """Return the sizes of the language model, checked as far as they can be of any family.

    Raises:
        BundleError: a key is missing, of the wrong kind or absurd, or the context would take more
            than the files can ask for.
    """
    refuse_split(vision, "an image encoder")
    if not (vision.metadata.get("clip.has_vision_encoder") or _is_old(vision)):
        raise BundleError(f"{vision.path}: clip.has_vision_encoder is not true: no image encoder")
    if not projector_name(vision).isprintable() or not projector_name(vision):
        raise BundleError(f"{vision.path}: it does not say which projector it has")
    spec = _decoder_sizes(decoder)
    check_tokens(decoder, spec.vocab_size)
    check_key_values(decoder, spec)
    return spec


def pair_spec(
    decoder: GgufFile, vision: GgufFile, language: DecoderSpec, facts: PairFacts
) -> ModelSpec:
    """Return the spec of a checked pair, for estimates and prompts; it says nothing of weights."""
    encoder = _encoder_sizes(vision, facts)
    preparation = LibraryImage(projector_name(vision), facts.fewest_rows, facts.most_rows)
    connector = ConnectorSpec("llama.cpp", encoder.hidden_size, facts.width, 1, encoder.grid, 0)
    name = decoder.metadata.get("general.name")
    return ModelSpec(
        family="gguf",
        name=name if isinstance(name, str) and name.isprintable() and name else decoder.path.stem,
        inputs={"image": InputSpec(preparation, encoder, connector)},
        decoder=language,
        conversation=pair_conversation(decoder, facts.begins, facts.ends),
    )


def check_tokens(file: GgufFile, vocab_size: int) -> None:
    """Refuse a vocabulary whose tokens are not as many as the embeddings, or no text.

    Raises:
        BundleError: it is so.
    """
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(type(token) is str for token in tokens):
        raise BundleError(f"{file.path}: tokenizer.ggml.tokens is missing or not a list of str")
    if len(tokens) != vocab_size or not 1 <= vocab_size <= MAX_VOCABULARY:
        raise BundleError(
            f"{file.path}: damaged tokenizer: {len(tokens)} tokens, the model has embeddings for "
            f"{vocab_size} (at most {MAX_VOCABULARY} are read): convert the model again"
        )
    for name in ("scores", "token_type"):
        values = file.metadata.get(f"tokenizer.ggml.{name}")
        if values is not None and (not isinstance(values, list) or len(values) != len(tokens)):
            raise BundleError(
                f"{file.path}: damaged tokenizer: {len(tokens)} tokens, another number of {name}: "
                f"convert the model again"
            )


def _decoder_sizes(file: GgufFile) -> DecoderSpec:
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise BundleError(f"{file.path}: tensor 'token_embd.weight' is missing")
    layers, hidden = _number(file, "block_count"), _number(file, "embedding_length")
    found = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if layers > MAX_LAYERS or layers != len(found):
        raise other(file, f"block_count is {layers}, the file has tensors of {len(found)} layers")
    if embeddings.shape[1] != hidden:
        raise other(file, f"token_embd.weight is {embeddings.shape}, expected {hidden} columns")
    heads = _largest(file, "attention.head_count")
    shared = _mean(file, "attention.head_count_kv", heads, layers)
    return DecoderSpec(
        vocab_size=embeddings.shape[0],
        hidden_size=hidden,
        intermediate_size=_largest(file, "feed_forward_length", 4 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=_number(file, "attention.key_length", max(hidden // heads, 1)),
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=1.0,
        context_length=min(_number(file, "context_length"), MAX_PAIR_CONTEXT),
        tie_word_embeddings="output.weight" not in file.tensors,
    )


def _encoder_sizes(file: GgufFile, facts: PairFacts) -> TransformerEncoder:
    """Return the tower as far as its memory tells: with the patches of the longest run."""
    size, patch = (_vision_number(file, key, 14) for key in ("image_size", "patch_size"))
    scale = max(_vision_number(file, key, 1) for key in ("projector.scale_factor",
                                                         "spatial_merge_size"))  # fmt: skip
    patches = max(size // patch, math.isqrt(facts.longest_run * scale**2), 1)
    hidden = _vision_number(file, "embedding_length", 1024)
    return TransformerEncoder(
        hidden_size=hidden,
        intermediate_size=_vision_number(file, "feed_forward_length", 4 * hidden),
        num_hidden_layers=_vision_number(file, "block_count", 24),
        num_attention_heads=_vision_number(file, "attention.head_count", 16),
        image_size=patches * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        class_token=False,
    )


def _is_old(vision: GgufFile) -> bool:
    return "clip.has_vision_encoder" not in vision.metadata and "clip.vision.image_size" in (
        vision.metadata
    )


def _number(file: GgufFile, key: str, default: int | None = None) -> int:
    name = f"{file.architecture}.{key}"
    value = file.metadata.get(name, default)
    if type(value) is not int or not 0 < value < _LIMIT:
        raise BundleError(f"{file.path}: {name[:80]!r} is {value!r:.60}, expected a number above 0")
    return value


def _listed(file: GgufFile, key: str, default: int | None) -> list[int]:
    """Return a number, or those of each layer."""
    name = f"{file.architecture}.{key}"
    value: Any = file.metadata.get(name, default)
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(item) is int and 0 <= item < _LIMIT for item in values):
        raise BundleError(f"{file.path}: {name[:80]!r} is {value!r:.60}, expected numbers")
    return values


def _largest(file: GgufFile, key: str, default: int | None = None) -> int:
    return max(*_listed(file, key, default), 1)


def _mean(file: GgufFile, key: str, default: int, layers: int) -> int:
    """Return the mean over layers, rounded up: of layers without attention it is 0."""
    values = _listed(file, key, default)
    total = sum(values) if len(values) > 1 else values[0] * layers
    return max(-(-total // layers), 1)


def _vision_number(file: GgufFile, key: str, default: int) -> int:
    value = file.metadata.get(f"clip.vision.{key}", default)
    return value if type(value) is int and 0 < value < 1 << 20 else default
