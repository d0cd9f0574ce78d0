"""MNN: the image encoder, from a graph of standard operators (comparison/artifacts.py)."""

from __future__ import annotations

from typing import Any

import MNN
import numpy as np

from comparison.work import NotSupportedError, Shapes, picture, timed


def load(shapes: Shapes, threads: int, options: dict[str, Any]) -> Mnn:
    """``options``: ``vision``, MNN's file, and ``settings`` of its runtime."""
    runtime = MNN.nn.create_runtime_manager(
        ({"backend": 0, "numThread": threads, **options["settings"]},)
    )
    network = MNN.nn.load_module_from_file(
        options["vision"], ["pixel_values"], ["visual_tokens"], runtime_manager=runtime
    )
    return Mnn(shapes, network, runtime)


class Mnn:
    """See :class:`comparison.work.Peer`."""

    def __init__(self, shapes: Shapes, network: Any, runtime: Any) -> None:
        self._shapes, self._network, self._runtime = shapes, network, runtime
        size = shapes.image_size
        self._input = MNN.expr.placeholder([1, 3, size, size], MNN.expr.NCHW)

    def encode(self, variation: int) -> float:
        pixels = picture(self._shapes.image_size, variation)

        def run() -> None:
            values = pixels.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
            self._input.write(np.ascontiguousarray(values))
            visual = MNN.expr.convert(self._network.forward([self._input])[0], MNN.expr.NCHW)
            assert np.size(visual.read()) == self._shapes.visual_tokens * self._shapes.hidden_size

        return timed(run)[0]

    def generate(self, length: int, count: int, variation: int) -> tuple[float, float]:
        raise NotSupportedError("image encoder only")

    def ask(self, variation: int) -> tuple[float, float]:
        raise NotSupportedError("image encoder only")
