"""Export: checkpoint to bundle. ``mobilevlm.export`` is this package and the function in one."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

from mobilevlm.export.pipeline import export

__all__ = ["export"]


class _CallablePackage(ModuleType):
    """Lets ``mobilevlm.export(checkpoint, bundle)`` work beside ``import mobilevlm.export.…``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return export(*args, **kwargs)


__doc__ = inspect.getdoc(export) or ""  # help(mobilevlm.export) and editors show the function
__signature__ = inspect.signature(export)
sys.modules[__name__].__class__ = _CallablePackage
