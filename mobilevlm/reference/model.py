"""The whole model in float32 torch: tower, projector and decoder under their canonical names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mobilevlm.audio_encoder import ConformerEncoder, WhisperEncoder
from mobilevlm.checkpoint import Weights
from mobilevlm.image import normalize
from mobilevlm.image_encoder import ConvEncoder, NativeEncoder, TransformerEncoder
from mobilevlm.model import Model
from mobilevlm.prompt import (
    Arrays,
    Assembly,
    Piece,
    Prepared,
    grid_positions,
    in_runs,
    run_spans,
    token_ids,
    visual_positions,
)
from mobilevlm.reference.assembly import assemble_rows
from mobilevlm.reference.clip import ClipTower
from mobilevlm.reference.conformer import ConformerTower
from mobilevlm.reference.decoder import Decoder, block_mask
from mobilevlm.reference.drawing import CodeEmbedding, CodeHead, ImageDecoder, guided
from mobilevlm.reference.encoder_decoder import EncoderDecoder
from mobilevlm.reference.experts import Capacity
from mobilevlm.reference.fastvit import FastVit
from mobilevlm.reference.native import NativeTower
from mobilevlm.reference.projectors import build_projector
from mobilevlm.reference.steps import State, Step, run_steps, steps_of
from mobilevlm.reference.whisper import WhisperTower
from mobilevlm.spec import ModelSpec

ENCODERS: dict[type, Callable[[Any], nn.Module]] = {
    TransformerEncoder: ClipTower,
    ConvEncoder: FastVit,
    NativeEncoder: NativeTower,
    WhisperEncoder: WhisperTower,
    ConformerEncoder: ConformerTower,
}
"""Encoders by the class of their spec."""
_HELD: set[nn.Module] = set()
"""Streamed modules that keep their weights."""


@dataclass(frozen=True)
class ImageRows:
    """Rows of an image for the decoder."""

    tokens: Tensor
    """Visual tokens ``(rows, hidden_size)``"""
    deep: tuple[Tensor, ...] = ()
    """Rows that are added after each of the decoder's ``deep_layers``, of the same shape"""


