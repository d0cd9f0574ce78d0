"""ONNX Runtime for both stages, on the CPU.

The decoder may have a second graph for prompts, with other weights and the same keys and values:
which of the two computes a piece of a prompt depends on the length of that piece alone.
"""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mobilevlm.bundle import EmbeddingTable
from mobilevlm.errors import BundleError, MemoryLimitError
from mobilevlm.plan import Plan
from mobilevlm.prompt import Arrays, Rows
from mobilevlm.runtime.engines import (
    CacheType,
    DecoderState,
    ExpertChoices,
    Float32,
    in_chunks,
    no_experts,
    still_open,
)
from mobilevlm.runtime.engines.contracts import check_decoder, check_encoder, check_vision
from mobilevlm.runtime.engines.onnx.buffered import BufferedDecoder, BufferedState
from mobilevlm.runtime.engines.onnx.mapped_pages import check_whole, trim_heap
from mobilevlm.runtime.engines.onnx.mapped_weights import MappedWeights, Session
from mobilevlm.spec import DecoderSpec, ModelSpec
from mobilevlm.waiting import processors_wanted

INT8_CACHE = (1, 27)
"""The first version whose GroupQueryAttention reads them, on x86-64; 1.24 to 1.26 do not."""
LONGEST_REASON = 200
"""Characters of onnxruntime's messages that errors quote."""
EXACT_PRODUCTS = {"session.x64quantprecision": "1"}
"""Settings of a session whose int8 products do not saturate on x86 without VNNI: weights become
unsigned, and pairs are summed in 32 bits. Slower, and nothing elsewhere."""
EXACT_SINCE = (1, 30)
"""The first version tried that takes them; 1.24 and 1.27 end the process."""
EMPTY_PRODUCTS = (1, 32)
"""The first version whose DynamicQuantizeMatMul gives no rows for no rows."""
INTEGER_EXPERTS = (1, 31)
"""The first version whose QMoE has the attributes that it is exported with."""


def open_session(
    path: Path,
    threads: int,
    spinning: bool = True,
    packed: bool = True,
    entries: Mapping[str, str] = MappingProxyType({}),
    planned: bool = True,
) -> Session:
    """A session on an ONNX file. ``spinning``: threads wait for work awake, unless other programs
    want the processors; ``packed``: weights are copied in the order that kernels like best, else
    they are used where they lie in the mapped file. ``entries``: further settings of it, as
    onnxruntime names them. ``planned``: the second run with the same shapes gets one block for all
    its buffers, beside what the first took.

    Raises:
        BundleError: onnxruntime cannot load it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors come as exceptions
    options.enable_mem_pattern = planned
    awake = spinning and not processors_wanted(threads)
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(awake)))
    options.add_session_config_entry("session.prepack.enable_parallel", "1")
    options.add_session_config_entry("session.disable_prepacking", str(int(not packed)))
    # What multiplies integer weights of fixed-point graphs would round their activations, whose 16
    # bits the graph asks for, to 8 once more: 13 times the error. 1 is float32.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    try:
        weights = MappedWeights(path)
        weights.lend(options)
        with weights.read_once() if packed else nullcontext():
            return Session(path, options, weights)
    except Exception as error:  # onnxruntime raises many kinds, none of them public
        if "QMoE" in str(error) and _version() < INTEGER_EXPERTS:
            raise _too_old(path, "sparse experts in 4 or 8 bits", INTEGER_EXPERTS) from None
        raise BundleError(f"{path}: onnxruntime cannot load it: {load_reason(error)}") from None


def load_reason(error: Exception) -> str:
    """Return the end of onnxruntime's message, which says what to do; its beginning names places
    in its source."""
    reason = str(error).strip().splitlines()[-1]
    return reason if len(reason) <= LONGEST_REASON else f"… {reason[-LONGEST_REASON:]}"


class OnnxVision:
    """The vision stage: tower and projector in one graph. ``compact``: buffers of a run are given
    back after it; ``spec``: what the graph must be. The other arguments as of
    :func:`open_session`."""

    def __init__(
        self,
        path: Path,
        threads: int,
        spinning: bool = True,
        packed: bool = True,
        entries: Mapping[str, str] = MappingProxyType({}),
        compact: bool = False,
        spec: ModelSpec | None = None,
    ) -> None:
        session = open_session(path, threads, spinning, packed, entries, planned=False)
        if spec is not None:
            check_vision(session, spec)
        self._run_options = _giving_back() if compact else None
        self._session: Session | None = session

    def encode(self, arrays: Arrays) -> Rows:
        """See :class:`mobilevlm.runtime.engines.EncoderEngine`."""
        return Rows(self._run("visual_tokens", arrays))

    def features(self, arrays: Arrays) -> Float32:
        """See :class:`mobilevlm.runtime.engines.EncoderEngine`."""
        return self._run("features", arrays)

    def _run(self, output: str, arrays: Arrays) -> Float32:
        inputs = {name: array[None] for name, array in arrays.items()}
        session = still_open(self._session)
        result: Float32 = session.run([output], inputs, self._run_options)[0][0]
        if self._run_options is not None:
            trim_heap()
        return result

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.EncoderEngine`."""
        self._session = None


