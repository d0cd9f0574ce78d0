"""Checks of a manifest against itself and against the files that are there.

A bundle may be a stranger's: its numbers decide how much memory is taken and how long loops run. So
each is bounded before anything is built, by the bytes of the bundle's files: whatever a model
consists of has weights there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from mobilevlm.audio_encoder import SoundEncoder
from mobilevlm.decoder_checks import check_decoder
from mobilevlm.errors import BundleError
from mobilevlm.image_checks import check_image, check_projector, check_vision
from mobilevlm.number_checks import (
    Check,
    shortened,
)
from mobilevlm.protobuf import external_files
from mobilevlm.recipe import PARTS, PREFILL
from mobilevlm.regular_file import leaves_folder

if TYPE_CHECKING:
    from mobilevlm.bundle import Artifact, Manifest
    from mobilevlm.spec import ModelSpec

SUFFIXES = {"onnx": ".onnx", "npu": ".onnx", "ort": ".ort", "gguf": ".gguf"}
"""How files that engines open end, by the format of the artifact"""


def check_file(folder: Path, name: str) -> os.stat_result:
    """Return the status of a file of a bundle; raise BundleError unless it is a regular file in the
    folder (or a link of the Hugging Face cache)."""
    path = folder / name
    try:
        status = path.stat()
        outside = leaves_folder(path, folder)
    except (OSError, ValueError, RuntimeError):  # names that no file can have; links in a circle
        raise BundleError(f"{path}: the file is missing from the bundle: export it again") from None
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: not a regular file: copy or export the bundle again")
    if outside:
        raise BundleError(f"{path}: a link that leaves the bundle: put the file itself there")
    return status


def check_graph(folder: Path, name: str, listed: Iterable[str]) -> None:
    """Check that an ONNX file keeps its weights in listed files beside it, whatever the version of
    onnxruntime would open.

    Raises:
        BundleError: it names another file, or is no ONNX file.
    """
    path = folder / name
    try:
        found = external_files(path)
    except (ValueError, OSError):
        raise BundleError(
            f"{path}: damaged or no ONNX file: copy or export the bundle again"
        ) from None
    beside = Path(name).parent
    for place in sorted(found):
        if (beside / place).as_posix() not in listed or Path(place).name != place:
            raise BundleError(
                f"{path}: its weights are in {place!r:.100}, which is no file of the bundle: "
                f"export the bundle again"
            )


def check_manifest(manifest: Manifest, where: Path) -> None:
    """Check the numbers of a manifest whose files have the sizes that it says. ``where``: its path.

    Raises:
        BundleError: a number is out of its range, or contradicts another one or the files.
    """
    spec = manifest.spec
    total = sum(entry.size for entry in manifest.files.values())
    # One after the other: later checks compute with what earlier ones have found right.
    checks = chain(
        _inputs(spec, total),
        check_decoder(spec.decoder, total),
        _outputs(spec, total),
        _conversation(spec),
        _recipe(manifest),
        _artifacts(manifest.artifacts),
        _stored(manifest),
    )
    for name, value, is_right, expected in checks:
        if not is_right:
            raise BundleError(
                f"{where}: {name} is {shortened(value)}, expected {expected}: export the bundle "
                f"again"
            )


def _inputs(spec: ModelSpec, total: int) -> Iterator[Check]:
    kinds = sorted(spec.inputs)
    yield "inputs", kinds, kinds in ([], ["image"], ["audio"]), "image, audio, or none"
    if spec.has_sound:
        from mobilevlm.sound_checks import check_sound

        yield from check_sound(spec.audio, total)
        yield from check_projector(spec, total)
    if spec.has_images:
        yield from check_image(spec)
        assert not isinstance(spec.image.encoder, SoundEncoder)
        yield from check_vision(spec.image.encoder, total)
        yield from check_projector(spec, total)


def _outputs(spec: ModelSpec, total: int) -> Iterator[Check]:
    kinds = sorted(spec.outputs)
    yield "outputs", kinds, kinds in ([], ["image"]), "image, or none"
    if spec.draws:
        from mobilevlm.output_checks import check_output  # few models have one

        yield from check_output(spec, total)


def _conversation(spec: ModelSpec) -> Iterator[Check]:
    found = {"conversation.eos_token_ids": spec.conversation.eos_token_ids}
    for kind, given in spec.inputs.items():
        found[f"the ids of inputs.{kind}.layout"] = given.layout.ids
    for name, ids in found.items():
        is_right = all(0 <= item < spec.decoder.vocab_size for item in ids)
        yield name, ids, is_right, "ids of the vocabulary"


def _recipe(manifest: Manifest) -> Iterator[Check]:
    recipe = manifest.recipe
    formats = {part: getattr(recipe, part) for part in (*PARTS, PREFILL)}
    for name, layers in {**formats, **recipe.layers}.items():
        size = 32 if layers is None else layers.block_size
        yield f"recipe.{name}.block_size", size, 1 <= size <= 1 << 16, "a number of weights"
    stages = {artifact.stage for artifact in manifest.artifacts}
    is_right = recipe.prefill is not None or PREFILL not in stages
    yield "recipe.prefill", recipe.prefill, is_right, "the format of the prefill graph"


def _artifacts(artifacts: tuple[Artifact, ...]) -> Iterator[Check]:
    paths = [artifact.path for artifact in artifacts]
    for artifact in artifacts:
        path, suffix = artifact.path, SUFFIXES[artifact.format]
        yield "artifacts.path", path, paths.count(path) == 1, "a file of one artifact only"
        yield "artifacts.path", path, path.endswith(suffix), f"a file that ends in {suffix}"
        bits = artifact.bits_per_weight
        yield "artifacts.bits_per_weight", bits, bits is None or 0 < bits <= 64, "up to 64"
        if artifact.format in ("npu", "ort") and artifact.stage == "decoder" and artifact.data:
            path = artifact.data[0]  # the graph for single tokens
            yield "artifacts.data", path, path.endswith(suffix), f"a file that ends in {suffix}"


def _stored(manifest: Manifest) -> Iterator[Check]:
    decoder, system = manifest.spec.decoder, manifest.system_prompt
    table, layers = manifest.embeddings, manifest.layer_embeddings
    for name, part, width in (
        ("embeddings", table, decoder.hidden_size),
        ("layer_embeddings", layers, decoder.layer_input_width),
    ):
        if part is None:
            continue
        shape, expected = (part.rows, part.columns), (decoder.vocab_size, width)
        yield f"{name}.rows and columns", shape, shape == expected and width > 0, str(expected)
        size, item = manifest.files[part.path].size, int(part.dtype[-2:]) // 8
        end = part.offset + part.rows * part.columns * item
        is_right = part.offset >= 0 and part.offset % item == 0 and end <= size
        yield f"{name}.offset", part.offset, is_right, f"rows within {size} bytes"
    if table is not None:
        place, expected_place = layers and layers.path, table.path
        is_right = (place == expected_place) if decoder.layer_input_size else layers is None
        yield "layer_embeddings", place, is_right, "in the file of embeddings, if layers have some"
    if system is not None:
        ids = system.ids
        is_right = all(0 <= item < decoder.vocab_size for item in ids)
        yield "system_prompt.ids", ids, is_right, "ids of the vocabulary"
