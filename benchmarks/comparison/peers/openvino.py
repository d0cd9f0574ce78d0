"""OpenVINO, which reads this project's ONNX graphs, contrib operators included: the image encoder
and the decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from comparison.work import NotSupportedError, Shapes, photo, questions, timed, token_ids


def load(shapes: Shapes, threads: int, options: dict[str, Any]) -> OpenVino:
    """``options``: ``vision``, ``decoder`` and ``embeddings``, files of a bundle."""
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    vision = core.compile_model(options["vision"], "CPU", settings)
    decoder = options.get("decoder") and core.compile_model(options["decoder"], "CPU", settings)
    return OpenVino(shapes, vision, decoder, options.get("embeddings"))


class OpenVino:
    """See :class:`comparison.work.Peer`. OpenVINO gives keys and values back as new arrays, one
    longer than what went in; its shared buffers exist for its own model format only."""

    def __init__(self, shapes: Shapes, vision: Any, decoder: Any, embeddings: str | None) -> None:
        self._shapes = shapes
        self._vision = vision.create_infer_request()
        if decoder is None:
            return
        self._decoder = decoder.create_infer_request()
        self._table = np.memmap(str(embeddings), np.float16, "r").reshape(
            shapes.vocab_size, shapes.hidden_size
        )
        self._empty = {
            value.any_name: np.zeros((1, value.partial_shape[1].get_length(), 0,
                                      value.partial_shape[3].get_length()), np.float32)
            for value in decoder.inputs
            if value.any_name.startswith("past_key_values.")
        }  # fmt: skip

    def encode(self, variation: int) -> float:
        return timed(self._encode, variation)[0]

    def generate(self, length: int, count: int, variation: int) -> tuple[float, float]:
        if not hasattr(self, "_decoder"):
            raise NotSupportedError("image encoder only")
        ids = token_ids(length, self._shapes.vocab_size, variation)
        past = self._empty
        prefill, (token, past) = timed(self._next, self._embed(ids), past)

        def decode(token: int, past: dict[str, Any]) -> None:
            for _ in range(count):
                token, past = self._next(self._embed([token]), past)

        return prefill, timed(decode, token, past)[0]

    def ask(self, variation: int) -> tuple[float, float]:
        if not hasattr(self, "_decoder"):
            raise NotSupportedError("image encoder only")
        first, second = questions(self._shapes.vocab_size, variation)

        def about_photo() -> dict[str, Any]:
            visual = self._encode(variation)
            marks = token_ids(self._shapes.visual_tokens, self._shapes.vocab_size, variation)
            text = self._embed(marks[len(visual) :] + first)
            return self._next(np.concatenate([visual, text]), self._empty)[1]

        seconds, past = timed(about_photo)
        kept = self._shapes.visual_tokens
        past = {name: np.ascontiguousarray(value[:, :, :kept]) for name, value in past.items()}
        return seconds, timed(self._next, self._embed(second), past)[0]

    def _encode(self, variation: int) -> NDArray[np.float32]:
        """Visual tokens of all tiles, one tile after the other; of noise, not of a photo that was
        cut into tiles, which takes no time here."""
        size, found = (self._shapes.image_size,) * 2, []
        for tile in range(self._shapes.tiles):
            self._vision.infer({"pixels": photo(size, variation * self._shapes.tiles + tile)[None]})
            found.append(self._vision.get_tensor("visual_tokens").data[0].copy())
        return np.concatenate(found)

    def _embed(self, ids: list[int]) -> NDArray[np.float32]:
        return self._table[ids].astype(np.float32)

    def _next(
        self, embeds: NDArray[np.float32], past: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        before = next(iter(past.values())).shape[2]
        self._decoder.infer(
            {
                "inputs_embeds": embeds[None],
                "total_length": np.array([before + len(embeds)], np.int32),
                "logits_positions": np.array([len(embeds) - 1], np.int64),
                **past,
            }
        )
        present = {
            name: self._decoder.get_tensor(name.replace("past_key_values", "present")).data.copy()
            for name in past
        }
        return int(self._decoder.get_tensor("logits").data[0, -1].argmax()), present
