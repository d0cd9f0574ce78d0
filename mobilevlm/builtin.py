"""The models that come with the package: a name stands for a checkpoint, or for its bundle."""

from __future__ import annotations

from pathlib import Path

from mobilevlm._version import __version__
from mobilevlm.errors import require

BUILT_IN = ("nano", "nano-moe")
"""Names of the models; each is a checkpoint folder in ``nano/weights/``."""

WEIGHTS = Path(__file__).parent / "nano" / "weights"
RECIPE = "int4"
"""What a built-in model is exported with when it is used by its name."""


def is_built_in(given: Path) -> bool:
    """Whether a path is the name of a built-in model; a folder of that name comes first."""
    return str(given) in BUILT_IN and not given.exists()


def checkpoint_path(given: Path) -> Path:
    """The checkpoint that a built-in name stands for; any other path as it is."""
    return WEIGHTS / given if is_built_in(given) else given


def bundle_path(given: Path, engine: str = "auto") -> Path:
    """The bundle that a built-in name stands for; any other path as it is.

    The first use exports the model into the cache folder, about two seconds of work.

    Raises:
        MissingExtraError: it is to be exported, and the packages for that are not installed.
    """
    if not is_built_in(given):
        return given
    from mobilevlm import progress
    from mobilevlm.bundle import cache_folder, is_bundle
    from mobilevlm.checkpoint import SAFETENSORS, file_sha256

    checkpoint = WEIGHTS / given
    formats = ("onnx",) if engine in ("auto", "onnx") else ("onnx", "gguf")
    version = f"{__version__}-{file_sha256(checkpoint / SAFETENSORS)[:12]}"
    folder = cache_folder() / "models" / f"{given}-{RECIPE}-{'-'.join(formats)}-{version}"
    if is_bundle(folder):
        return folder
    try:
        from mobilevlm.export.pipeline import export
    except ImportError as error:
        raise require(error.name or "onnxscript", "export", f"exporting {given}") from None
    progress.say(f"{given!s:<12}is exported once, to {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    export(checkpoint, folder, recipe=RECIPE, formats=formats, measure=False)
    return folder
