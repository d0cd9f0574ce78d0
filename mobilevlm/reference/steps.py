"""A model as a list of named steps, each a part that runs with all its weights in memory.

Whatever runs a model part by part (streaming, statistics of activations, effects of changed
weights) knows only steps, whatever kind of layer is inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class State:
    """Tensors of one sample between two steps."""

    hidden: Tensor
    """Output of the last step, input of the next."""
    given: Mapping[str, Tensor] = field(default_factory=dict)
    """Other tensors that later steps read, by name: positions, a mask, an instruction."""

    def then(self, hidden: Tensor, **given: Tensor) -> State:
        """Return the next state; ``given`` is added to what there is."""
        return State(hidden, {**self.given, **given})


@dataclass(frozen=True)
class Step:
    """A module of a model and its part in a pass."""

    name: str
    """Canonical name of the module."""
    module: nn.Module
    run: Callable[[State], State]

    @classmethod
    def of(
        cls, name: str, module: nn.Module, function: Callable[[Tensor], Tensor] | None = None
    ) -> Step:
        """Return a step that reads ``hidden`` alone. ``function``: the module itself by default."""
        call = function or module
        return cls(name, module, lambda state: state.then(call(state.hidden)))


class Stepped(nn.Module):
    """A module whose pass is a list of steps."""

    def steps(self) -> Iterator[Step]:
        """Yield the steps in the order of use; names are relative to this module."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, **given: Tensor) -> Tensor:
        """Run all steps."""
        return run_steps(self.steps(), State(hidden, given)).hidden


def steps_of(name: str, module: nn.Module) -> list[Step]:
    """Return a module's steps under its canonical name; one step where it has none of its own."""
    if not isinstance(module, Stepped):
        return [Step.of(name, module)]
    return [dataclasses.replace(step, name=f"{name}.{step.name}") for step in module.steps()]


def run_steps(steps: Iterable[Step], state: State) -> State:
    """Return the state of one sample after all steps."""
    for step in steps:
        state = step.run(state)
    return state
