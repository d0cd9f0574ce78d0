"""Statistics of the inputs of the decoder's linear layers on calibration data, by ONNX Runtime.

All samples pass the float32 graph of one layer before the next is written: memory holds one layer,
its statistics, and the states between two layers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.console import progress
from mobilevlm.export.calibration.samples import Sample, sample_rows
from mobilevlm.export.calibration.statistics import (
    Block,
    Sums,
    Wanted,
    check_decoder_only,
    finished,
    sample_groups,
)
from mobilevlm.export.graph.author import author_encoded, author_watched_layer
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.export.quantize.rotation import Rotation
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.model import Model
from mobilevlm.plan import Plan
from mobilevlm.prompt import Rows
from mobilevlm.rotary import rotary_at
from mobilevlm.runtime.engines import EncoderEngine, NoImages
from mobilevlm.runtime.engines.onnx.engine import OnnxVision, open_session
from mobilevlm.runtime.engines.onnx.onnx_state import image_inputs
from mobilevlm.state_buffers import LAYER_ROWS, state_buffers

HEAD = "decoder.lm_head"
LAYER_INPUTS = "decoder.layer_inputs.proj"


def watch_decoder(
    model: Model,
    samples: Sequence[Sample],
    wanted: Wanted,
    hessian: bool,
    stream: Rotation | None = None,
) -> Iterator[Block]:
    """Statistics of the inputs of the decoder's linear layers and its head, in the order of use.
    Arguments as of :func:`mobilevlm.export.calibration.encoder_layers.watch_encoder`; ``stream``:
    rotation that the model's weights are for.

    Raises:
        PromptError: a sample does not fit into the context.
        ImageError: an image cannot be read.
        MobileVLMError: the decoder has an encoder; an activation is infinite or no number.
    """
    spec = model.spec.decoder
    check_decoder_only(model.spec, "calibration")
    used = next(sample_groups(model, samples))
    if len(used) < len(samples):
        progress.say(f"calibration the decoder sees {len(used)} of {len(samples)} samples")
    given = _embedded(model, used)
    if stream is not None:
        given = [_turned(rows, stream) for rows in given]
    states = [rows.embeds[None] for rows in given]
    if spec.learned_positions:
        sizes = (spec.context_length, spec.hidden_size)
        table = model.weights.read("decoder.position_embedding.weight", sizes)
        states = [rows + table[: rows.shape[1]] for rows in states]
    own: list[Float32 | None] = [None] * len(states)
    if spec.layer_input_size:
        if wanted(LAYER_INPUTS):
            sums = Sums(hessian)
            for rows in states:
                sums.add(rows)
            yield finished({LAYER_INPUTS: sums})
        own = [_layer_inputs(model, rows) for rows in given]
    kept: list[dict[str, Float32]] = [{} for _ in states]
    """Keys and values that later layers read, of each sample"""
    head = Sums(hessian)
    for index in range(spec.num_hidden_layers):
        last = index == spec.num_hidden_layers - 1
        inputs = [None if rows is None else rows[:, :, index] for rows in own]
        block = _watch_layer(
            model, index, given, states, wanted, hessian, head if last else None, inputs, kept
        )
        if block:
            yield block
    if wanted(HEAD):
        yield finished({HEAD: head})


def _watch_layer(
    model: Model,
    index: int,
    given: Sequence[Rows],
    states: list[Float32],
    wanted: Wanted,
    hessian: bool,
    head: Sums | None,
    own: Sequence[Float32 | None],
    kept: Sequence[dict[str, Float32]],
) -> Block:
    """Run a layer on all samples, whose states are replaced, and watch its linear layers. ``head``
    adds up the norm behind it; ``own``: the layer's own input for each sample; ``kept``: keys and
    values that later layers read, to which its own are added."""
    spec = model.spec.decoder
    past = [buffer for buffer in state_buffers(spec) if buffer.layer == index]
    read_later = past if index in spec.kv_sources else []
    with tempfile.TemporaryDirectory(prefix="mobilevlm-") as folder:
        path = Path(folder) / "layer.onnx"
        watched = author_watched_layer(model.weights, spec, index, path)
        names = {
            output: found
            for output, readers in watched.items()
            if (found := [reader for reader in readers if wanted(reader)])
        }
        sums = {output: Sums(hessian) for output in names}
        session = open_session(path, Plan().threads_of("decoder"))
        outputs = ["after", *(["normed"] if head is not None else []), *names]
        outputs += [buffer.present for buffer in read_later]
        for place, hidden in enumerate(states):
            length = hidden.shape[1]
            inputs: dict[str, NDArray[Any]] = {
                "hidden": hidden,
                "total_length": np.array([length], np.int32),
                **{buffer.past: np.zeros(buffer.sized(length), np.float32) for buffer in past},
            }
            if (positions := given[place].positions) is not None:
                inputs["rotary_cos"], inputs["rotary_sin"] = rotary_at(spec, positions)
            if spec.image_blocks:
                inputs |= image_inputs(given[place].blocks, 0)
            if spec.sound_rank:
                inputs["sound"] = np.full(1, bool(given[place].heard), np.float32)
            if index in spec.deep_layers:
                deep = given[place].deep
                added = deep[spec.deep_layers.index(index)][None] if deep else 0 * hidden
                inputs[f"deep.{index}"] = added
            if (rows := own[place]) is not None:
                inputs[LAYER_ROWS] = np.ascontiguousarray(rows)
            inputs |= kept[place]
            known = {item.name for item in session.get_inputs()}
            inputs = {name: array for name, array in inputs.items() if name in known}
            made = dict(zip(outputs, session.run(outputs, inputs), strict=True))
            states[place] = made["after"]
            if head is not None:
                head.add(made["normed"])
            for output, item in sums.items():
                item.add(made[output])
            for buffer in read_later:
                kept[place][buffer.past] = made[buffer.present]
    return finished({name: sums[output] for output, readers in names.items() for name in readers})


def _layer_inputs(model: Model, rows: Rows) -> Float32:
    """Return the inputs of all layers ``(1, length, layers, layer_input_size)``, as
    :class:`mobilevlm.export.graph.decoder.LayerInputs` makes them."""
    spec, weights = model.spec.decoder, model.weights
    width, size = spec.layer_input_width, spec.layer_input_size
    matrix = weights.read(f"{LAYER_INPUTS}.weight", (width, spec.hidden_size))
    gains = weights.read("decoder.layer_inputs.norm.weight", (size,))
    shape = (1, len(rows), spec.num_hidden_layers, size)
    made = ((rows.embeds @ matrix.T) * np.float32(spec.hidden_size**-0.5)).reshape(shape)
    made /= np.sqrt(np.square(made).mean(-1, keepdims=True) + np.float32(spec.norm_eps))
    assert rows.ids is not None
    ids = np.where(rows.ids < 0, spec.layer_input_id, rows.ids)
    table = (spec.vocab_size, width)
    stored = weights.rows_at("decoder.embed_layers.weight", table, ids).reshape(shape)
    whole: Float32 = (made * gains + stored * np.float32(size**0.5)) * np.float32(2**-0.5)
    return whole


def _turned(rows: Rows, stream: Rotation) -> Rows:
    """Return the rows for a decoder whose stream is rotated."""
    deep = tuple(stream.of_inputs(added) for added in rows.deep)
    return replace(rows, embeds=stream.of_inputs(rows.embeds), deep=deep)


def _embedded(model: Model, samples: Sequence[Sample]) -> list[Rows]:
    """Return what the decoder is given of each sample."""
    spec = model.spec.decoder
    table = model.weights.read("decoder.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))

    def embed(ids: list[int]) -> Float32:
        rows: Float32 = table[ids]
        return rows if spec.embed_scale == 1 else rows * np.float32(spec.embed_scale)

    with _vision(model) as vision:
        return [sample_rows(model, sample, vision, embed) for sample in samples]


@contextmanager
def _vision(model: Model) -> Iterator[EncoderEngine]:
    """The vision stage in float32, written and opened when it is first used."""
    if model.spec.encoded is None:
        yield NoImages()
        return
    with tempfile.TemporaryDirectory(prefix="mobilevlm-") as folder:
        path = Path(folder) / "vision.onnx"
        author_encoded(model.weights, model.spec, RECIPES["fp32"], path)
        vision = OnnxVision(path, Plan().threads_of("vision"), compact=True, spec=model.spec)
        try:
            yield vision
        finally:
            vision.close()
