"""ONNX Runtime for both stages, on the CPU.

The decoder may have a prefill graph beside its own, with other weights and the same keys and
values: which of the two computes a piece of a prompt depends on the length of that piece alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnxruntime as ort

from mobilevlm.bundle import EmbeddingTable
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.plan import Plan
from mobilevlm.prompt import Arrays, Rows
from mobilevlm.runtime.engines import (
    CacheType,
    DecoderState,
    ExpertChoices,
    Float32,
    chunk_spans,
    in_chunks,
    no_experts,
    still_open,
)
from mobilevlm.runtime.engines.contracts import check_decoder, check_encoder, check_vision
from mobilevlm.runtime.engines.onnx.buffered import BufferedDecoder
from mobilevlm.runtime.engines.onnx.mapped_pages import trim_heap
from mobilevlm.runtime.engines.onnx.mapped_weights import MappedWeights, Session
from mobilevlm.runtime.engines.onnx.onnx_state import OnnxState
from mobilevlm.runtime.engines.onnx.stages import Stage, Turns, stage_of
from mobilevlm.spec import ModelSpec
from mobilevlm.state_buffers import LONGEST_RUN
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
SHARED_KEYS = (1, 32)
"""The first version tried whose attention reads the buffers of another layer."""
LINEAR_ATTENTION = (1, 25)
"""The first version with it on CPUs."""
_SINCE = {
    "QMoE": ("sparse experts in 4 or 8 bits", INTEGER_EXPERTS),
    "LinearAttention": ("gated delta layers", LINEAR_ATTENTION),
}
"""Operators that are not in all versions, what needs them, and the first version."""


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
        for operator, (feature, needed) in _SINCE.items():
            if operator in str(error) and _version() < needed:
                raise _too_old(path, feature, needed) from None
        raise BundleError(f"{path}: onnxruntime cannot load it: {load_reason(error)}") from None


def load_reason(error: Exception) -> str:
    """Return the end of onnxruntime's message, which says what to do; its beginning names places
    in its source."""
    reason = str(error).strip().splitlines()[-1]
    return reason if len(reason) <= LONGEST_REASON else f"… {reason[-LONGEST_REASON:]}"


class OnnxVision:
    """The vision or audio stage: tower and projector in one graph. ``compact``: buffers of a run
    are given back after it; ``spec``: what the graph must be; ``turns``: it is opened in turn with
    the decoder. The other arguments as of :func:`open_session`."""

    def __init__(
        self,
        path: Path,
        threads: int,
        spinning: bool = True,
        packed: bool = True,
        entries: Mapping[str, str] = MappingProxyType({}),
        compact: bool = False,
        spec: ModelSpec | None = None,
        turns: Turns | None = None,
    ) -> None:
        def opened() -> Session:
            session = open_session(path, threads, spinning, packed, entries, planned=False)
            if spec is not None:
                check_vision(session, spec)
            return session

        encoded = None if spec is None else spec.encoded
        self._deep = () if encoded is None else encoded.connector.deep_names
        self._rows = "audio_tokens" if spec is not None and spec.has_sound else "visual_tokens"
        self._run_options = _giving_back() if compact else None
        self._stage: Stage[Session] | None = stage_of(opened, turns)

    def encode(self, arrays: Arrays) -> Rows:
        """See :class:`mobilevlm.runtime.engines.EncoderEngine`."""
        tokens, *deep = self._run((self._rows, *self._deep), arrays)
        return Rows(tokens, tuple(deep))

    def features(self, arrays: Arrays) -> Float32:
        """See :class:`mobilevlm.runtime.engines.EncoderEngine`."""
        return self._run(("features",), arrays)[0]

    def _run(self, outputs: Sequence[str], arrays: Arrays) -> list[Float32]:
        inputs = {name: array[None] for name, array in arrays.items()}
        with still_open(self._stage).open() as session:
            found: list[Float32] = session.run(list(outputs), inputs, self._run_options)
        if self._run_options is not None:
            trim_heap()
        return [array[0] for array in found]

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.EncoderEngine`."""
        if self._stage is not None:
            self._stage.close()
        self._stage = None


@dataclass(frozen=True)
class DecoderSessions:
    """Graphs of a decoder stage."""

    answers: Session
    prompts: Session | None
    encoder: Session | None