class ReferenceModel(nn.Module):
    """Parameters carry the canonical names (``vision.…`` or ``audio.…``, ``projector.…``,
    ``decoder.…``)."""

    vision: Any
    projector: Any

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        encoded = spec.encoded
        if encoded is not None:
            self.add_module(spec.encoder_stage, ENCODERS[type(encoded.encoder)](encoded.encoder))
            self.projector = build_projector(encoded.connector)
        build = EncoderDecoder if spec.decoder.encoder_layers else Decoder
        self.decoder: Any = build(spec.decoder)
        if spec.draws:
            width = spec.decoder.hidden_size
            self.image_head = CodeHead(spec.drawing, width)
            self.codes = CodeEmbedding(spec.drawing, width)
            self.image_decoder = ImageDecoder(spec.drawing)

    def vision_steps(self) -> list[Step]:
        """Return the steps from normalised pixels, or log-mel frames, to the encoder's features."""
        if self.spec.encoded is None:
            return []
        return steps_of(self.spec.encoder_stage, self.get_submodule(self.spec.encoder_stage))

    def projector_steps(self) -> list[Step]:
        """Return the steps from there to visual tokens."""
        return [] if self.spec.encoded is None else steps_of("projector", self.projector)

    def decoder_steps(self) -> list[Step]:
        """Return the steps from embeddings to what the head reads."""
        return steps_of("decoder", self.decoder)

    def image_state(self, arrays: Arrays) -> State:
        """Return the state before the tower's first step; ``arrays``: of one run of the encoder."""
        if "mel" in arrays:
            return State(torch.from_numpy(arrays["mel"])[None])
        pixels = normalize(arrays["pixels"], self.spec.image.pixels)
        further = {name: arrays[name] for name in arrays if name != "pixels"}
        given = {name: torch.from_numpy(array) for name, array in further.items()}
        return State(torch.from_numpy(pixels)[None], given)

    def features(self, pixels: NDArray[np.uint8]) -> Tensor:
        """uint8 ``(height, width, 3)`` to tower features ``(num_features, vision hidden_size)``."""
        return self.run_features({"pixels": pixels})

    def run_features(self, arrays: Arrays) -> Tensor:
        """Return the encoder's features in a run ``(num_features, encoder hidden_size)``."""
        return run_steps(self.vision_steps(), self.image_state(arrays)).hidden[0]

    def visual_tokens(self, pixels: NDArray[np.uint8], **further: NDArray[Any]) -> Tensor:
        """uint8 ``(height, width, 3)``, and further arrays that the connector reads, to the rows
        of one run ``(num_rows, hidden_size)``."""
        steps = (*self.vision_steps(), *self.projector_steps())
        return run_steps(steps, self.image_state({"pixels": pixels, **further})).hidden[0]

    def image_rows(self, image: Prepared) -> Tensor:
        """Return the visual tokens of an image ``(rows, hidden_size)``."""
        return self.see(image).tokens

    def see(self, image: Prepared) -> ImageRows:
        """Return all that the decoder is given of an image."""
        steps = (*self.vision_steps(), *self.projector_steps())
        states = [run_steps(steps, self.image_state(arrays)) for arrays in image.arrays]
        return self.rows_of(states, image.assembly)

    def rows_of(self, states: Sequence[State], assembly: Assembly | None = None) -> ImageRows:
        """Return the rows of an image from the states of its runs behind the projector."""
        names = [f"deep.{index}" for index in range(len(self.spec.decoder.deep_layers))]
        return ImageRows(
            assemble_rows([state.hidden[0] for state in states], assembly),
            tuple(torch.cat([state.given[name][0] for state in states]) for name in names),
        )

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

    def prompt(self, pieces: Sequence[Piece], images: Sequence[ImageRows | Tensor]) -> State:
        """Return the decoder's state of a prompt before the first step; ``images``: rows for its
        runs, those of images that add nothing after layers as tensors. Unlike :meth:`embed`, it
        says where the prompt's rows stand and what they see."""
        shown = [ImageRows(image) if isinstance(image, Tensor) else image for image in images]
        spec, tokens = self.spec.decoder, [image.tokens for image in shown]
        embeds = self.embed(pieces, tokens)[None]
        further: dict[str, Any] = {}
        if spec.rope_sections:
            further["positions"] = torch.from_numpy(grid_positions(pieces, spec.position_axes))
        if spec.sound_rank and images:
            further["heard"] = True
        if spec.layer_input_size:
            ids = token_ids(pieces)
            further["ids"] = torch.from_numpy(np.where(ids < 0, spec.layer_input_id, ids))[None]
        if spec.image_blocks and images:
            further["mask"] = block_mask(embeds.shape[1], run_spans(pieces))
        if any(image.deep for image in shown):
            places = torch.from_numpy(visual_positions(pieces))
            further["deep"] = [torch.zeros_like(embeds) for _ in spec.deep_layers]
            layers = zip(*(image.deep for image in shown), strict=True)
            for added, rows in zip(further["deep"], layers, strict=True):
                added[0, places] = torch.cat(rows)
        out: State = self.decoder.start(embeds, **further)
        return out

    def logits(
        self, prompt: Tensor | State, positions: Tensor | None = None, deep: Sequence[Tensor] = ()
    ) -> Tensor:
        """Return the logits ``(length, vocab_size)`` of a prompt; of a model with an encoder those
        of the first token ``(1, vocab_size)``. ``prompt``: of :meth:`prompt`, or embeddings
        ``(length, hidden_size)`` of a text. With these ``positions`` of several axes ``(axes,
        length)``, those of a text when not given, and ``deep``: what is added after each of the
        decoder's ``deep_layers``, as the embeddings."""
        if self.spec.decoder.encoder_layers:
            return self.answer_logits(prompt, [])
        if isinstance(prompt, State):
            state = prompt
        else:
            added = [rows[None] for rows in deep]
            state = self.decoder.start(prompt[None], positions, deep=added)
        out: Tensor = self.decoder.logits(run_steps(self.decoder_steps(), state).hidden)[0]
        return out

    def answer_logits(self, prompt: Tensor | State, answer: Sequence[int]) -> Tensor:
        """Logits ``(len(answer) + 1, vocab_size)`` that the tokens of an answer, and the next, are
        taken from. ``prompt`` as of :meth:`logits`."""
        if isinstance(prompt, Tensor):
            prompt = self.decoder.start(prompt[None])
        state = run_steps(self.decoder_steps(), self.decoder.answered(prompt, answer))
        out: Tensor = self.decoder.logits(state.hidden)[0, -len(answer) - 1 :]
        return out

    def greedy(self, prompt: Tensor | State, steps: int) -> list[int]:
        """The next ``steps`` tokens, each from a full pass: slow, and with no cache to be wrong."""
        tokens: list[int] = []
        for _ in range(steps):
            tokens.append(int(self.answer_logits(prompt, tokens)[-1].argmax()))
        return tokens

    def code_logits(self, embeds: Tensor) -> Tensor:
        """Return the logits ``(sequences, num_codes)`` of the code after sequences of embeddings
        ``(sequences, length, hidden_size)``."""
        state = run_steps(self.decoder_steps(), self.decoder.start(embeds))
        out: Tensor = self.image_head(state.hidden[:, -1])
        return out

    def next_code_logits(self, embeds: Tensor, count: int) -> Tensor:
        """Return the logits ``(count, num_codes)`` of the code after each of the last positions of
        embeddings ``(length, hidden_size)``."""
        state = run_steps(self.decoder_steps(), self.decoder.start(embeds[None]))
        out: Tensor = self.image_head(state.hidden[0, -count:])
        return out

    def draw_greedily(self, prompts: Tensor, scale: float) -> tuple[list[int], Tensor]:
        """Return the codes of an image and the head's logits ``(codes, sequences, num_codes)``,
        each from a full pass. ``prompts``: ids ``(sequences, length)``, the unconditional prompt
        second, if there is one; ``scale``: of guidance."""
        rows, codes, steps = self.decoder.embed_tokens(prompts), list[int](), list[Tensor]()
        for _ in range(self.spec.drawing.num_tokens):
            steps.append(self.code_logits(rows))
            codes.append(int(guided(steps[-1], scale).argmax()))
            row = self.codes(torch.tensor(codes[-1:]))
            rows = torch.cat([rows, row.expand(len(rows), 1, -1)], dim=1)
        return codes, torch.stack(steps)


