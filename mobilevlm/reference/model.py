"""The whole model in float32 torch: tower, projector and decoder under their canonical names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilevlm.checkpoint import Weights
from mobilevlm.image import normalize
from mobilevlm.model import Model
from mobilevlm.prompt import Arrays, Piece, in_runs
from mobilevlm.reference.clip import ClipLayer, ClipTower
from mobilevlm.reference.decoder import Decoder, DecoderLayer
from mobilevlm.reference.encoder_decoder import EncoderDecoder, EncoderLayer
from mobilevlm.reference.experts import Capacity
from mobilevlm.reference.projectors import build_projector
from mobilevlm.spec import ModelSpec

_LAYERS = (ClipLayer, DecoderLayer, EncoderLayer)
"""Units of streaming."""
_HELD: set[nn.Module] = set()
"""Streamed layers that keep their weights."""


class ReferenceModel(nn.Module):
    """Parameters carry the canonical names (``vision.…``, ``projector.…``, ``decoder.…``)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.vision = ClipTower(spec.image.encoder)
        self.projector = build_projector(spec.image.connector)
        build = EncoderDecoder if spec.decoder.encoder_layers else Decoder
        self.decoder: Any = build(spec.decoder)

    def features(self, pixels: NDArray[np.uint8]) -> Tensor:
        """uint8 ``(size, size, 3)`` to tower features ``(num_features, vision hidden_size)``."""
        values = torch.from_numpy(normalize(pixels, self.spec.image.square))
        out: Tensor = self.vision(values[None])[0]
        return out

    def visual_tokens(self, pixels: NDArray[np.uint8], **further: NDArray[Any]) -> Tensor:
        """uint8 ``(size, size, 3)``, and further named arrays that the connector reads, to visual
        tokens ``(num_tokens, hidden_size)``."""
        return self.project(self.features(pixels)[None], further)[0]

    def project(self, features: Tensor, arrays: Arrays = MappingProxyType({})) -> Tensor:
        """``(batch, num_features, vision hidden_size)`` to ``(batch, num_tokens, hidden_size)``.
        ``arrays``: those of the encoder, which the connector may read too."""
        names = self.spec.image.connector.array_names
        further = {name: torch.from_numpy(arrays[name]) for name in names}
        out: Tensor = self.projector(features, **further)
        return out

    def embed(self, pieces: Sequence[Piece], images: Sequence[Tensor]) -> Tensor:
        """A prompt to embeddings ``(length, hidden_size)``; ``images``: rows for its runs."""
        parts, start = [], 0
        rows = torch.cat(list(images)) if images else torch.empty(0)
        for part in in_runs(pieces):
            if isinstance(part, list):
                parts.append(self.decoder.embed_tokens(torch.tensor(part)))
            else:
                parts.append(rows[start : start + part.rows])
                start += part.rows
        return torch.cat(parts)

    def logits(self, embeds: Tensor) -> Tensor:
        """Embeddings ``(length, hidden_size)`` to logits ``(length, vocab_size)``; of a model with
        an encoder to those of the first token ``(1, vocab_size)``."""
        if self.spec.decoder.encoder_layers:
            return self.answer_logits(embeds, [])
        out: Tensor = self.decoder(embeds[None])[0]
        return out

    def answer_logits(self, embeds: Tensor, answer: Sequence[int]) -> Tensor:
        """Logits ``(len(answer) + 1, vocab_size)`` that the tokens of an answer, and the next, are
        taken from. ``embeds``: of the prompt ``(length, hidden_size)``."""
        if self.spec.decoder.encoder_layers:
            tokens = torch.tensor([[self.spec.decoder.start_token_id, *answer]])
            out: Tensor = self.decoder(embeds[None], tokens)[0]
            return out
        tokens = torch.tensor(answer).long()
        whole = torch.cat([embeds, self.decoder.embed_tokens(tokens)])
        return self.logits(whole)[len(embeds) - 1 :]

    def greedy(self, embeds: Tensor, steps: int) -> list[int]:
        """The next ``steps`` tokens, each from a full pass: slow, and with no cache to be wrong."""
        tokens: list[int] = []
        for _ in range(steps):
            tokens.append(int(self.answer_logits(embeds, tokens)[-1].argmax()))
        return tokens


def load_reference(
    model: Model, streamed: bool = False, capacity: Capacity | None = None
) -> ReferenceModel:
    """The reference with a checkpoint's weights.

    ``streamed``: each layer's weights are read when it runs and dropped after, so that a model
    larger than memory can be measured; one pass then reads the whole checkpoint. ``capacity``: of
    experts, as the official gate has it; what runs on devices has none.
    """
    with torch.device("meta"):
        reference = ReferenceModel(model.spec)
    if capacity is not None:
        for sparse in reference.decoder.sparse_layers.values():
            sparse.capacity = capacity
    if model.spec.image.encoder.class_token:
        reference.vision.class_embedding = nn.Parameter(
            _read(model.weights, "vision.class_embedding", reference.vision.class_embedding),
            requires_grad=False,
        )
    for name, block in _blocks(reference):
        if streamed:
            _stream(block, model.weights, name)
        else:
            fill_block(block, model.weights, name)
    return reference.eval()


@contextmanager
def held(block: nn.Module) -> Iterator[None]:
    """Keeps a streamed layer's weights from its first call to the end, for many calls."""
    _HELD.add(block)
    try:
        yield
    finally:
        _HELD.remove(block)
        block.to("meta")


def _blocks(reference: ReferenceModel) -> Iterator[tuple[str, nn.Module]]:
    """The units that are filled at once: whole layers, the projector, and single modules."""
    whole: list[str] = []
    for name, module in reference.named_modules():
        if any(name.startswith(f"{outer}.") for outer in whole):
            continue
        if isinstance(module, _LAYERS) or name == "projector":
            whole.append(name)
            yield name, module
        elif list(module.parameters(recurse=False)) and not list(module.children()):
            yield name, module


def fill_block(block: nn.Module, weights: Weights, prefix: str) -> None:
    """Reads all parameters of a block with this canonical name."""
    for name, parameter in list(block.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = _read(weights, f"{prefix}.{name}", parameter)
        setattr(block.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _stream(block: nn.Module, weights: Weights, prefix: str) -> None:
    def load(module: nn.Module, _: Any) -> None:
        if next(module.parameters()).is_meta:
            fill_block(module, weights, prefix)

    def drop(module: nn.Module, *_: Any) -> None:
        if module not in _HELD:
            module.to("meta")

    block.register_forward_pre_hook(load)
    block.register_forward_hook(drop)


def _read(weights: Weights, name: str, like: Tensor) -> Tensor:
    return torch.from_numpy(np.array(weights.read(name, tuple(like.shape))))
