"""onnxruntime-genai: the decoder alone, from a model folder made around this project's own decoder
graph (comparison/genai_folder.py). Its vision pipelines are written per model family, and none is
MobileVLM's."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime_genai as og

from comparison.work import NotSupportedError, Shapes, timed, token_ids


def load(shapes: Shapes, threads: int, options: dict[str, Any]) -> GenAI:
    """``options``: ``folder``, the model folder."""
    return GenAI(shapes, og.Model(options["folder"]))


class GenAI:
    """See :class:`comparison.work.Peer`. The number of threads stands in the model folder."""

    def __init__(self, shapes: Shapes, model: Any) -> None:
        self._shapes, self._model = shapes, model

    def encode(self, variation: int) -> float:
        raise NotSupportedError("onnxruntime-genai has no image pipeline for this family")

    def generate(self, length: int, count: int, variation: int) -> tuple[float, float]:
        settings = og.GeneratorParams(self._model)
        settings.set_search_options(
            max_length=self._shapes.context_length, do_sample=False, min_length=length + count + 1
        )
        generator = og.Generator(self._model, settings)
        ids = np.array([token_ids(length, self._shapes.vocab_size, variation)], np.int32)

        def prefill() -> None:
            generator.append_tokens(ids)
            generator.generate_next_token()

        def decode() -> None:
            for _ in range(count):
                generator.generate_next_token()

        return timed(prefill)[0], timed(decode)[0]

    def ask(self, variation: int) -> tuple[float, float]:
        raise NotSupportedError("onnxruntime-genai has no image pipeline for this family")
