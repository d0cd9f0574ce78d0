"""Makes .ort files of the graphs in the folder ``graphs`` of the working directory, in the folder
``made`` there: a program of its own, run by its path.

onnxruntime's converter prints to stdout, and the order in which it stores things depends on where
they lie in memory. So the program starts itself once more where addresses are the same every time
(Linux), imports neither torch nor mobilevlm (with tokenizers), which draw random numbers when they
are imported, its sessions have no second thread, which would allocate whenever the scheduler lets
it, and nothing that it is given has a length of its own: the same graphs give the same bytes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

ISOLATED = ("-B", "-P", "-s")
"""Options of Python: writes no bytecode, looks neither into this file's folder nor the user's."""
_ADDR_NO_RANDOMIZE = 0x0040000
"""Flag of Linux' personality(2)"""
_QUERY = 0xFFFFFFFF


def main() -> None:
    """Converts."""
    if len(sys.argv) == 1 and _fixed_addresses():
        os.execv(sys.executable, [sys.executable, *ISOLATED, __file__, "again"])
    sys.modules["torch"] = None  # type: ignore[assignment]  # the converter imports it if it can
    import onnxruntime
    from onnxruntime.tools.convert_onnx_models_to_ort import (
        OptimizationStyle,
        convert_onnx_models_to_ort,
    )

    options = onnxruntime.SessionOptions
    onnxruntime.SessionOptions = lambda: _of_one_thread(options())  # the converter has no setting
    Path.resolve = lambda self, strict=False: self  # type: ignore[method-assign]
    convert_onnx_models_to_ort(
        Path("graphs"),
        output_dir=Path("made"),
        # What is simplified no further is what providers that compile nodes expect; what ONNX
        # Runtime may do to the rest is in the file too.
        optimization_styles=[OptimizationStyle.Runtime],
        enable_type_reduction=True,
    )


def _of_one_thread(options: Any) -> Any:
    options.intra_op_num_threads = 1
    return options


def _fixed_addresses() -> bool:
    """Asks for the same addresses in the programs that this process becomes. Whether that works."""
    try:
        personality = ctypes.CDLL(None).personality
    except (OSError, AttributeError):
        return False
    if hasattr(os, "sched_setaffinity"):  # one thread: none can allocate before another
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    now = personality(ctypes.c_ulong(_QUERY))
    return bool(now >= 0 and personality(ctypes.c_ulong(now | _ADDR_NO_RANDOMIZE)) >= 0)


if __name__ == "__main__":
    main()