class OnnxState(BufferedState):
    """KV buffers ``(num_key_value_heads, context_length, cache_head_dim)`` per layer, made once.

    Their pages become resident as positions are written, so a short sequence in a long context
    costs little.
    """

    def __init__(self, spec: DecoderSpec, cache: CacheType = np.float32) -> None:
        shape = (1, spec.num_key_value_heads, spec.context_length, spec.cache_head_dim)
        super().__init__(
            {
                f"{index}.{kind}": _lazy_zeros(shape, cache)
                for index in range(spec.num_hidden_layers)
                for kind in ("key", "value")
            }
        )
        self.total_length = np.zeros(1, np.int32)
        self.step_embeds = np.zeros((1, 1, spec.hidden_size), np.float32)
        self.step_positions = np.zeros(1, np.int64)
        self.step_logits = np.zeros((1, 1, spec.vocab_size), np.float32)
        self.cross: dict[str, Float32] = {}
        """Keys and values of an encoder's output, by their names in the graph."""
        self._step: tuple[Session, Any] | None = None

    def begin(self, cross: dict[str, Float32]) -> None:
        """An empty sequence behind a prompt that an encoder has read."""
        self.rewind(0)
        self.cross, self._step = cross, None

    def step_binding(self, session: Session) -> Any:
        """The binding of a step, made once for a session."""
        if self._step is None or self._step[0] is not session:
            arrays = self.step_embeds, self.step_positions, self.step_logits
            self._step = session, self.bind(session, *arrays)
        return self._step[1]

    def unbind(self) -> None:
        """Lets go of the session, which the binding of a step holds."""
        self._step = None

    def bind(
        self,
        session: Session,
        embeds: Float32,
        positions: NDArray[np.int64],
        logits: Float32,
    ) -> Any:
        """A binding of these arrays and of the KV buffers as both past and present. It holds
        addresses only: the caller keeps the arrays alive."""
        binding = session.io_binding()
        _bind_input(binding, "inputs_embeds", embeds)
        _bind_input(binding, "total_length", self.total_length)
        _bind_input(binding, "logits_positions", positions)
        _bind_output(binding, "logits", logits)
        for name, part in self.cross.items():
            _bind_input(binding, name, part)
        for name, buffer in self.buffers.items():
            _bind_input(binding, f"past_key_values.{name}", buffer)
            _bind_output(binding, f"present.{name}", buffer)
        return binding


