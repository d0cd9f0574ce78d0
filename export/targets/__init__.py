"""Targets: what an export must be to run on a device. One TOML file each, named as the target."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mobilevlm.errors import MobileVLMError
from mobilevlm.export.recipes.file import find_recipe
from mobilevlm.export.recipes.layer_formats import TOWER_ROLES
from mobilevlm.export.targets.htp import Chip
from mobilevlm.export.targets.providers import find_provider
from mobilevlm.plain_types import from_dict
from mobilevlm.recipe import LinearFormat, Precision, Recipe, WeightBits

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class ProviderGoal:
    """An accelerator behind ONNX Runtime, and how much of the model it has to take."""

    name: str
    """Name of a table in export/targets/providers"""
    least: dict[str, float]
    """Share of the operators of each stage that goes to it; the others are for the processor"""


@dataclass(frozen=True)
class Target:
    """A device, or a kind of them."""

    name: str
    description: str
    formats: tuple[Literal["onnx", "gguf", "npu"], ...]
    """Kinds of artifacts"""
    recipe: str
    memory_mb: float
    """The most that a process with the model may have in use, without pages of the model's files,
    which the system can take back"""
    positions: int = 0
    """Length of a sequence that the memory has room for; 0: the whole context"""
    weight_bits: WeightBits | None = None
    """Bits of ``int8`` weights"""
    chunk_length: int = 64
    context_length: int = 1024
    """Shapes of graphs for NPUs, see :class:`mobilevlm.recipe.Recipe`"""
    max_tiles: int = 0
    """Tiles that an image is split into, at most; 1: none is split, so that all take as many
    positions. 0: as the checkpoint has it"""
    layer_norm: Literal["fused", "centred"] = "fused"
    operators: Literal["runtime", "elementary"] = "runtime"
    vision: Precision | None = None
    """Precision of tower and projector, if not the recipe's"""
    experts: Literal["fused", "plain", "dense"] = "fused"
    """Form of sparse experts, see :class:`mobilevlm.recipe.Recipe`"""
    htp: Chip | None = None
    """Chip to compile for"""
    share_weights: bool = False
    """True if the binary of the decoder's graphs has their weights once. It is half as large then,
    but the emulator cannot load it."""
    provider: ProviderGoal | None = None
    """Accelerator; with one the bundle has .ort files too"""
    package: bool = False
    """True if the vision stage is a Core ML package too"""
    runtime: Literal["transformers.js", "onnxruntime-genai"] | None = None
    """Another runtime that runs the bundle too (export/targets/other_runtimes.py)"""
    browser: bool = False
    """True if it is a page that runs the bundle (examples/web)"""
    tested: str = ""
    """Behaviour of such a device that the project's own tests show, in a few words"""
    caveat: str = ""
    """Known fault, in a few words"""

    @property
    def verified(self) -> str:
        """Summary of the checks of an export on the exporting machine, and of the project's
        tests."""
        compiled = "compiled, no operator left to the CPU; " if self.htp is not None else ""
        if self.provider is not None:
            title = find_provider(self.provider.name).title
            compiled = f"operators that {title} takes, by table; .ort files run; "
        tested = f"; tested: {self.tested}" if self.tested else ""
        return f"{compiled}memory{tested}" + (f". But: {self.caveat}" if self.caveat else "")

    def settled(self) -> Recipe:
        """Its recipe with its shapes."""
        recipe = find_recipe(self.recipe)
        if self.vision is not None:
            tower = LinearFormat(self.vision)
            layers = {key: one for key, one in recipe.layers.items() if key not in TOWER_ROLES}
            recipe = replace(recipe, tower=tower, projector=tower, layers=layers)
        return replace(
            recipe,
            operators=self.operators,
            chunk_length=self.chunk_length,
            context_length=self.context_length,
            layer_norm=self.layer_norm,
            experts=self.experts,
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
