"""Small vision-language models on devices: export a checkpoint, run it without torch.

>>> import mobilevlm
>>> mobilevlm.export("checkpoint/", "bundle/", recipe="int4")
>>> vlm = mobilevlm.load("bundle/")
>>> for piece in vlm.stream("What is in the picture?", images=["cat.png"]):
...     print(piece, end="")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilevlm._version import __version__
from mobilevlm.errors import MobileVLMError, QualityError

if TYPE_CHECKING:
    from mobilevlm.export import export as export
    from mobilevlm.runtime import load as load

__all__ = ["MobileVLMError", "QualityError", "__version__", "export", "load"]

# onnxruntime reads this once, when it is imported: from 1.32 on it would write a device id and a
# database of events, and send them. Whoever sets the variable has it as it is set.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HERE = Path(__file__).parent
if not (_HERE / "runtime").is_dir():
    # Imported from a checkout (a Python started there finds this folder before the installed
    # package): there, export/ and runtime/ lie beside this folder.
    __path__.append(str(_HERE.parent))


def __getattr__(name: str) -> Any:
    """Imports the two verbs when they are first used: neither needs the other's packages."""
    import importlib

    if name == "load":
        return importlib.import_module("mobilevlm.runtime").load
    if (
        name == "export"
    ):  # the package is callable: mobilevlm.export(…) and mobilevlm.export.recipes
        return importlib.import_module("mobilevlm.export")
    raise AttributeError(f"module 'mobilevlm' has no attribute {name!r}")