class OnnxDecoder(BufferedDecoder):
    """The decoder stage; embedding rows are read from a mapped file. ``prompts``: the file of a
    second graph that computes pieces of prompts from ``plan.prefill_from`` positions on; ``cache``:
    what both store keys and values in; ``entries`` as of :func:`open_session`; ``turns`` as of
    :class:`OnnxVision`; ``layers``: the table of layers' own inputs, if there is one."""

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
        turns: Turns | None = None,
        layers: EmbeddingTable | None = None,
    ) -> None:
        if cache is np.int8:
            _check_version(path)
        if spec.shared_kv_layers and _version() < SHARED_KEYS:
            raise _too_old(path, "keys and values that layers share", SHARED_KEYS)
        super().__init__(table, embeddings, spec, layers)
        self._spec, self._plan, self._cache = spec, plan, cache

        def opened() -> DecoderSessions:
            threads, planned = plan.threads_of("decoder"), plan.memory == "fast"
            packed = plan.prefill_weights == "packed" and planned

            def session(path: Path, packed: bool = True) -> Session:
                return open_session(path, threads, plan.spinning, packed, entries, planned)

            found = DecoderSessions(
                session(path),
                None if prompts is None else session(prompts, packed),
                None if encoder is None else session(encoder),
            )
            check_decoder(found.answers, spec, cache)
            if found.encoder is not None:
                check_encoder(found.encoder, spec)
            if found.prompts is not None:
                check_decoder(found.prompts, spec, cache)
            return found

        self._stage: Stage[DecoderSessions] | None = stage_of(opened, turns)
        self._run_options = None if plan.memory == "fast" else _giving_back()

    def planned(self, plan: Plan) -> OnnxDecoder:
        """The same weights, with the plan's pieces and chunks of prompts. Its other settings are
        those that the weights were read with."""
        other = copy.copy(self)
        other._plan = plan
        return other

    def new_state(self) -> OnnxState:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        stage, state = still_open(self._stage), OnnxState(self._spec, self._cache)
        stage.add(state)
        return state

    def encode(self, state: DecoderState, embeds: Float32) -> None:
        """See :class:`mobilevlm.runtime.engines.EncoderDecoderEngine`."""
        assert isinstance(state, OnnxState)
        names = [
            f"cross.{index}.{kind}"
            for index in range(self._spec.num_hidden_layers)
            for kind in ("key", "value")
        ]
        inputs = {"inputs_embeds": np.ascontiguousarray(embeds[None])}
        with self._open() as sessions:
            found = still_open(sessions.encoder).run(names, inputs)
        state.begin(dict(zip(names, found, strict=True)))

    def prefill(self, state: DecoderState, rows: Rows, count: int | None = 1) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        with self._open() as sessions:
            return self._append(state, rows, count, sessions)

    def extend(self, state: DecoderState, rows: Rows) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        with self._open() as sessions:
            self._append(state, rows, 0, sessions)

    def answer(self, state: DecoderState, rows: Rows, count: int | None = None) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        with self._open() as sessions:
            return self._append(state, rows, count, sessions, is_piece=False)

    def _open(self) -> AbstractContextManager[DecoderSessions]:
        return still_open(self._stage).open()

    @property
    def _chunk(self) -> int:
        """Most rows of a run."""
        chunk = self._plan.chunk_length
        return min(chunk, LONGEST_RUN) if self._spec.sliding_layers else chunk

    def _for_prompt(self, sessions: DecoderSessions, length: int) -> Session:
        """Return the session that computes a piece of a prompt with so many positions."""
        if sessions.prompts is not None and length >= self._plan.prefill_from:
            return sessions.prompts
        return sessions.answers

    def _append(
        self,
        state: DecoderState,
        rows: Rows,
        count: int | None,
        sessions: DecoderSessions,
        is_piece: bool = True,
    ) -> Float32:
        """Append rows; return the logits of the last ``count`` (none: of all). ``is_piece``: they
        are one of a prompt."""
        assert isinstance(state, OnnxState)
        session = self._for_prompt(sessions, len(rows)) if is_piece else sessions.answers
        append = partial(self._append_chunk, state, session)
        logits = in_chunks(append, rows, count, self._chunk)
        if is_piece:
            state.mark()
        if session is sessions.prompts and self._plan.released_prompt_weights:
            session.weights.give_back()
        if self._run_options is not None:
            trim_heap()
        return logits

    def _append_chunk(
        self,
        state: OnnxState,
        session: Session,
        rows: Rows,
        count: int,
        also: Mapping[str, Float32] = MappingProxyType({}),
    ) -> Float32:
        """Appends a chunk; logits of its last ``count`` positions. ``also``: further outputs, to be
        filled."""
        computed = max(count, 0 if _version() >= EMPTY_PRODUCTS else 1)
        arrays = state.run_of(rows, computed, self.layer_rows(rows.ids))
        state.run(session, arrays, self._run_options, also)
        result: Float32 = arrays.logits[0, computed - count :]
        return result

    def prompt_states(self, state: DecoderState, rows: Rows) -> Float32:
        """Append the rows of a prompt; return the states after the last norm at its end
        ``(hidden_size,)``. Of a model that makes images."""
        assert isinstance(state, OnnxState)
        length, last = len(rows), np.empty((1, 1, self._spec.hidden_size), np.float32)
        with self._open() as sessions:
            session = self._for_prompt(sessions, length)
            for start, end in chunk_spans(length, rows.blocks, self._chunk):
                self._append_chunk(state, session, rows[start:end], 1, {"states": last})
        found: Float32 = last[0, 0]
        return found

    def joined(self, states: Sequence[DecoderState], slots: int) -> OnnxState:
        """Return sequences of one length as one state that takes their steps together, with room
        for so many slots each. They stay as they are."""
        stage, found = still_open(self._stage), []
        for state in states:
            assert isinstance(state, OnnxState)
            found.append(state)
        made = OnnxState(self._spec, self._cache, len(found), slots)
        made.fill(found)
        stage.add(made)
        return made

    def step_all(self, state: OnnxState, rows: Float32) -> Float32:
        """Append a row to each of joined sequences ``(sequences, hidden_size)``; return the states
        after the last norm of the same shape, valid until the next call. Logits are not
        computed."""
        with self._open() as sessions:
            return state.step_all(sessions.answers, rows, _only_what_is_asked())

    def expert_choices(self, embeds: Float32) -> ExpertChoices:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. By the routers' logits: the
        operator for all experts keeps its choice to itself."""
        experts = self._spec.experts
        if experts is None:
            raise no_experts()
        if self._spec.rope_sections or self._spec.deep_layers:
            raise MobileVLMError(
                "the experts of a decoder with positions of several axes, or with rows added after "
                "some layers, are not told: leave them out of the check"
            )
        names = {f"router_logits.{layer}": layer for layer in experts.layers}
        with self._open() as sessions:
            if not {output.name for output in sessions.answers.get_outputs()}.issuperset(names):
                raise BundleError(
                    "an earlier version made this decoder, which does not say what its routers "
                    "decide: export the bundle again"
                )
            state, length = self.new_state(), len(embeds)
            logits = {
                name: np.empty((1, length, self._spec.num_experts(layer)), np.float32)
                for name, layer in names.items()
            }
            session, chunk = self._for_prompt(sessions, length), self._chunk
            for start in range(0, length, chunk):
                end = min(start + chunk, length)
                also = {name: values[:, start:end] for name, values in logits.items()}
                # Of all positions, since the last layer only has those whose logits are asked for.
                self._append_chunk(state, session, Rows(embeds[start:end]), end - start, also)
        return {
            layer: np.argsort(-logits[name][0], axis=-1, kind="stable")[:, : experts.top_k]
            for name, layer in names.items()
        }

    def step(self, state: DecoderState, token: int) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        assert isinstance(state, OnnxState)
        row = self._row(token)
        with self._open() as sessions:
            return state.step(sessions.answers, row, self.layer_rows([token]))

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        if self._stage is not None:
            self._stage.close()
        self._stage = self._table = self._mapped = self._mapped_layers = None


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


def _only_what_is_asked() -> ort.RunOptions:
    """Return options of a run that computes nothing but the outputs that are bound."""
    options = ort.RunOptions()
    options.only_execute_path_to_fetches = True
    return options


def _giving_back() -> ort.RunOptions:
    """Return options of a run that gives its buffers back to the system when it is over."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options
