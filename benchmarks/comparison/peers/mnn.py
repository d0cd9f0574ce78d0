"""MNN: the image encoder, from a graph of standard operators (comparison/artifacts.py)."""

from __future__ import annotations

from typing import Any

import MNN
import numpy as np

from comparison.work import NotSupportedError, Shapes, photo, timed


def load(shapes: Shapes, threads: int, options: dict[str, Any]) -> Mnn:
    """``options``: ``vision``, MNN's file, ``settings`` of its runtime, ``mean`` and ``std`` of
    pixels between 0 and 1."""
    runtime = MNN.nn.create_runtime_manager(
        ({"backend": 0, "numThread": threads, **options["settings"]},)
    )
    network = MNN.nn.load_module_from_file(
        options["vision"], ["pixel_values"], ["visual_tokens"], runtime_manager=runtime
    )
    mean, std = (np.array(options[name], np.float32) for name in ("mean", "std"))
    return Mnn(shapes, network, runtime, 1 / (255 * std), -mean / std)


class Mnn:
    """See :class:`comparison.work.Peer`."""

    def __init__(self, shapes: Shapes, network: Any, runtime: Any, scale: Any, shift: Any) -> None:
        self._shapes, self._network, self._runtime = shapes, network, runtime
        self._scale, self._shift = scale, shift
        size = shapes.image_size
        self._input = MNN.expr.placeholder([1, 3, size, size], MNN.expr.NCHW)

    def encode(self, variation: int) -> float:
        pixels = photo(self._shapes.photo, variation)

        def run() -> None:
            values = pixels * self._scale + self._shift
            self._input.write(np.ascontiguousarray(values.transpose(2, 0, 1)[None]))
            visual = MNN.expr.convert(self._network.forward([self._input])[0], MNN.expr.NCHW)
            assert np.size(visual.read()) == self._shapes.visual_tokens * self._shapes.hidden_size

        return timed(run)[0]

    def generate(self, length: int, count: int, variation: int) -> tuple[float, float]:
        raise NotSupportedError("image encoder only")

    def ask(self, variation: int) -> tuple[float, float]:
        raise NotSupportedError("image encoder only")
