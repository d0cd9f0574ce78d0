"""Targets: what an export must be to run on a device. One TOML file each, named as the target."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mobilevlm.errors import MobileVLMError
from mobilevlm.export.htp import Chip
from mobilevlm.export.recipes import Recipe, WeightBits, find_recipe
from mobilevlm.spec import from_dict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Target:
    """A device, or a kind of them."""

    name: str
    description: str
    formats: tuple[Literal["onnx", "gguf", "npu"], ...]
    """Kinds of artifacts"""
    recipe: str
    memory_mb: float
    """The most that a process with the model may have resident"""
    weight_bits: WeightBits | None = None
    """Of ``int8`` weights"""
    chunk_length: int = 64
    context_length: int = 1024
    """Shapes of graphs for NPUs, see :class:`mobilevlm.export.recipes.Recipe`"""
    layer_norm: Literal["fused", "centred"] = "fused"
    htp: Chip | None = None
    """Chip to compile for"""
    share_weights: bool = False
    """Whether the binary of the decoder's graphs has their weights once. It is half as large then,
    but the emulator cannot load it."""
    caveat: str = ""
    """What is known not to be right, in a few words"""
    proven: str = ""
    """What was shown once, beyond what each export checks, and where"""

    @property
    def verified(self) -> str:
        """What an export to it proves on the exporting machine."""
        compiled = "compiled, no operator left to the CPU; " if self.htp is not None else ""
        once = f". Shown: {self.proven}" if self.proven else ""
        return f"{compiled}memory{once}" + (f". But: {self.caveat}" if self.caveat else "")

    def settled(self) -> Recipe:
        """Its recipe with its shapes."""
        return replace(
            find_recipe(self.recipe),
            chunk_length=self.chunk_length,
            context_length=self.context_length,
            layer_norm=self.layer_norm,
        )


def target_names() -> list[str]:
    """All targets there are."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find_target(name: str) -> Target:
    """A target by its name.

    Raises:
        MobileVLMError: there is none, or its file is wrong.
    """
    if name not in target_names():
        raise MobileVLMError(
            f"target {name!r} is not known: expected one of {', '.join(target_names())}"
        )
    path = FOLDER / f"{name}.toml"
    data = {"name": name, **tomllib.loads(path.read_text(encoding="utf-8"))}
    return from_dict(Target, data, str(path), strict=True)
