"""The whole model in float32 torch: tower, projector and decoder under their canonical names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mobilevlm.checkpoint import Weights
from mobilevlm.image import normalize
from mobilevlm.input_spec import ConvEncoder, TransformerEncoder
from mobilevlm.model import Model
from mobilevlm.prompt import Arrays, Piece, Prepared, in_runs
from mobilevlm.reference.assembly import assemble_rows
from mobilevlm.reference.clip import ClipTower
from mobilevlm.reference.decoder import Decoder
from mobilevlm.reference.encoder_decoder import EncoderDecoder
from mobilevlm.reference.experts import Capacity
from mobilevlm.reference.fastvit import FastVit
from mobilevlm.reference.projectors import build_projector
from mobilevlm.reference.steps import State, Step, run_steps, steps_of
from mobilevlm.spec import ModelSpec

ENCODERS: dict[type, Callable[[Any], nn.Module]] = {
    TransformerEncoder: ClipTower,
    ConvEncoder: FastVit,
}
"""Image encoders by the class of their spec."""
_HELD: set[nn.Module] = set()
"""Streamed modules that keep their weights."""


class ReferenceModel(nn.Module):
    """Parameters carry the canonical names (``vision.…``, ``projector.…``, ``decoder.…``)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.vision: Any = ENCODERS[type(spec.image.encoder)](spec.image.encoder)
        self.projector = build_projector(spec.image.connector)
        build = EncoderDecoder if spec.decoder.encoder_layers else Decoder
        self.decoder: Any = build(spec.decoder)

    def vision_steps(self) -> list[Step]:
        """Return the steps from normalised pixels to the tower's features."""
        return steps_of("vision", self.vision)

    def projector_steps(self) -> list[Step]:
        """Return the steps from there to visual tokens."""
        return steps_of("projector", self.projector)

    def decoder_steps(self) -> list[Step]:
        """Return the steps from embeddings to what the head reads."""
        return steps_of("decoder", self.decoder)

    def image_state(self, arrays: Arrays) -> State:
        """Return the state before the tower's first step; ``arrays``: of one run of the encoder."""
        pixels = normalize(arrays["pixels"], self.spec.image.square)
        further = {name: arrays[name] for name in arrays if name != "pixels"}
        given = {name: torch.from_numpy(array) for name, array in further.items()}
        return State(torch.from_numpy(pixels)[None], given)

    def features(self, pixels: NDArray[np.uint8]) -> Tensor:
        """uint8 ``(size, size, 3)`` to tower features ``(num_features, vision hidden_size)``."""
        return run_steps(self.vision_steps(), self.image_state({"pixels": pixels})).hidden[0]

    def visual_tokens(self, pixels: NDArray[np.uint8], **further: NDArray[Any]) -> Tensor:
        """uint8 ``(size, size, 3)``, and further named arrays that the connector reads, to the rows
        of one run ``(num_rows, hidden_size)``."""
        steps = (*self.vision_steps(), *self.projector_steps())
        return run_steps(steps, self.image_state({"pixels": pixels, **further})).hidden[0]

    def image_rows(self, image: Prepared) -> Tensor:
        """Return the visual tokens of an image ``(rows, hidden_size)``."""
        parts = [self.visual_tokens(**arrays) for arrays in image.arrays]
        return assemble_rows(parts, image.assembly)

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

    def logits(
        self, embeds: Tensor, positions: Tensor | None = None, deep: Sequence[Tensor] = ()
    ) -> Tensor:
        """Embeddings ``(length, hidden_size)`` to logits ``(length, vocab_size)``; of a model with
        an encoder to those of the first token ``(1, vocab_size)``. ``positions``: of several axes
        ``(axes, length)``, those of a text when not given; ``deep``: what is added after each of
        the decoder's ``deep_layers``, as ``embeds``."""
        if self.spec.decoder.encoder_layers:
            return self.answer_logits(embeds, [])
        added = [rows[None] for rows in deep]
        out: Tensor = self.decoder(embeds[None], positions, deep=added)[0]
        return out

    def answer_logits(self, embeds: Tensor, answer: Sequence[int]) -> Tensor:
        """Logits ``(len(answer) + 1, vocab_size)`` that the tokens of an answer, and the next, are
        taken from. ``embeds``: of the prompt ``(length, hidden_size)``."""
        state = run_steps(self.decoder_steps(), self.decoder.answered(embeds[None], answer))
        out: Tensor = self.decoder.logits(state.hidden)[0, -len(answer) - 1 :]
        return out

    def greedy(self, embeds: Tensor, steps: int) -> list[int]:
        """The next ``steps`` tokens, each from a full pass: slow, and with no cache to be wrong."""
        tokens: list[int] = []
        for _ in range(steps):
            tokens.append(int(self.answer_logits(embeds, tokens)[-1].argmax()))
        return tokens


_DRAWING = (
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
        if func in _DRAWING:
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
