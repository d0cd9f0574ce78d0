"""Many samples through a streamed reference, step by step.

A step's weights are read once for all samples, so memory holds one step and the states between two
steps, and a pass reads the checkpoint once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mobilevlm.reference.model import held
from mobilevlm.reference.steps import State, Step


@torch.no_grad()
def stream_step(step: Step, states: list[State]) -> None:
    """Replace the state of each sample by the one after a step."""
    with held(step.module):
        for index, state in enumerate(states):
            states[index] = step.run(state)


def stream_steps(steps: Iterable[Step], states: Iterable[State]) -> list[State]:
    """Return the states of all samples after all steps."""
    after = list(states)
    for step in steps:
        stream_step(step, after)
    return after
