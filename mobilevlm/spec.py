"""ModelSpec: everything known about a model, as one tree of frozen dataclasses.

A family fills it from a checkpoint; the torch reference, the graph authors and the runtime read
only this. It is stored in a bundle's manifest, so a field added here, in input_spec.py, in
decoder_spec.py or in output_spec.py must have a default.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import MobileVLMError
from mobilevlm.input_spec import InputSpec
from mobilevlm.output_spec import ImageOutput

IMAGE_PLACEHOLDER = "<image>"
"""Marks an image in prompt text."""


@dataclass(frozen=True)
class ConversationSpec:
    """Rules that turn chat messages into input ids and end an answer."""

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
    image_margin: str = ""
    """Text on both sides of an image's mark before a ``joined`` text is tokenized, which may become
    one token with what stands there."""
    shows: Literal["image", "audio"] = "image"
    """Type of the parts that templates read beside texts; ``image_mark`` stands for them."""


@dataclass(frozen=True)
class ModelSpec:
    """One multimodal language model: its inputs, its decoder, its outputs, and what surrounds
    them."""

    family: str
    name: str
    inputs: dict[str, InputSpec]
    """Inputs beside text by their kind: ``image`` or ``audio``; none of a plain language model."""
    decoder: DecoderSpec
    conversation: ConversationSpec
    variant: str = ""
    """Name of one of several official behaviours, for families that have them."""
    outputs: dict[str, ImageOutput] = dataclasses.field(default_factory=dict)
    """Outputs beside text by their kind: ``image``."""
    sound_as_image: bool = False
    """Sounds are shown to the image encoder, as spectrograms (media/sound_image.py)."""

    @property
    def shown(self) -> frozenset[str]:
        """Kinds of what goes with a text in a prompt."""
        return frozenset(self.inputs) | ({"audio"} if self.sound_as_image else set())

    @property
    def draws(self) -> bool:
        """Return whether the model makes images."""
        return "image" in self.outputs

    @property
    def drawing(self) -> ImageOutput:
        """The output for images.

        Raises:
            MobileVLMError: the model makes none.
        """
        if not self.draws:
            raise MobileVLMError(
                f"{self.name}: this model cannot draw: give one that makes images (Janus-Pro)"
            )
        return self.outputs["image"]

    @property
    def has_images(self) -> bool:
        """Return whether the model takes images."""
        return "image" in self.inputs

    @property
    def has_sound(self) -> bool:
        """Return whether the model takes sound."""
        return "audio" in self.inputs

    @property
    def encoded(self) -> InputSpec | None:
        """The input that an encoder reads, images or sound; none of a plain language model."""
        return next(iter(self.inputs.values()), None)

    @property
    def encoder_stage(self) -> Literal["vision", "audio"]:
        """Name of the stage of that encoder and its connector; the encoder's canonical tensor names
        begin with it too."""
        return "audio" if self.has_sound else "vision"

    @property
    def reads_instructions(self) -> bool:
        """Return whether the image encoder reads the question."""
        return self.has_images and self.image.connector.reads_text

    @property
    def image(self) -> InputSpec:
        """The input for images.

        Raises:
            MobileVLMError: the model takes no images.
        """
        if not self.has_images:
            raise MobileVLMError(f"{self.name}: this model takes no images: leave them out")
        return self.inputs["image"]

    @property
    def audio(self) -> InputSpec:
        """The input for sound.

        Raises:
            MobileVLMError: the model takes no sound.
        """
        if not self.has_sound:
            raise MobileVLMError(f"{self.name}: this model takes no sound: leave it out")
        return self.inputs["audio"]


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
