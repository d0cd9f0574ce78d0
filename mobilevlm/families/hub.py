"""Checkpoints in the layout of the Hugging Face hub: one config.json with a part for the tower and
one for the language model, and the tokenizer's, template's and processor's files beside it.

Tensors have had several names over the releases of transformers; all of them are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mobilevlm.adapters.merging import MergedFiles
from mobilevlm.checkpoint import TensorFiles, TensorRef, Weights, check_presence, read_json
from mobilevlm.conversation import render, user_message
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import CheckpointError, PromptError
from mobilevlm.families.backbones import LLAMA, LLAMA_DEFAULTS, Backbone, skipped_names
from mobilevlm.families.config import check_only, config_value, end_ids
from mobilevlm.families.gemma4_text import GEMMA4
from mobilevlm.families.lfm2 import LFM2
from mobilevlm.families.qwen3_5 import QWEN3_5
from mobilevlm.families.qwen_gemma import (
    GEMMA3,
    MISTRAL,
    QWEN2,
    QWEN2_VL,
    QWEN3,
    QWEN3_VL,
)
from mobilevlm.families.registry import Source
from mobilevlm.families.towers import check_steps, skipped_tower_names, tower_names
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.spec import IMAGE_PLACEHOLDER, ConversationSpec
from mobilevlm.tokenizers.tokenizer import token_text, tokenizer_settings

_QWEN: dict[str, Any] = {
    **LLAMA_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
"""Defaults of ``Qwen2Config`` and ``Qwen3Config``."""
_MISTRAL: dict[str, Any] = {
    **LLAMA_DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
"""Defaults of ``MistralConfig``; that of ``sliding_window`` its reader knows."""
BACKBONES: dict[str, tuple[Backbone, dict[str, Any]]] = {
    "llama": (LLAMA, LLAMA_DEFAULTS),
    "mistral": (MISTRAL, _MISTRAL),
    "qwen2": (QWEN2, _QWEN),
    "qwen3": (QWEN3, _QWEN),
    "qwen2_vl_text": (QWEN2_VL, _QWEN),
    "qwen2_5_vl_text": (QWEN2_VL, _QWEN),
    "qwen3_vl_text": (QWEN3_VL, _QWEN),
    "qwen3_5_text": (QWEN3_5, {}),
    "gemma3_text": (GEMMA3, {}),
    "gemma4_text": (GEMMA4, {}),
    "lfm2": (LFM2, {}),
}
"""Language models by ``model_type`` of ``text_config``, with the defaults of their keys."""
_DECODERS = (
    ("model.language_model", "lm_head"),
    ("language_model.model", "language_model.lm_head"),
    ("model.text_model", "lm_head"),
    ("model.language_model.model", "model.language_model.lm_head"),
    ("language_model", "lm_head"),
    ("text_model", "lm_head"),
    ("model", "lm_head"),
)
"""Names that a language model's tensors, and its head, have been under."""
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_VIDEOS = "video_preprocessor_config.json"
_FOR_IMAGES = "how images are prepared"
_QUESTION = "What is it?"


