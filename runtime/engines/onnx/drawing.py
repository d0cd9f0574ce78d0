"""Images out in ONNX Runtime: the head that chooses codes, the embedding of codes, and the decoder
of all codes of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.plan import Plan
from mobilevlm.runtime.engines import Float32, still_open
from mobilevlm.runtime.engines.contracts import check_drawing
from mobilevlm.runtime.engines.onnx.engine import open_session
from mobilevlm.runtime.engines.onnx.mapped_weights import Session
from mobilevlm.spec import ModelSpec


class OnnxDrawing:
    """The three stages; may be used by several threads. ``files``: graphs by stage; ``entries`` as
    of :func:`open_session`."""

    def __init__(
        self, files: Mapping[str, Path], spec: ModelSpec, plan: Plan, entries: Mapping[str, str]
    ) -> None:
        threads = plan.threads_of("decoder")
        self._sessions: dict[str, Session] | None = {
            stage: open_session(path, threads, plan.spinning, entries=entries, planned=False)
            for stage, path in files.items()
        }
        check_drawing(self._sessions, spec)

    def logits(self, states: Float32) -> Float32:
        """Return the logits of the next code ``(sequences, num_codes)`` from the decoder's states
        ``(sequences, hidden_size)``."""
        found: Float32 = self._run("image_head", "logits", {"states": states[:, None]})[:, 0]
        return found

    def embed(self, codes: Sequence[int]) -> Float32:
        """Return the decoder's rows for codes ``(length, hidden_size)``."""
        ids = np.asarray([codes], np.int64)
        found: Float32 = self._run("code_embeddings", "inputs_embeds", {"codes": ids})[0]
        return found

    def decode(self, codes: Sequence[int]) -> Float32:
        """Return the values of pixels ``(edge, edge, 3)``, about -1 to 1, of all codes of an
        image."""
        ids = np.asarray([codes], np.int64)
        found: Float32 = self._run("image_decoder", "image", {"codes": ids})[0]
        return found

    def close(self) -> None:
        """Free the weights."""
        self._sessions = None

    def _run(self, stage: str, output: str, inputs: Mapping[str, NDArray[Any]]) -> Float32:
        found: Float32 = still_open(self._sessions)[stage].run([output], dict(inputs))[0]
        return found