_FILLING = (
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.kaiming_uniform_,
    Tensor.normal_,
    Tensor.uniform_,
)
"""Functions that fill a tensor with random numbers; older torch passes a mode the latter only."""


class _NoInitialValues(TorchFunctionMode):
    """Modules are made without random weights: on ``meta`` there is nothing to fill, and trying
    imports torch's compiler, which takes seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in _FILLING:
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def load_reference(
    model: Model, streamed: bool = False, capacity: Capacity | None = None
) -> ReferenceModel:
    """The reference with a checkpoint's weights.

    ``streamed``: each layer's weights are read when it runs and dropped after, so that a model
    larger than memory can be measured; one pass then reads the whole checkpoint. ``capacity``: of
    experts, as the official gate has it; what runs on devices has none.
    """
    with torch.device("meta"), _NoInitialValues():
        reference = ReferenceModel(model.spec)
    if capacity is not None:
        for sparse in reference.decoder.sparse_layers.values():
            sparse.capacity = capacity
    blocks = _blocks(reference)
    for name, block in blocks.items():
        if streamed:
            _stream(block, model.weights, name)
        else:
            fill_block(block, model.weights, name)
    for name, module in reference.named_modules():
        if not _is_inside(name, blocks):  # a class token, the queries of a Q-Former
            fill_block(module, model.weights, name, recurse=False)
    decoder = model.spec.decoder
    if decoder.layer_input_size:
        shape = (decoder.vocab_size, decoder.layer_input_width)
        rows_at = partial(model.weights.rows_at, "decoder.embed_layers.weight", shape)
        reference.decoder.embed_layers.rows_at = rows_at
    return reference.eval()


@contextmanager
def held(block: nn.Module) -> Iterator[None]:
    """Keep a streamed module's weights from its first call to the end, for many calls."""
    if block in _HELD:
        yield
        return
    _HELD.add(block)
    try:
        yield
    finally:
        _HELD.remove(block)
        block.to("meta")


def _blocks(reference: ReferenceModel) -> dict[str, nn.Module]:
    """Return the units that are filled at once: the modules of steps, and single modules."""
    parts = (reference.vision_steps(), reference.projector_steps(), reference.decoder_steps())
    blocks = {step.name: step.module for steps in parts for step in steps}
    single = {
        name: module
        for name, module in reference.named_modules()
        if not list(module.children()) and not _is_inside(name, blocks)
    }
    whole = (blocks | single).items()
    return {name: module for name, module in whole if list(module.parameters())}


def _is_inside(name: str, blocks: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{outer}.") for outer in blocks)


def fill_block(block: nn.Module, weights: Weights, prefix: str, recurse: bool = True) -> None:
    """Read the parameters of a block with this canonical name; ``recurse``: of its modules too."""
    for name, parameter in list(block.named_parameters(recurse=recurse)):
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
    array = weights.read(name, tuple(like.shape))
    whole = array if array.base is None else array.base
    # What was just made, and no part of a file or of a larger tensor, needs no second copy.
    is_own = type(whole) is np.ndarray and whole.flags.owndata and whole.size == array.size
    return torch.from_numpy(array if is_own and whole.flags.writeable else np.array(array))
