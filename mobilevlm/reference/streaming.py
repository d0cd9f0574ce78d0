"""Many sequences through a streamed reference, layer by layer.

A layer's weights are read once for all sequences, so memory holds one layer and the activations
between two layers, and a pass reads the checkpoint once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mobilevlm.prompt import Arrays
from mobilevlm.reference.decoder import rotary_tables
from mobilevlm.reference.model import ReferenceModel, held


@torch.no_grad()
def tower_states(reference: ReferenceModel, states: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The states of all pictures after each layer of the tower."""
    for layer in reference.vision.layers:
        with held(layer):
            states = [layer(state) for state in states]
        yield states


@torch.no_grad()
def project(
    reference: ReferenceModel, states: Sequence[Tensor], arrays: Sequence[Arrays]
) -> list[Tensor]:
    """States after the tower's last layer to visual tokens ``(num_tokens, hidden_size)``;
    ``arrays``: those of the encoder, of each."""
    with held(reference.projector):
        return [
            reference.project(reference.vision.features(state), given)[0]
            for state, given in zip(states, arrays, strict=True)
        ]


@torch.no_grad()
def decoder_states(reference: ReferenceModel, states: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The states ``(1, length, hidden_size)`` of all sequences after each decoder layer;
    ``states``: their embeddings."""
    spec = reference.spec.decoder
    states = [reference.decoder.begin(state) for state in states]
    for layer in reference.decoder.layers:
        with held(layer):
            states = [
                layer(state, rotary_tables(spec, torch.arange(state.shape[1]), layer.index))
                for state in states
            ]
        yield states


def last_states(layers: Iterator[list[Tensor]], states: list[Tensor]) -> list[Tensor]:
    """Of a pass, what comes after the last layer; ``states`` where there is none."""
    for after in layers:
        states = after
    return states
