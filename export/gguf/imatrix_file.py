"""Importance matrices of checkpoints as files of llama.cpp's format."""

from __future__ import annotations

import time
from os import PathLike
from pathlib import Path

from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError, require
from mobilevlm.families import open_checkpoint
from mobilevlm.gguf.architectures import gguf_architecture, is_own
from mobilevlm.model import open_options
from mobilevlm.recipe import OWN


def export_imatrix(
    checkpoint: str | PathLike[str],
    path: str | PathLike[str],
    *,
    calibration: str | PathLike[str] = OWN,
    vision_tower: str | PathLike[str] | None = None,
    conversation: str | None = None,
    variant: str | None = None,
    base: str | PathLike[str] | None = None,
) -> None:
    """Collects an importance matrix of a checkpoint folder and writes it in llama.cpp's format.

    ``calibration``: ``own``, ``scenes`` or a JSONL file (export/calibration/samples.py).

    Raises:
        CheckpointError: the checkpoint cannot be read.
        BundleError: the target is in the way.
        MobileVLMError, ImageError, PromptError: a sample is wrong.
        MissingExtraError: a package for exporting is not installed.
    """
    try:
        from mobilevlm.export.gguf.imatrix import check_imatrix_target, write_imatrix
        from mobilevlm.export.gguf.importance import calibrated_importance
    except ImportError as error:
        purpose = "collecting an importance matrix"
        raise require(error.name or "gguf", "export", purpose) from None
    start = time.perf_counter()
    target = Path(path)
    check_imatrix_target(target)
    options = open_options(vision_tower, conversation, variant, base)
    model = open_checkpoint(Path(checkpoint), options)
    architecture = gguf_architecture(model.spec.decoder)
    if is_own(architecture):
        raise MobileVLMError(
            f"{checkpoint}: importance matrices are for llama.cpp's architectures, this decoder's "
            f"is {architecture}"
        )
    matrix = calibrated_importance(model, str(calibration)).load()
    write_imatrix(matrix, target)
    progress.say(
        f"imatrix     {path}  {len(matrix.entries)} matrices, samples: {matrix.chunk_count}, "
        f"{time.perf_counter() - start:.1f} s"
    )
