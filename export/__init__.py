"""Export: checkpoint to bundle. ``mobilevlm.export`` is this package and the function in one."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from mobilevlm.export.pipeline import export

__all__ = ["export"]


class _CallablePackage(ModuleType):
    """Lets ``mobilevlm.export(checkpoint, bundle)`` work beside ``import mobilevlm.export.…``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
