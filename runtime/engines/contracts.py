"""Inputs and outputs of graphs as the spec wants them: a graph that has others is refused when it
is opened, not by an operator in the middle of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError
from mobilevlm.runtime.engines import CacheType
from mobilevlm.runtime.engines.onnx.mapped_weights import Session
from mobilevlm.spec import ModelSpec
from mobilevlm.state_buffers import LAYER_ROWS, state_buffers

Value: TypeAlias = tuple[str, tuple[int | None, ...]]
"""Element type and shape; none where any size will do"""
Values: TypeAlias = Mapping[str, Value]


def check_vision(session: Session, spec: ModelSpec) -> None:
    """Check the vision or audio stage.

    Raises:
        BundleError: it contradicts the spec.
    """
    if spec.has_sound:
        _check_audio(session, spec)
        return
    edge, vision, projector = spec.image.edge, spec.image.encoder, spec.image.connector
    rows, count = None if edge is None else projector.num_rows, spec.image.num_features
    channels = 3 if projector.kind != "merger" else None
    inputs: dict[str, Value] = {"pixels": ("uint8", (1, edge, edge, channels))}
    inputs |= dict.fromkeys(projector.array_names, ("int64", (1, None)))
    tokens: Value = ("float", (1, rows, projector.out_size))
    outputs: dict[str, Value] = {
        "visual_tokens": tokens,
        **dict.fromkeys(projector.deep_names, tokens),
        "features": ("float", (1, count, vision.hidden_size)),
    }
    _check(session, inputs, outputs)


def _check_audio(session: Session, spec: ModelSpec) -> None:
    audio = spec.audio
    bins = audio.mel.bins * audio.mel.joined
    outputs: dict[str, Value] = {
        "audio_tokens": ("float", (1, None, audio.connector.out_size)),
        "features": ("float", (1, None, audio.encoder.hidden_size)),
    }
    _check(session, {"mel": ("float", (1, bins, None))}, outputs)


def check_decoder(session: Session, spec: DecoderSpec, cache: CacheType) -> None:
    """Check a decoder whose keys and values are bound, or its prefill graph; errors as of
    :func:`check_vision`."""
    kind = "int8" if cache is np.int8 else "float"
    rows: Value = ("float", (1, None, spec.hidden_size))
    inputs: dict[str, Value] = {
        "inputs_embeds": rows,
        "total_length": ("int32", (1,)),
        "logits_positions": ("int64", (None,)),
    }
    outputs: dict[str, Value] = {"logits": ("float", (1, None, spec.vocab_size))}
    for buffer in state_buffers(spec):
        if buffer.kind == "convolution":
            inputs[buffer.past], outputs[buffer.present] = ("float", buffer.shape), rows
        else:
            its = "float" if buffer.kind == "recurrent" else kind
            inputs[buffer.past] = outputs[buffer.present] = (its, buffer.shape)
    if spec.rope_sections:
        table: Value = ("float", (None, spec.rotary_channels // 2))
        inputs |= {"rotary_cos": table, "rotary_sin": table}
    inputs |= {f"deep.{layer}": rows for layer in spec.deep_layers}
    if spec.sliding_layers:
        inputs["window_length"] = ("int32", (1,))
    if spec.image_blocks:
        inputs |= dict.fromkeys(("image_rows", "image_ends"), ("int64", (None,)))
    if spec.encoder_layers:
        inputs |= _by_layer("cross", spec, _crossed(spec))
    if spec.layer_input_size:
        shape = (1, None, spec.num_hidden_layers, spec.layer_input_size)
        inputs[LAYER_ROWS] = ("float", shape)
    if spec.sound_rank:
        inputs["sound"] = ("float", (1,))
    _check(session, inputs, outputs)


def check_drawing(sessions: Mapping[str, Session], spec: ModelSpec) -> None:
    """Check the stages of a model that makes images, by their names; errors as of
    :func:`check_vision`."""
    output, width = spec.drawing, spec.decoder.hidden_size
    values: dict[str, tuple[Values, Values]] = {
        "image_head": (
            {"states": ("float", (None, 1, width))},
            {"logits": ("float", (None, 1, output.num_codes))},
        ),
        "code_embeddings": (
            {"codes": ("int64", (1, None))},
            {"inputs_embeds": ("float", (1, None, width))},
        ),
        "image_decoder": (
            {"codes": ("int64", (1, output.num_tokens))},
            {"image": ("float", (1, output.edge, output.edge, 3))},
        ),
    }
    for name, session in sessions.items():
        _check(session, *values[name])


def check_encoder(session: Session, spec: DecoderSpec) -> None:
    """Check the encoder of a language model that has one; errors as of :func:`check_vision`."""
    inputs: dict[str, Value] = {"inputs_embeds": ("float", (1, None, spec.hidden_size))}
    _check(session, inputs, _by_layer("cross", spec, _crossed(spec)))


def check_static_decoder(session: Session, spec: DecoderSpec, length: int, window: int) -> None:
    """Check a graph for ``length`` positions behind ``window`` earlier ones; errors as of
    :func:`check_vision`."""
    kinds = {value.name: value.type for value in session.get_inputs()}
    kind = "uint8" if kinds.get("past_key_values.0.key") == "tensor(uint8)" else "float"
    heads, dim = spec.num_key_value_heads, spec.head_dim
    table: Value = ("float", (1, length, 1, spec.rotary_channels))
    by_row = kinds.get("logits_position") == "tensor(float)"
    inputs: dict[str, Value] = {
        "inputs_embeds": ("float", (1, length, spec.hidden_size)),
        "attention_mask": ("float", (1, 1, length, window + length)),
        "rotary_cos": table,
        "rotary_sin": table,
        "logits_position": ("float", (1, 1, length)) if by_row else ("int32", (1,)),
        **_by_layer("past_key_values", spec, (kind, (1, heads, window, dim))),
    }
    if spec.sliding_layers:
        inputs["sliding_mask"] = inputs["attention_mask"]
        if spec.sliding_rope_theta is not None:
            inputs |= {"sliding_cos": table, "sliding_sin": table}
    outputs = {"logits": ("float", (1, 1, spec.vocab_size))}
    present = _by_layer("present", spec, (kind, (1, heads, length, dim)))
    _check(session, inputs, {**outputs, **present})


def _by_layer(name: str, spec: DecoderSpec, value: Value) -> dict[str, Value]:
    return {
        f"{name}.{layer}.{part}": value
        for layer in range(spec.num_hidden_layers)
        for part in ("key", "value")
    }


def _crossed(spec: DecoderSpec) -> Value:
    """Keys and values of an encoder's output."""
    return "float", (1, spec.num_attention_heads, None, spec.head_dim)


