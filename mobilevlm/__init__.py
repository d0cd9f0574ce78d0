"""Small vision-language models on devices: export a checkpoint, run it without torch.

>>> import mobilevlm
>>> mobilevlm.export("checkpoint/", "bundle/", recipe="int4")
>>> vlm = mobilevlm.load("bundle/")
>>> for piece in vlm.stream("What is in the image?", images=["cat.png"]):
...     print(piece, end="")

docs/reference/api.md has every call.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilevlm._version import __version__
from mobilevlm.errors import MobileVLMError, QualityError

if TYPE_CHECKING:
    from mobilevlm.export import export as export
    from mobilevlm.runtime import VLM as VLM
    from mobilevlm.runtime import Generation as Generation
    from mobilevlm.runtime import load as load
    from mobilevlm.runtime.answer.asynchronous import AsyncVLM as AsyncVLM
    from mobilevlm.runtime.answer.chat import Chat as Chat

_MODULES = {
    "VLM": "mobilevlm.runtime",
    "AsyncVLM": "mobilevlm.runtime.answer.asynchronous",
    "Generation": "mobilevlm.runtime",
    "Chat": "mobilevlm.runtime.answer.chat",
    "load": "mobilevlm.runtime",
}
"""Modules of the names that are imported when they are first used."""

__all__ = [
    "VLM",
    "AsyncVLM",
    "Chat",
    "Generation",
    "MobileVLMError",
    "QualityError",
    "__version__",
    "export",
    "load",
]

# onnxruntime reads this once, when it is imported: from 1.32 on it would write a device id and a
# database of events, and send them. Whoever sets the variable has it as it is set.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HERE = Path(__file__).parent
if not (_HERE / "runtime").is_dir():
    # Imported from a checkout (a Python started there finds this folder before the installed
    # package): there, export/ and runtime/ lie beside this folder.
    __path__.append(str(_HERE.parent))


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: neither verb needs the other's packages."""
    import importlib

    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if (
        name == "export"
    ):  # a package that is callable: mobilevlm.export(…), mobilevlm.export.recipes.file
        return importlib.import_module("mobilevlm.export")
    raise AttributeError(f"module 'mobilevlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, those that are not imported yet included."""
    return sorted(__all__)
