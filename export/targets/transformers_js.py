"""Files of a folder that transformers.js loads as a model: configuration, processors, tokenizer.

They say what the graphs and the bundle's spec say, in the words of the hub's configuration files;
nothing is copied from the checkpoint.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from mobilevlm.bundle import Artifact, Manifest
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import TargetError
from mobilevlm.export.targets.obstacles import obstacle
from mobilevlm.input_spec import AnyResolution, FixedImage, Tiles
from mobilevlm.spec import IMAGE_PLACEHOLDER, ModelSpec

NAME = "transformers.js"
TOKENIZER_CONFIG = "tokenizer_config.json"
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "q4": "_q4"}
"""Ends of the names of files by ``dtype``, of those that our precisions have names for."""
_LANCZOS = 1
"""The only filter that its image library has with smoothing (as of version 4.3): whatever Pillow's
filter is, this one comes nearest."""
_AROUND, _WHOLE = "<fake_token_around_image>", "<global-img>"
"""Marks that its processor for Idefics3 writes, whatever the tokenizer's settings."""
_MODELS = {
    FixedImage: ("llava", "LlavaForConditionalGeneration"),
    AnyResolution: ("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
    Tiles: ("smolvlm", "SmolVLMForConditionalGeneration"),
}
"""Its ``model_type`` and class by the preparation of images."""


def check_model(spec: ModelSpec, tokenizer: Tokenizer) -> None:
    """Refuse a model that transformers.js has no class for.

    Raises:
        TargetError: the family, its images, its decoder or its marks are others.
    """
    obstacle = _obstacle(spec, tokenizer)
    if obstacle is not None:
        raise TargetError(
            f"target transformers-js: {spec.name} {obstacle}; transformers.js has LLaVA-1.5 and "
            f"LLaVA-OneVision in the hub's layout, SmolVLM and Idefics3: choose one of these"
        )


def _obstacle(spec: ModelSpec, tokenizer: Tokenizer) -> str | None:
    if spec.family not in ("llava_hub", "smolvlm"):
        return f"is of the family {spec.family!r}"
    image = spec.image
    preparation = image.preparation
    if isinstance(preparation, AnyResolution) and preparation.several != "square":
        return "is LLaVA-NeXT, whose tiles it does not put together"
    if isinstance(preparation, Tiles):
        written = {_AROUND: image.layout.end_ids, _AROUND + _WHOLE: image.layout.thumbnail_ids}
        for text, ids in written.items():
            if tuple(tokenizer.encode(text, add_special_tokens=False).ids) != ids:
                return f"has other marks around images than {text!r}"
        if preparation.max_tiles > 1:
            return f"splits images into at most {preparation.max_tiles} tiles"
    if spec.conversation.image_mark != IMAGE_PLACEHOLDER:
        return f"marks images with {spec.conversation.image_mark!r} in place of '<image>'"
    found = obstacle(spec)
    return None if found is None else f"has {found}"


def configuration(manifest: Manifest, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Return the content of each JSON file."""
    spec = manifest.spec
    return {
        "config.json": _config(manifest),
        "generation_config.json": _generation(spec),
        "preprocessor_config.json": _preprocessor(spec),
        "processor_config.json": _processor(spec),
        TOKENIZER_CONFIG: tokenizer_config(spec, tokenizer, "PreTrainedTokenizer"),
    }


def _config(manifest: Manifest) -> dict[str, Any]:
    spec = manifest.spec
    model_type, architecture = _MODELS[type(spec.image.preparation)]
    parts = [part for part in manifest.artifacts if part.stage in STAGES]
    return {
        "architectures": [architecture],
        "eos_token_id": list(spec.conversation.eos_token_ids),
        "image_token_id": spec.image.layout.row_id,
        "image_token_index": spec.image.layout.row_id,
        "model_type": model_type,
        "text_config": _text_config(spec.decoder),
        "transformers.js_config": {
            "dtype": {STAGES[part.stage]: part.precision for part in parts},
            "use_external_data_format": {STAGES[part.stage]: _has_data(part) for part in parts},
        },
        "vocab_size": spec.decoder.vocab_size,
    }


STAGES = {
    "vision": "vision_encoder",
    "embeddings": "embed_tokens",
    "decoder": "decoder_model_merged",
}
"""Its names of the stages that it runs."""


def _has_data(part: Artifact) -> bool:
    return bool(part.data)


def _text_config(decoder: DecoderSpec) -> dict[str, Any]:
    """Return what names and shapes of keys and values follow from; ``llama`` stands for the plain
    layout of a cache, whatever the layers compute."""
    return {
        "head_dim": decoder.cache_head_dim,
        "hidden_size": decoder.hidden_size,
        "max_position_embeddings": decoder.context_length,
        "model_type": "llama",
        "num_attention_heads": decoder.num_attention_heads,
        "num_hidden_layers": decoder.num_hidden_layers,
        "num_key_value_heads": decoder.num_key_value_heads,
        "vocab_size": decoder.vocab_size,
    }


def _generation(spec: ModelSpec) -> dict[str, Any]:
    eos = spec.conversation.eos_token_ids
    return {
        "do_sample": False,
        "eos_token_id": list(eos),
        "max_length": spec.decoder.context_length,
        "pad_token_id": eos[0] if eos else None,
    }


def _preprocessor(spec: ModelSpec) -> dict[str, Any]:
    square = spec.image.square
    shared = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(square.mean),
        "image_std": list(square.std),
        "resample": _LANCZOS,
        "rescale_factor": 1 / 255,
    }
    edges = {"height": square.size, "width": square.size}
    if isinstance(square, Tiles):
        return shared | {
            "do_image_splitting": square.max_tiles != 1,
            "image_processor_type": "Idefics3ImageProcessor",
            "max_image_size": {"longest_edge": square.size},
            "processor_class": "Idefics3Processor",
            "size": {"longest_edge": square.longest_edge},
        }
    shared |= {"processor_class": "LlavaProcessor"}
    if isinstance(square, FixedImage) and square.aspect == "crop":
        return shared | {
            "crop_size": edges,
            "do_center_crop": True,
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": square.shortest_edge},
        }
    return shared | {
        "do_pad": True,
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "pad_size": edges,
        "size": {"longest_edge": square.size},
    }


def _processor(spec: ModelSpec) -> dict[str, Any]:
    image = spec.image
    if isinstance(image.preparation, Tiles):
        return {"image_seq_len": image.connector.num_tokens, "processor_class": "Idefics3Processor"}
    return {
        "image_token": IMAGE_PLACEHOLDER,
        "num_additional_image_tokens": image.connector.num_rows - image.connector.num_tokens,
        "patch_size": image.square.size // image.connector.out_grid,
        "processor_class": "LlavaProcessor",
    }


def tokenizer_config(spec: ModelSpec, tokenizer: Tokenizer, kind: str) -> dict[str, Any]:
    """Return what stands beside ``tokenizer.json``; ``kind``: the class that reads it."""
    template = spec.conversation.chat_template
    # The tokenizer itself writes the id that begins a text.
    empty = [name for name in ("bos_token", "eos_token") if name in template]
    eos = [tokenizer.id_to_token(token) for token in spec.conversation.eos_token_ids]
    return {
        "chat_template": "".join(f"{{%- set {name} = '' -%}}" for name in empty) + template,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos[0] if eos else None,
        "model_max_length": spec.decoder.context_length,
        "tokenizer_class": kind,
    }