def _check(session: Session, inputs: Values, outputs: Values) -> None:
    found = {value.name: value for value in session.get_inputs()}
    further = sorted(found.keys() - inputs.keys())
    if further:
        raise _contradiction(session, f"input {further[0]!r:.60} is not known")
    made = {value.name: value for value in session.get_outputs()}
    for kind, values, expected in (("input", found, inputs), ("output", made, outputs)):
        for name, value in expected.items():
            if name not in values:
                raise _contradiction(session, f"{kind} {name!r} is missing")
            if not _fits(values[name], value):
                have = f"{values[name].type} {list(values[name].shape)}"
                sizes = ["any" if size is None else size for size in value[1]]
                want = f"tensor({value[0]}) {sizes!s:.80}"
                raise _contradiction(session, f"{kind} {name!r} is {have:.80}, expected {want}")


def _fits(found: Any, expected: Value) -> bool:
    """Return whether a graph's input or output may be what is expected; its sizes that vary may."""
    kind, shape = expected
    return found.type == f"tensor({kind})" and (
        len(found.shape) == len(shape)
        and all(
            size is None or not isinstance(there, int) or there == size
            for there, size in zip(found.shape, shape, strict=True)
        )
    )


def _contradiction(session: Session, what: str) -> BundleError:
    return BundleError(
        f"{session.path}: the graph is not that of the spec in the manifest: {what}: export the "
        f"bundle again"
    )