@dataclass(frozen=True)
class HubCheckpoint:
    """Settings and tensor names of a checkpoint in this layout."""

    source: Source
    files: TensorFiles | MergedFiles
    text_key: str = "text_config"
    """Key of the language model's configuration; empty: it is the whole."""

    @property
    def path(self) -> Path:
        """The file config.json."""
        return self.source.folder / "config.json"

    @cached_property
    def text(self) -> dict[str, Any]:
        """Configuration of the language model."""
        if not self.text_key:
            return self.source.config
        return config_value(self.path, self.source.config, self.text_key, dict)

    @cached_property
    def vision(self) -> dict[str, Any]:
        """Configuration of the tower."""
        return config_value(self.path, self.source.config, "vision_config", dict)

    @cached_property
    def processor_path(self) -> Path:
        """The file with the settings of the image processor."""
        folders = [self.source.folder_with(name) for name in _PROCESSORS]
        places = [folder / name for folder, name in zip(folders, _PROCESSORS, strict=True)]
        return next((place for place in places if place.is_file()), places[0])

    @cached_property
    def processor(self) -> dict[str, Any]:
        """Settings of the image processor.

        Raises:
            CheckpointError: the checkpoint has none, or leaves out a step that is always done here.
        """
        return self.processor_that(normalizes=True)

    def processor_that(self, normalizes: bool) -> dict[str, Any]:
        """Return the settings of an image processor that normalises pixels, or one that leaves it
        to the tower; errors as of :attr:`processor`."""
        settings = self._processor_settings()
        if not normalizes:
            check_only(self.processor_path, settings, {"do_normalize": False})
            settings = {**settings, "do_normalize": True}
        check_steps(self.processor_path, settings)
        return settings

    def _processor_settings(self) -> dict[str, Any]:
        settings = read_json(self.processor_path, required_for=_FOR_IMAGES)
        if self.processor_path.name == _PROCESSORS[0]:
            return settings
        if "image_processor" not in settings:  # of a release that had a file for each
            return read_json(self.processor_path.with_name(_PROCESSORS[0]), _FOR_IMAGES)
        return config_value(self.processor_path, settings, "image_processor", dict)

    @cached_property
    def video_processor(self) -> tuple[Path, dict[str, Any]] | None:
        """Settings of the video processor and their file; none where it has no settings of its own.

        Raises:
            CheckpointError: they leave out a step that is always done here.
        """
        path = self.source.folder_with(_VIDEOS) / _VIDEOS
        if path.is_file():
            settings = read_json(path)
        else:
            path = self.source.folder_with(_PROCESSORS[1]) / _PROCESSORS[1]
            both = read_json(path) if path.is_file() else {}
            if both.get("video_processor") is None:
                return None
            settings = config_value(path, both, "video_processor", dict)
        check_steps(path, settings)
        return path, settings

    def image_token(self, *keys: str) -> tuple[int, str]:
        """Return the id that stands for a visual token, which one of these keys of config.json
        names, and its text.

        Raises:
            CheckpointError: no key, or the tokenizer lacks the token.
        """
        key = next((key for key in keys if self.source.config.get(key) is not None), keys[0])
        index = config_value(self.path, self.source.config, key, int)
        text = self.source.tokenizer.id_to_token(index)
        if text is None:
            raise CheckpointError(
                f"{self.path}: {key!r} is {index}, which the tokenizer lacks: give the tokenizer's "
                f"files of this checkpoint"
            )
        return index, text

    def token_id(self, text: str) -> int:
        """Return the id of a special token.

        Raises:
            CheckpointError: the tokenizer lacks it.
        """
        index = self.source.tokenizer.token_to_id(text)
        if index is None:
            raise CheckpointError(
                f"{self.source.folder}: the tokenizer lacks {text!r}, which stands around images: "
                f"give the tokenizer's files of this checkpoint"
            )
        return index

    def prefix(self, candidates: Iterable[str], probe: str) -> str:
        """Return the first of these beginnings with which the tensor ``probe`` is there; else the
        very first, which a message about missing tensors then names."""
        known = list(candidates)
        return next((start for start in known if f"{start}{probe}" in self.files), known[0])

    def tower_refs(
        self, vision: TransformerEncoder, beginnings: Iterable[str]
    ) -> tuple[dict[str, TensorRef], list[str]]:
        """Return the tensors of a tower of CLIP's or SigLIP's names, behind one of these
        beginnings, and patterns of those beside them that nothing reads."""
        place = self.prefix(beginnings, "vision_model.embeddings.patch_embedding.weight")
        refs = {
            ours: TensorRef(self.files, place + theirs)
            for ours, theirs in tower_names(vision).items()
        }
        return refs, skipped_tower_names(vision, self.vision, re.escape(place))

    def decoder(self) -> tuple[DecoderSpec, Backbone]:
        """Return the language model, and the names of its tensors. Whether the head is the
        embedding table, ``text_config`` says before the rest, and where neither does the file.

        Raises:
            CheckpointError: it is of no known kind, or a value is missing or wrong.
        """
        kind = config_value(self.path, self.text, "model_type", str, "llama")
        if kind not in BACKBONES:
            raise CheckpointError(
                f"{self.path}: {self.text_key!r} has model_type {kind!r:.60}, expected one of "
                f"{', '.join(BACKBONES)}"
            )
        backbone, defaults = BACKBONES[kind]
        probe = f".{backbone.embed_tokens}.weight"
        root, head = next(
            (two for two in _DECODERS if f"{two[0]}{probe}" in self.files), _DECODERS[0]
        )
        heads = [
            name for name in dict.fromkeys((head, "lm_head")) if f"{name}.weight" in self.files
        ]
        outer = ("vocab_size", "tie_word_embeddings")
        given = {key: self.source.config[key] for key in outer if key in self.source.config}
        given |= {
            key: value
            for key, value in self.text.items()
            if value is not None or key == "sliding_window"  # null: none, not the default
        }
        spec = backbone.read(self.path, {**defaults, "tie_word_embeddings": not heads, **given})
        return spec, replace(backbone, root=root, lm_head=heads[0] if heads else head)

    def weights(
        self,
        refs: dict[str, TensorRef],
        decoder: DecoderSpec,
        backbone: Backbone,
        skipped: Iterable[str] = (),
    ) -> Weights:
        """Return the weights of tensors. ``skipped``: patterns of names that nothing reads, beside
        the language model's.

        Raises:
            CheckpointError: one is missing, or another is not read.
        """
        check_presence(refs)
        may_skip = [*skipped_names(decoder, backbone), *skipped]
        self.source.check_unread(refs, self.files, may_skip)
        return Weights(refs)

    def conversation(
        self,
        image_mark: str = "",
        before: str = "",
        image_margin: str = "",
        shows: Literal["image", "audio"] = "image",
        parts: bool = True,
        otherwise: str | None = None,
    ) -> ConversationSpec:
        """Return the conversation of the checkpoint's own chat template. ``image_mark``: what the
        template writes for an image, empty where the model takes none; ``before``: template text
        that goes before it; ``image_margin`` and ``shows`` as of :class:`ConversationSpec`;
        ``parts``: the template takes contents as lists of parts; ``otherwise``: template of a
        checkpoint that brings none.

        Raises:
            CheckpointError: no template, one that fails or that drops the question or the image, or
                the asked conversation is another.
        """
        source = self.source
        if source.options.conversation is not None:
            raise CheckpointError(
                f"conversation {source.options.conversation!r}: this checkpoint brings a chat "
                f"template of its own: leave it out"
            )
        place, template = self._template(otherwise)
        folder = source.folder_with("generation_config.json")
        ids = end_ids(folder, {"eos_token_id": self.text.get("eos_token_id"), **source.config})
        settings = tokenizer_settings(source.folder)
        begin, end = (token_text(settings.get(f"{name}_token")) for name in ("bos", "eos"))
        if begin is not None and "bos_token" in template:
            before += f"{{%- set bos_token = {json.dumps(begin)} -%}}\n"
        index = None if end is None else source.tokenizer.token_to_id(end)
        if index is not None and index not in ids:
            ids = (*ids, index)
        found = ConversationSpec(
            before + template,
            ids,
            (),
            "joined",
            image_mark or IMAGE_PLACEHOLDER,
            parts=bool(image_mark) and parts,
            image_margin=image_margin,
            shows=shows,
        )
        try:
            asked = user_message(_QUESTION, int(bool(image_mark)), shows=shows)
            text = render(found, [asked])
        except PromptError as error:
            raise CheckpointError(f"{place}: {error}") from None
        if not image_mark:
            if _QUESTION not in text:
                raise CheckpointError(f"{place}: the chat template drops the question")
            return found
        if text.count(image_mark) != 1 or _QUESTION not in text:
            raise CheckpointError(
                f"{place}: the chat template writes {image_mark!r} {text.count(image_mark)} times "
                f"for a question about one {'image' if shows == 'image' else 'sound'}, expected "
                f"once beside the question"
            )
        return found

    def _template(self, otherwise: str | None = None) -> tuple[Path, str]:
        """Return the chat template and the file that it is in, or ``otherwise``."""
        for name in (*_TEMPLATES, "processor_config.json", "tokenizer_config.json"):
            place = self.source.folder_with(name) / name
            if not place.is_file():
                continue
            if place.suffix == ".jinja":
                return place, _read_text(place)
            template = read_json(place).get("chat_template")
            if isinstance(template, list):  # several, by name
                named = {
                    one.get("name"): one.get("template") for one in template if type(one) is dict
                }
                template = named.get("default")
            if isinstance(template, str):
                return place, template
        if otherwise is not None:
            return self.source.folder, otherwise
        raise CheckpointError(
            f"{self.source.folder}: no chat template: expected {_TEMPLATES[0]}, {_TEMPLATES[1]} or "
            f"'chat_template' in tokenizer_config.json"
        )


def open_hub(source: Source, text_key: str = "text_config") -> HubCheckpoint:
    """Open a checkpoint in this layout, or in one whose language model has another key.

    Raises:
        CheckpointError: a vision tower is given, which such a checkpoint has itself, or, as a
            language model alone, cannot have.
    """
    if source.options.vision_tower is not None:
        found = "has its vision tower inside" if text_key else "is a language model alone"
        raise CheckpointError(f"{source.folder}: this checkpoint {found}: leave --vision-tower out")
    return HubCheckpoint(source, source.weight_files(), text_key)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error!s:.200}") from None
