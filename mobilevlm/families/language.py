"""Language models without inputs beside text, in the layout of the Hugging Face hub: a config.json
of one part. Gemma 3's of 270M and 1B, and the language models that other families are built on."""

from __future__ import annotations

from mobilevlm.checkpoint import Weights
from mobilevlm.families.backbones import decoder_refs
from mobilevlm.families.hub import open_hub
from mobilevlm.families.registry import Source, register
from mobilevlm.spec import ModelSpec

_TYPES = {"gemma3_text", "lfm2", "llama", "mistral", "qwen2", "qwen3", "qwen3_5_text"}


@register("language", _TYPES, ready_tokenizer=True)
def read_language(source: Source) -> tuple[ModelSpec, Weights]:
    """Read a language model alone."""
    hub = open_hub(source, text_key="")
    decoder, backbone = hub.decoder()
    spec = ModelSpec("language", source.name, {}, decoder, hub.conversation())
    refs = decoder_refs(hub.files, decoder, backbone)
    return spec, hub.weights(refs, decoder, backbone)