class OnnxDecoder(BufferedDecoder):
    """The decoder stage; embedding rows are read from a mapped file. ``prompts``: the file of a
    second graph that computes pieces of prompts from ``plan.prefill_from`` positions on; ``cache``:
    what both store keys and values in; ``entries`` as of :func:`open_session`."""

    def __init__(
        self,
        path: Path,
        table: Path,
        embeddings: EmbeddingTable,
        spec: DecoderSpec,
        plan: Plan,
        prompts: Path | None = None,
        encoder: Path | None = None,
        cache: CacheType = np.float32,
        entries: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        if cache is np.int8:
            _check_version(path)
        super().__init__(table, embeddings, spec)
        self._spec, self._plan, self._cache = spec, plan, cache
        opened = partial(
            open_session,
            threads=plan.threads_of("decoder"),
            spinning=plan.spinning,
            entries=entries,
            planned=plan.memory == "fast",
        )
        self._session: Session | None = opened(path)
        check_decoder(self._session, spec, cache)
        self._encoder = None if encoder is None else opened(encoder)
        if self._encoder is not None:
            check_encoder(self._encoder, spec)
        self._prompts: Session | None = None
        if prompts is not None:
            packed = plan.prefill_weights == "packed" and plan.memory == "fast"
            self._prompts = opened(prompts, packed=packed)
            check_decoder(self._prompts, spec, cache)
        self._run_options = None if plan.memory == "fast" else _giving_back()

    def planned(self, plan: Plan) -> OnnxDecoder:
        """The same weights, with the plan's pieces and chunks of prompts. Its other settings are
        those that the weights were read with."""
        other = copy.copy(self)
        other._plan = plan
        return other

    def new_state(self) -> OnnxState:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        still_open(self._session)
        return OnnxState(self._spec, self._cache)

    def encode(self, state: DecoderState, embeds: Float32) -> None:
        """See :class:`mobilevlm.runtime.engines.EncoderDecoderEngine`."""
        assert isinstance(state, OnnxState)
        names = [
            f"cross.{index}.{kind}"
            for index in range(self._spec.num_hidden_layers)
            for kind in ("key", "value")
        ]
        inputs = {"inputs_embeds": np.ascontiguousarray(embeds[None])}
        found = still_open(self._encoder).run(names, inputs)
        state.begin(dict(zip(names, found, strict=True)))

    def prefill(self, state: DecoderState, embeds: Float32, all_logits: bool = False) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        count = len(embeds) if all_logits else 1
        return self._append(state, embeds, count, self._prompt_session(len(embeds)))

    def extend(self, state: DecoderState, embeds: Float32) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        self._append(state, embeds, 0, self._prompt_session(len(embeds)))

    def answer(self, state: DecoderState, embeds: Float32) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        return self._append(state, embeds, len(embeds), still_open(self._session))

    def _prompt_session(self, length: int) -> Session:
        """What computes a piece of a prompt with so many positions."""
        if self._prompts is not None and length >= self._plan.prefill_from:
            return self._prompts
        return still_open(self._session)

    def _append(
        self, state: DecoderState, embeds: Float32, count: int, session: Session
    ) -> Float32:
        """Appends positions; logits of the last ``count``."""
        append = partial(self._append_chunk, state, session)
        logits = in_chunks(append, embeds, count, self._plan.chunk_length)
        if session is self._prompts and self._plan.released_prompt_weights:
            session.weights.give_back()
        if self._run_options is not None:
            trim_heap()
        return logits

    def _append_chunk(
        self,
        state: DecoderState,
        session: Session,
        embeds: Float32,
        count: int,
        also: Mapping[str, Float32] = MappingProxyType({}),
    ) -> Float32:
        """Appends a chunk; logits of its last ``count`` positions. ``also``: further outputs, to be
        filled."""
        assert isinstance(state, OnnxState)
        chunk = np.ascontiguousarray(embeds[None])
        computed = max(count, 0 if _version() >= EMPTY_PRODUCTS else 1)
        positions = np.arange(len(embeds) - computed, len(embeds))
        logits = np.empty((1, computed, self._spec.vocab_size), np.float32)
        binding = state.bind(session, chunk, positions, logits)
        for name, values in also.items():
            _bind_output(binding, name, values)
        state.total_length[0] = state.slots + len(embeds)
        session.run_with_iobinding(binding, self._run_options)
        state.advance(len(embeds))
        result: Float32 = logits[0, computed - count :]
        return result

    def expert_choices(self, embeds: Float32) -> ExpertChoices:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. By the routers' logits: the
        operator for all experts keeps its choice to itself."""
        experts = self._spec.experts
        if experts is None:
            raise no_experts()
        names = {f"router_logits.{layer}": layer for layer in experts.layers}
        if not {output.name for output in still_open(self._session).get_outputs()}.issuperset(
            names
        ):
            raise BundleError(
                "an earlier version made this decoder, which does not say what its routers decide: "
                "export the bundle again"
            )
        state, length = self.new_state(), len(embeds)
        logits = {
            name: np.empty((1, length, self._spec.num_experts(layer)), np.float32)
            for name, layer in names.items()
        }
        session, chunk = self._prompt_session(length), self._plan.chunk_length
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            also = {name: values[:, start:end] for name, values in logits.items()}
            # Of all positions, since the last layer only has those whose logits are asked for.
            self._append_chunk(state, session, embeds[start:end], end - start, also)
        return {
            layer: np.argsort(-logits[name][0], axis=-1, kind="stable")[:, : experts.top_k]
            for name, layer in names.items()
        }

    def step(self, state: DecoderState, token: int) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, OnnxState)
        session = still_open(self._session)
        table = still_open(self._table)
        check_whole(still_open(self._mapped))
        state.step_embeds[0, 0] = table[token]
        state.total_length[0] = state.slots + 1
        session.run_with_iobinding(state.step_binding(session))
        state.advance(1)
        result: Float32 = state.step_logits[0, 0]
        return result

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        self._session = self._prompts = self._encoder = None
        self._table = self._mapped = None


def exact_products() -> Mapping[str, str]:
    """Return ``EXACT_PRODUCTS`` where this version of onnxruntime has them, else nothing."""
    return EXACT_PRODUCTS if _version() >= EXACT_SINCE else {}


def _version() -> tuple[int, ...]:
    return tuple(map(int, ort.__version__.split(".")[:2]))


def _check_version(path: Path) -> None:
    """Raises BundleError: this onnxruntime has no attention for keys and values in int8. (Some
    versions would say so at the first run only.)"""
    if _version() < INT8_CACHE:
        raise _too_old(path, "keys and values in int8", INT8_CACHE)


def _too_old(path: Path, feature: str, needed: tuple[int, int]) -> BundleError:
    return BundleError(
        f"{path}: {feature} need onnxruntime {needed[0]}.{needed[1]}, this is {ort.__version__}: "
        f"pip install -U onnxruntime"
    )


def _giving_back() -> ort.RunOptions:
    """Of a run that gives its buffers back to the system when it is over."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _lazy_zeros(shape: tuple[int, ...], kind: CacheType) -> NDArray[Any]:
    """Zeros in fresh pages of 4 KiB (numpy would ask for huge pages, resident at first touch)."""
    count = math.prod(shape)
    size = count * np.dtype(kind).itemsize
    try:
        fresh = mmap.mmap(-1, size)
    except (OSError, OverflowError, ValueError):
        raise MemoryLimitError(
            f"keys and values of the whole context take {size / 1e6:.0f} MB of address space in "
            f"each layer, the system refuses that: use a model with a shorter context"
        ) from None
    return np.frombuffer(fresh, kind, count).reshape(shape)


def _bind_input(binding: Any, name: str, array: NDArray[Any]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: Any, name: str, array: NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
