"""Table of a provider: the operators that it takes, and the rules that restrict them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Tensor:
    """Properties of an input or output that are known before a graph runs."""

    dtype: str
    """``float32``, ``uint8`` …"""
    shape: tuple[int | None, ...] | None
    """None: not known, or not the same in every run"""
    constant: bool = False


@dataclass(frozen=True)
class Node:
    """An operator in a graph."""

    operator: str
    """``Add``; ``com.microsoft.QuickGelu`` outside the standard"""
    version: int
    """The opset in which this version of the operator came"""
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def input(self, index: int) -> Tensor | None:
        """None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None


Rule: TypeAlias = Callable[[Node], str | None]
"""Why a node is not taken, in a few words; None where nothing speaks against it."""


@dataclass(frozen=True)
class Provider:
    """A table."""

    name: str
    title: str
    source: str
    """Source of the table"""
    newest_opset: int
    """Newest version of operators that it takes"""
    operators: Mapping[str, tuple[Rule, ...]]
    rules: tuple[Rule, ...]
    """For all nodes"""
    checker: str = ""
    """List of its operators that comes with onnxruntime's usability checker, if there is one"""


def obstacle(provider: Provider, node: Node) -> str | None:
    """Why the provider leaves a node to the processor; None where it takes it."""
    if node.operator not in provider.operators:
        return node.operator
    if node.version > provider.newest_opset:
        return f"{node.operator} of opset {node.version}"
    for rule in (*provider.rules, *provider.operators[node.operator]):
        reason = rule(node)
        if reason is not None:
            return f"{node.operator}: {reason}"
    return None


def static_shapes(node: Node) -> str | None:
    """Shapes of all inputs are known."""
    shapes = [tensor.shape for tensor in node.inputs if tensor is not None]
    return "its shape varies" if any(shape is None or None in shape for shape in shapes) else None


def rank_up_to(most: int) -> Rule:
    """No tensor has more dimensions."""

    def rule(node: Node) -> str | None:
        tensors = (*node.inputs, *node.outputs)
        ranks = [len(tensor.shape) for tensor in tensors if tensor and tensor.shape is not None]
        return f"{max(ranks)} dimensions" if ranks and max(ranks) > most else None

    return rule


def dimensions(*allowed: int) -> Rule:
    """The first input has one of these numbers of dimensions."""

    def rule(node: Node) -> str | None:
        first = node.input(0)
        rank = len(first.shape) if first and first.shape is not None else 0
        return None if rank in allowed else f"{rank} dimensions"

    return rule


def first_input(*allowed: str) -> Rule:
    """The first input has one of these types."""

    def rule(node: Node) -> str | None:
        first = node.input(0)
        dtype = first.dtype if first else "nothing"
        return None if dtype in allowed else f"input {dtype}"

    return rule


def output_type(*allowed: str) -> Rule:
    """The output has one of these types."""

    def rule(node: Node) -> str | None:
        dtype = node.outputs[0].dtype if node.outputs and node.outputs[0] else "nothing"
        return None if dtype in allowed else f"output {dtype}"

    return rule


def constant(*indices: int) -> Rule:
    """These inputs, where they are there, are constants."""

    def rule(node: Node) -> str | None:
        for index in indices:
            tensor = node.input(index)
            if tensor is not None and not tensor.constant:
                return f"input {index} is no constant"
        return None

    return rule


def plain_gemm(node: Node) -> str | None:
    """``A · B + C`` without factors."""
    wanted = {"transA": 0, "alpha": 1.0, "beta": 1.0}
    other = [name for name, value in wanted.items() if node.attributes.get(name, value) != value]
    return f"{other[0]} is set" if other else None


def last_axis(node: Node) -> str | None:
    """Along the last axis."""
    first = node.input(0)
    rank = len(first.shape) if first and first.shape is not None else 0
    axis = node.attributes.get("axis", -1)
    return None if axis in (-1, rank - 1) else f"axis {axis}"
