"""ModelSpec: everything known about a model, as one tree of frozen dataclasses.

A family fills it from a checkpoint; the torch reference, the graph authors and the runtime read
only this. It is stored in a bundle's manifest, so a field added here, in input_spec.py or in
decoder_spec.py must have a default.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import MobileVLMError
from mobilevlm.input_spec import InputSpec

IMAGE_PLACEHOLDER = "<image>"
"""Marks an image in prompt text."""


@dataclass(frozen=True)
class ConversationSpec:
    """What turns chat messages into input ids and ends an answer."""

    chat_template: str
    """Jinja template over ``messages``, as in tokenizer_config.json of the Hugging Face hub."""
    eos_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    tokenization: Literal["apart", "joined", "images_first"] = "apart"
    """``apart``: text between images is tokenized piece by piece; ``joined``: as one string, where
    ``image_mark`` is a token of the tokenizer; ``images_first``: apart, and images that begin the
    text stand before the ids that begin a text."""
    image_mark: str = IMAGE_PLACEHOLDER
    """Text that the template writes for an image."""
    parts: bool = False
    """The template takes contents as lists of parts only, images among them."""


@dataclass(frozen=True)
class ModelSpec:
    """One multimodal language model: its inputs, its decoder, and what surrounds them."""

    family: str
    name: str
    inputs: dict[str, InputSpec]
    """Inputs beside text by their kind: ``image``; none of a plain language model."""
    decoder: DecoderSpec
    conversation: ConversationSpec
    variant: str = ""
    """Which of several official behaviours, for families that have them."""

    @property
    def image(self) -> InputSpec:
        """The input for images.

        Raises:
            MobileVLMError: the model takes no images.
        """
        if "image" not in self.inputs:
            raise MobileVLMError(f"{self.name}: this model takes no images: leave them out")
        return self.inputs["image"]


def with_image(spec: ModelSpec, **parts: Any) -> ModelSpec:
    """Return a spec with other parts (fields of :class:`InputSpec`) of its image input."""
    image = dataclasses.replace(spec.image, **parts)
    return dataclasses.replace(spec, inputs={**spec.inputs, "image": image})


GGUFType: TypeAlias = Literal[
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_m", "q5_k_m", "q6_k"
]
"""How GGUF files store matrices. The last three are made by llama.cpp's own quantizer."""

KVCache: TypeAlias = Literal["fp32", "int8"]
"""How an ONNX decoder stores keys and values."""

GGUF_TYPES: tuple[GGUFType, ...] = typing.get_args(GGUFType)
