"""Hugging Face transformers: CLIPVisionModel and LlamaForCausalLM with the checkpoint's weights,
and between them this project's torch projector (transformers has no LDP)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from comparison.work import Shapes, photo, questions, timed, token_ids
from mobilevlm.families import open_checkpoint
from mobilevlm.image import normalize
from mobilevlm.model import OpenOptions
from mobilevlm.reference.projectors import build_projector


def load(shapes: Shapes, threads: int, options: dict[str, Any]) -> Transformers:
    """``options``: ``checkpoint``, and ``dtype`` as torch names it."""
    torch.set_num_threads(threads)
    return Transformers(shapes, Path(options["checkpoint"]), getattr(torch, options["dtype"]))


class Transformers:
    """See :class:`comparison.work.Peer`. The tower stops at the layer whose features are used."""

    def __init__(self, shapes: Shapes, checkpoint: Path, dtype: torch.dtype) -> None:
        transformers.logging.set_verbosity_error()
        self._shapes, self._dtype = shapes, dtype
        model = open_checkpoint(checkpoint, OpenOptions())
        self._image = model.spec.image.square
        data = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        # The checkpoint's own class is not in transformers; its tensors have Llama's names.
        ignored = ("model_type", "architectures", "auto_map", "torch_dtype", "dtype")
        llama = transformers.LlamaConfig(
            **{key: value for key, value in data.items() if key not in ignored}
        )
        self._decoder = transformers.LlamaForCausalLM.from_pretrained(
            checkpoint, config=llama, dtype=dtype
        ).eval()
        with torch.device("meta"):
            projector = build_projector(model.spec.image.connector)
        weights = {
            name: torch.from_numpy(
                np.array(model.weights.read(f"projector.{name}", tuple(parameter.shape)))
            )
            for name, parameter in projector.named_parameters()
        }
        projector.load_state_dict(weights, assign=True)
        self._projector = projector.to(dtype).eval()
        self._tower = _tower(model, dtype)

    @torch.inference_mode()
    def encode(self, variation: int) -> float:
        return timed(self._encode, photo(self._shapes.photo, variation))[0]

    @torch.inference_mode()
    def generate(self, length: int, count: int, variation: int) -> tuple[float, float]:
        ids = token_ids(length, self._shapes.vocab_size, variation)
        cache = transformers.DynamicCache()
        prefill, token = timed(self._next, self._embed(ids), cache)

        def decode(token: int) -> None:
            for _ in range(count):
                token = self._next(self._embed([token]), cache)

        return prefill, timed(decode, token)[0]

    @torch.inference_mode()
    def ask(self, variation: int) -> tuple[float, float]:
        first, second = questions(self._shapes.vocab_size, variation)
        cache = transformers.DynamicCache()
        pixels = photo(self._shapes.photo, variation)

        def about_photo() -> int:
            return self._next(torch.cat([self._encode(pixels), self._embed(first)], 1), cache)

        def again() -> int:
            cache.crop(self._shapes.visual_tokens - cache.get_seq_length())  # as many are cut
            return self._next(self._embed(second), cache)

        return timed(about_photo)[0], timed(again)[0]

    def _encode(self, pixels: Any) -> torch.Tensor:
        values = torch.from_numpy(normalize(pixels, self._image))[None].to(self._dtype)
        hidden = self._tower(values, output_hidden_states=True).hidden_states[-1]
        visual: torch.Tensor = self._projector(hidden[:, 1:])
        return visual

    def _embed(self, ids: list[int]) -> torch.Tensor:
        embeds: torch.Tensor = self._decoder.get_input_embeddings()(torch.tensor([ids]))
        return embeds

    def _next(self, embeds: torch.Tensor, cache: Any) -> int:
        logits = self._decoder(
            inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        return int(logits[0, -1].argmax())


def _tower(model: Any, dtype: torch.dtype) -> Any:
    """CLIPVisionModel of the checkpoint's shape, with its weights."""
    vision = model.spec.image.encoder
    config = transformers.CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
    )
    with torch.device("meta"):
        tower = transformers.CLIPVisionModel(config)
    tower = tower.to_empty(device="cpu").to(dtype).eval()
    patches = torch.arange(vision.num_patches + 1)  # a buffer that no checkpoint holds
    tower.embeddings.position_ids.copy_(patches[None])
    for name, parameter in tower.named_parameters():
        if "post_layernorm" not in name:  # of the pooled output, which nobody reads
            value = model.weights.read(_canonical(name), tuple(parameter.shape))
            parameter.data.copy_(torch.from_numpy(np.array(value)))
    return tower


def _canonical(name: str) -> str:
    """CLIPVisionModel's name of a tensor (transformers 5) to this project's."""
    for theirs, ours in (
        ("embeddings.", ""),
        ("pre_layrnorm", "pre_norm"),
        ("encoder.layers", "layers"),
        ("layer_norm", "norm"),
        ("self_attn", "attn"),
    ):
        name = name.replace(theirs, ours)
    return f"vision.{name}"
