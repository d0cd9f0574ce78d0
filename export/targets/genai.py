"""Files of a folder that onnxruntime-genai loads as a model: ``genai_config.json`` and the
tokenizer's settings.

Its pipeline of three graphs (image encoder, embeddings, decoder) is the one that it has for Gemma
3. Nothing in it is Gemma's but the preparation of images, which the app does instead.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from mobilevlm.bundle import Manifest
from mobilevlm.errors import TargetError
from mobilevlm.export.targets.obstacles import obstacle
from mobilevlm.export.targets.transformers_js import TOKENIZER_CONFIG, tokenizer_config
from mobilevlm.spec import ModelSpec

NAME = "onnxruntime-genai"
CONFIG = "genai_config.json"
PREFIX = "genai_"
"""Begins the names of its graphs."""


def check_model(spec: ModelSpec) -> None:
    """Refuse a model that onnxruntime-genai cannot run by these graphs.

    Raises:
        TargetError: its images have no square form, or its graphs have other inputs.
    """
    found = obstacle(spec)
    if found is not None:
        raise TargetError(
            f"target {NAME}: {spec.name} has {found}, which its pipeline has no place for: use "
            f"the server or another target ('mobilevlm targets')"
        )


def image_token_id(spec: ModelSpec) -> int:
    """Return the id that stands for each row of an image: the model's own where it has one, else
    the first behind the vocabulary."""
    row_id = spec.image.layout.row_id
    return spec.decoder.vocab_size if row_id is None else row_id


def configuration(
    manifest: Manifest, tokenizer: Tokenizer, graphs: dict[str, str], threads: int | None = None
) -> dict[str, dict[str, Any]]:
    """Return the content of each JSON file. ``graphs``: file of each stage."""
    spec, decoder = manifest.spec, manifest.spec.decoder
    eos = list(spec.conversation.eos_token_ids)
    options = {} if threads is None else {"intra_op_num_threads": threads}
    session = {**options, "provider_options": []}
    model = {
        "type": "gemma3",
        "context_length": decoder.context_length,
        "eos_token_id": eos,
        "image_token_id": image_token_id(spec),
        "pad_token_id": eos[0] if eos else 0,
        "vocab_size": decoder.vocab_size,
        "decoder": {
            "filename": graphs["decoder"],
            "head_size": decoder.cache_head_dim,
            "hidden_size": decoder.hidden_size,
            "inputs": {
                "attention_mask": "attention_mask",
                "inputs_embeds": "inputs_embeds",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "num_attention_heads": decoder.num_attention_heads,
            "num_hidden_layers": decoder.num_hidden_layers,
            "num_key_value_heads": decoder.num_key_value_heads,
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "session_options": session,
        },
        "embedding": {
            "filename": graphs["embeddings"],
            "inputs": {"image_features": "image_features", "input_ids": "input_ids"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "vision": {
            "filename": graphs["vision"],
            "inputs": {"pixel_values": "pixel_values"},
            "outputs": {"image_features": "image_features"},
        },
    }
    search = {
        "do_sample": False,
        "max_length": decoder.context_length,
        "past_present_share_buffer": True,
    }
    return {
        CONFIG: {"model": model, "search": search},
        TOKENIZER_CONFIG: tokenizer_config(spec, tokenizer, "PreTrainedTokenizerFast"),
    }
