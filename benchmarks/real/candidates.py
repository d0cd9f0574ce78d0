"""Bundles that are measured: from recipes, GGUF types and folders on the command line."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import mobilevlm
from mobilevlm.bundle import Bundle, is_bundle, open_bundle
from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.recipes.file import find_recipe
from mobilevlm.gguf.file import read_gguf
from mobilevlm.spec import GGUFType

REFERENCE = "fp32"
Drawn: TypeAlias = Literal["own", "scenes"]
_DRAWN: tuple[Drawn, ...] = get_args(Drawn)
_GRAPHS = ("decoder", "prefill")


@dataclass(frozen=True)
class Wanted:
    """One candidate of the command line."""

    name: str
    """Name in tables, and of its folder."""
    recipe: str = REFERENCE
    """Name or TOML file."""
    gguf_type: GGUFType | None = None
    """A GGUF decoder of this type instead of the recipe's ONNX graphs."""
    data: Path | None = None
    """Samples for an importance matrix (JSONL), or the matrix (GGUF)."""
    drawn: Drawn | None = None
    """An importance matrix from the model's own answers, or from drawn scenes."""
    bundle: Path | None = None
    """A finished bundle."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of a bundle's language side."""

    decoder: int
    """Weights of decoder and head, and those of the prefill graph, without a separate embedding
    table."""
    token: int
    """Weights that decoding one token reads."""
    embeddings: int
    """Embedding table apart from the head."""


@dataclass(frozen=True)
class Candidate:
    """A bundle to be measured."""

    name: str
    engine: Literal["onnx", "gguf"]
    bundle: Bundle
    export_seconds: float | None = None
    """None for a bundle that was there, and for the float32 one."""

    @property
    def has_prefill_graph(self) -> bool:
        """Return whether prompts have a graph of their own."""
        return any(part.stage == "prefill" for part in self.bundle.manifest.artifacts)

    @property
    def sizes(self) -> Sizes:
        """Return the bytes of its language side."""
        bundle = self.bundle
        decoder = bundle.artifact("decoder", self.engine)
        if self.engine == "gguf":
            tensors = read_gguf(bundle.path(decoder.path)).tensors
            tied = "output.weight" not in tensors  # the table is the head too
            table = 0 if tied else tensors["token_embd.weight"].size
            whole = sum(tensor.size for tensor in tensors.values())
            return Sizes(whole - table, decoder.bytes_per_token or whole - table, table)
        graphs = [
            part for part in bundle.manifest.artifacts if part.stage in ("decoder", "prefill")
        ]
        files = {name for part in graphs for name in part.data}
        embeddings = bundle.artifact("embeddings", "onnx").data
        files -= set(embeddings)
        own = sum(bundle.path(name).stat().st_size for name in decoder.data)
        return Sizes(
            sum(bundle.path(name).stat().st_size for name in files),
            decoder.bytes_per_token or own,
            sum(bundle.path(name).stat().st_size for name in embeddings),
        )


def parse(text: str) -> Wanted:
    """Return what an argument names: a bundle folder, a GGUF type, or a recipe.

    Raises:
        MobileVLMError: it names nothing.
    """
    path = Path(text)
    if is_bundle(path):
        return Wanted(path.resolve().name, bundle=path)
    base, _, data = text.partition("+")
    types: tuple[GGUFType, ...] = get_args(GGUFType)
    kind = next((kind for kind in types if kind == base.lower()), None)
    if kind is None:
        try:
            find_recipe(text)
        except MobileVLMError as error:
            kinds = ", ".join(types)
            raise MobileVLMError(
                f"{text}: no bundle, and no GGUF type ({kinds}), and as a recipe: {error}"
            ) from None
        return Wanted(path.stem if path.suffix else text, recipe=text)
    if not data:
        return Wanted(kind, gguf_type=kind)
    if drawn := next((name for name in _DRAWN if name == data), None):
        return Wanted(f"{kind}+{data}", gguf_type=kind, drawn=drawn)
    if not Path(data).is_file():
        raise MobileVLMError(
            f"{text}: behind '+' goes own, scenes, a JSONL file of samples, or an importance matrix"
        )
    return Wanted(f"{kind}+{Path(data).stem}", gguf_type=kind, data=Path(data))


def parse_all(texts: list[str]) -> list[Wanted]:
    """Return all candidates of a command line.

    Raises:
        MobileVLMError: one names nothing, or two have the same name.
    """
    found: dict[str, Wanted] = {}
    for text in texts:
        wanted = parse(text)
        if wanted.name in found:
            raise MobileVLMError(f"{text}: two candidates are named {wanted.name}: rename one")
        found[wanted.name] = wanted
    return list(found.values())


def make(wanted: Wanted, checkpoint: Path, folder: Path, reuse: bool) -> Candidate:
    """Return a candidate's bundle, exported anew into ``folder`` unless it is there and may be
    reused; the float32 bundle is always exported, into the one that is there, whose unchanged
    artifacts stay."""
    engine: Literal["onnx", "gguf"] = "gguf" if wanted.gguf_type else "onnx"
    if wanted.bundle is not None:
        bundle = open_bundle(wanted.bundle)
        formats = {part.format for part in bundle.manifest.artifacts if part.stage == "decoder"}
        return Candidate(wanted.name, "onnx" if "onnx" in formats else "gguf", bundle)
    target = folder / wanted.name
    is_reference = wanted == Wanted(REFERENCE)
    if reuse and is_bundle(target) and not is_reference:
        return Candidate(wanted.name, engine, open_bundle(target))
    if target.exists() and not is_reference:
        shutil.rmtree(target)
    progress.say(f"export      {wanted.name}")
    start = time.perf_counter()
    matrix = wanted.data is not None and wanted.data.suffix == ".gguf"
    samples = wanted.drawn or (None if matrix else wanted.data)
    mobilevlm.export(
        checkpoint,
        target,
        recipe=wanted.recipe,
        formats=(engine,),
        gguf_type=wanted.gguf_type,
        imatrix=wanted.data if matrix else None,
        calibration=samples,
        measure=False,
    )
    seconds = None if is_reference else time.perf_counter() - start
    return Candidate(wanted.name, engine, open_bundle(target), seconds)
