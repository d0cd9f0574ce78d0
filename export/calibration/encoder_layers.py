"""Statistics of the inputs of linear layers on calibration data, by ONNX Runtime: of a vision tower
or audio encoder, and of its projector.

The stage's float32 graph gives sums over an image's tokens, not the inputs themselves. Second
moments take the square of a layer's input size: the images pass once for each run of layers whose
second moments have room together, up to the last of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mobilevlm.errors import MobileVLMError
from mobilevlm.export.calibration.samples import Sample, sample_images
from mobilevlm.export.calibration.statistics import Block, Sums, Wanted, finished
from mobilevlm.export.graph.author import author_watched_encoder
from mobilevlm.linear_groups import linear_groups
from mobilevlm.model import Model
from mobilevlm.plan import Plan
from mobilevlm.preparation import positions_of
from mobilevlm.prompt import Arrays
from mobilevlm.runtime.engines.onnx.engine import open_session

MOST_POSITIONS = {True: 1 << 13, False: 1 << 12}
"""Patches of all images, with and without second moments: which channels of a tower are large is
the same in every image."""
MAX_MOMENTS = 1 << 28
"""Bytes of second moments that the images pass for at once."""
_FIGURES = ("rows", "maximum", "squares", "products")


def watch_encoder(
    model: Model, samples: Sequence[Sample], wanted: Wanted, hessian: bool
) -> Iterator[Block]:
    """Statistics of the encoder's layers and the projector, in the order of use.

    ``wanted``: the layers to watch. ``hessian``: with the second moments, which take the square of
    a layer's input size.

    Raises:
        MobileVLMError: no sample has an image or a sound; an activation is infinite or no number.
        ImageError, AudioError: an image or a sound cannot be read.
    """
    images = _usable_arrays(model, samples, MOST_POSITIONS[hessian])
    if not images:
        raise MobileVLMError(
            "calibration: no sample has an image or a sound, the encoder needs some"
        )
    with tempfile.TemporaryDirectory(prefix="mobilevlm-") as folder:
        path = Path(folder) / "watched.onnx"
        watched = author_watched_encoder(model.weights, model.spec, wanted, hessian, path)
        for run in _runs(model, watched, hessian):
            yield _watch(path, {number: watched[number] for number in run}, hessian, images)


def _runs(
    model: Model, watched: Mapping[int, tuple[str, ...]], hessian: bool
) -> Iterator[list[int]]:
    """Yield neighbours whose second moments have room together; all of them without."""
    sizes = {name: group.in_size for group in linear_groups(model.spec) for name in group.names}
    run: list[int] = []
    room = MAX_MOMENTS
    for number, readers in watched.items():
        taken = 4 * sizes[readers[0]] ** 2 if hessian else 0
        if run and taken > room:
            yield run
            run, room = [], MAX_MOMENTS
        run.append(number)
        room -= taken
    if run:
        yield run


def _watch(
    path: Path, watched: Mapping[int, tuple[str, ...]], hessian: bool, images: Sequence[Arrays]
) -> Block:
    """Run the graph on all images, as far as these layers need it."""
    figures = _FIGURES if hessian else _FIGURES[:-1]
    outputs = [f"{figure}.{number}" for number in watched for figure in figures]
    graph = ir.load(path)
    graph.graph.outputs[:] = [value for value in graph.graph.outputs if value.name in set(outputs)]
    RemoveUnusedNodesPass()(graph)
    part = path.with_name("part.onnx")
    ir.save(graph, part)
    session = open_session(part, Plan().threads_of("vision"), planned=False)
    known = {item.name for item in session.get_inputs()}
    sums = {number: Sums(hessian) for number in watched}
    for arrays in images:
        inputs = {name: array[None] for name, array in arrays.items() if name in known}
        made = dict(zip(outputs, session.run(outputs, inputs), strict=True))
        for number, item in sums.items():
            rows, maximum, squares, *products = (made[f"{name}.{number}"] for name in figures)
            item.add_figures(int(rows[0]), maximum, squares, products[0] if products else None)
    return finished({name: sums[number] for number, names in watched.items() for name in names})


def _usable_arrays(model: Model, samples: Sequence[Sample], most: int) -> list[Arrays]:
    """Return inputs of the encoder of about so many patches, of as many images as there is room
    for: one tile of each before the next of any, the last one (mostly the whole image) first."""
    spec = model.spec.encoded
    assert spec is not None
    shown: list[list[Arrays]] = []
    left = most
    for image in (image for sample in samples for image in sample_images(model, sample)):
        shown.append(list(reversed(image.arrays)))
        left -= positions_of(image.arrays[-1], spec)
        if left <= 0:
            break
    found: list[Arrays] = []
    left = most
    for arrays in chain.from_iterable(zip_longest(*shown)):
        if arrays is None:
            continue
        left -= positions_of(arrays, spec)
        if left < 0 and found:
            break
        found.append(arrays)
    return found
