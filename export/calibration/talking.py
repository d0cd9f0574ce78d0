"""A temporary copy of a model with int8 weights, which answers several prompts at the same time.

A step reads all weights whatever the number of sequences, so eight of them take little longer than
one. Sequences of a batch have different lengths: the graph of a bundle, which has one, gets an
input more for them.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from mobilevlm.bundle import EmbeddingTable, layer_table
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.export.graph import author
from mobilevlm.export.graph.decoder import has_fused_rotary
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.model import Model
from mobilevlm.plan import Plan, default_threads
from mobilevlm.prompt import Rows
from mobilevlm.recipe import LinearFormat, Recipe
from mobilevlm.runtime.engines import EncoderEngine, Float32, NoImages
from mobilevlm.runtime.engines.onnx.buffered import BufferedDecoder
from mobilevlm.runtime.engines.onnx.engine import OnnxDecoder, OnnxVision, open_session
from mobilevlm.runtime.machine import int8_weight_bits
from mobilevlm.state_buffers import slot_buffers

BATCH = 8
"""Sequences: keys and values of so many take less memory than the weights."""
THREADS = 4
"""Threads of each stage, whatever the machine has: sums that are split otherwise round otherwise,
and another token may be drawn."""
_LENGTHS = "lengths"


class Sequences(Protocol):
    """Decoder that continues a batch of prompts."""

    @property
    def batch(self) -> int:
        """Most prompts at the same time."""

    def embed(self, ids: Sequence[int]) -> Float32:
        """Return embeddings ``(length, hidden_size)``."""

    def begin(self, prompts: Sequence[Rows], room: int) -> list[Float32]:
        """Read prompts; return the logits ``(vocab_size,)`` after each. ``room``: tokens that
        follow at most."""

    def step(self, tokens: Sequence[int]) -> list[Float32]:
        """Append a token to each; return the logits after each."""

    def close(self) -> None:
        """Free the weights."""


@dataclass(frozen=True)
class Talking:
    """A model that answers."""

    vision: EncoderEngine
    decoder: Sequences


@contextmanager
def open_talking(model: Model) -> Iterator[Talking]:
    """Write a temporary copy of a decoder-only model and open it."""
    spec, recipe = model.spec, talking_recipe()
    awake = default_threads() >= THREADS
    plan = Plan(vision_threads=THREADS, decoder_threads=THREADS, spinning=awake)
    with tempfile.TemporaryDirectory(prefix="mobilevlm-") as folder:
        tower, language, table = (Path(folder) / f"{name}.onnx" for name in ("v", "d", "e"))
        if spec.encoded is not None:
            author.author_encoded(model.weights, spec, recipe, tower)
        author.author_embeddings(model.weights, spec, recipe, table)
        author.author_decoder(model.weights, spec, recipe, language)
        rows = EmbeddingTable(
            f"{table.name}_data", 0, "float16", spec.decoder.vocab_size, spec.decoder.hidden_size
        )
        place, layers = table.with_name(rows.path), layer_table(rows, spec.decoder)
        if _has_batches(spec.decoder):
            decoder: Sequences = _Together(language, place, rows, spec.decoder, plan)
        else:
            decoder = _OneByOne(language, place, rows, spec.decoder, plan, layers)
        vision: EncoderEngine = NoImages()
        if spec.encoded is not None:
            vision = OnnxVision(tower, THREADS, plan.spinning, compact=True, spec=spec)
        try:
            yield Talking(vision, decoder)
        finally:
            vision.close()
            decoder.close()


def talking_recipe() -> Recipe:
    """Return the recipe of the copy: int8 without anything that takes time. All experts see all
    tokens: the operator for them does not take every size, and of experts one by one ONNX Runtime
    1.24 does not take those that no token has chosen."""
    layers, int8 = LinearFormat("int8"), RECIPES["int8"]
    plain = dataclasses.replace(
        int8,
        tower=layers,
        projector=layers,
        decoder=layers,
        lm_head=layers,
        layers={},
        experts="dense",
    )
    return plain.with_weight_bits(int8_weight_bits() or 7, auto_only=True)


def _has_batches(spec: DecoderSpec) -> bool:
    """Return whether the decoder's graph computes several sequences of different lengths: all that
    depends on a position is inside attention, and heads are as attention takes them."""
    apart = spec.rare_parts or spec.learned_positions or spec.qk_norm
    whole = spec.cache_head_dim == spec.head_dim
    layers = range(spec.num_hidden_layers)
    return not apart and whole and all(has_fused_rotary(spec, index) for index in layers)


class _OneByOne:
    """Any decoder, one sequence at a time."""

    batch = 1

    def __init__(
        self,
        path: Path,
        table: Path,
        embeddings: EmbeddingTable,
        spec: DecoderSpec,
        plan: Plan,
        layers: EmbeddingTable | None,
    ) -> None:
        self._engine = OnnxDecoder(path, table, embeddings, spec, plan, layers=layers)
        self._state = self._engine.new_state()
        self.embed, self.close = self._engine.embed, self._engine.close

    def begin(self, prompts: Sequence[Rows], room: int) -> list[Float32]:
        """See :class:`Sequences`."""
        [prompt] = prompts
        self._state = self._engine.new_state()
        return [self._engine.prefill(self._state, prompt)[-1]]

    def step(self, tokens: Sequence[int]) -> list[Float32]:
        """See :class:`Sequences`."""
        return [self._engine.step(self._state, token) for token in tokens]


class _Together(BufferedDecoder):
    """A decoder of keys and values alone, with a batch of sequences."""

    batch = BATCH

    def __init__(
        self, path: Path, table: Path, embeddings: EmbeddingTable, spec: DecoderSpec, plan: Plan
    ) -> None:
        super().__init__(table, embeddings, spec)
        _give_batches(path)
        self._session: Any = open_session(path, plan.threads_of("decoder"), plan.spinning)
        self._spec = spec
        self._lengths = np.zeros(0, np.int32)
        self._buffers: dict[str, Float32] = {}

    def begin(self, prompts: Sequence[Rows], room: int) -> list[Float32]:
        """See :class:`Sequences`."""
        self._lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        slots, count = int(self._lengths.max()) + room, len(prompts)
        self._buffers = {
            buffer.name: np.zeros((count, *buffer.sized(slots)[1:]), np.float32)
            for buffer in slot_buffers(self._spec)
        }
        return [self._run(rows.embeds[None], slice(i, i + 1))[0] for i, rows in enumerate(prompts)]

    def step(self, tokens: Sequence[int]) -> list[Float32]:
        """See :class:`Sequences`."""
        self._lengths += 1
        return list(self._run(self.embed(tokens)[:, None], slice(None)))

    def close(self) -> None:
        """See :class:`Sequences`."""
        self._session = None

    def _run(self, embeds: Float32, which: slice) -> Float32:
        """Return the last logits ``(batch, vocab_size)`` of a part of the sequences, whose new rows
        ``(batch, length, hidden_size)`` are in their lengths already."""
        lengths = self._lengths[which]
        inputs = {
            "inputs_embeds": np.ascontiguousarray(embeds),
            "total_length": lengths.max(keepdims=True),
            "logits_positions": np.array([embeds.shape[1] - 1]),
            _LENGTHS: lengths,
        }
        logits = np.empty((len(embeds), 1, self._spec.vocab_size), np.float32)
        outputs = {"logits": logits}
        for name, buffer in self._buffers.items():
            inputs[f"past_key_values.{name}"] = outputs[f"present.{name}"] = buffer[which]
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits[:, 0]


def _give_batches(path: Path) -> None:
    """Let a decoder's graph compute several sequences, each of its own length."""
    model = ir.load(path)
    graph = model.graph
    total = next(value for value in graph.inputs if value.name == "total_length")
    lengths = ir.Value(
        name=_LENGTHS, shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT32)
    )
    for node in graph:
        if node.op_type == "Sub" and node.inputs[0] is total:
            node.replace_input_with(0, lengths)
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None and value.shape.rank() > 1:
            value.shape = ir.Shape(["batch", *value.shape[1:]])
    graph.inputs.append(lengths)
    ir.save(model, path)
