"""Makes .ort files in a process of its own:
``python -m mobilevlm.export.ort_worker FOLDER OUTPUT``.

onnxruntime's converter prints to stdout, and the order in which it stores things depends on where
its library lies in memory: the process starts itself once more where that is the same every time
(Linux), so that the same graphs give the same bytes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_ADDR_NO_RANDOMIZE = 0x0040000
"""Of Linux' personality(2)"""
_QUERY = 0xFFFFFFFF


def main() -> None:
    """Converts all .onnx files of a folder."""
    folder, output = sys.argv[1:3]
    if len(sys.argv) == 3 and _fixed_addresses():
        command = [sys.executable, "-m", "mobilevlm.export.ort_worker", folder, output, "again"]
        os.execv(sys.executable, command)
    from onnxruntime.tools.convert_onnx_models_to_ort import (
        OptimizationStyle,
        convert_onnx_models_to_ort,
    )

    convert_onnx_models_to_ort(
        Path(folder),
        output_dir=Path(output),
        # What is simplified no further is what providers that compile nodes expect; what ONNX
        # Runtime may do to the rest is in the file too.
        optimization_styles=[OptimizationStyle.Runtime],
        enable_type_reduction=True,
    )


def _fixed_addresses() -> bool:
    """Asks for the same addresses in the programs that this process becomes. Whether that works."""
    try:
        personality = ctypes.CDLL(None).personality
    except (OSError, AttributeError):
        return False
    now = personality(ctypes.c_ulong(_QUERY))
    return bool(now >= 0 and personality(ctypes.c_ulong(now | _ADDR_NO_RANDOMIZE)) >= 0)


if __name__ == "__main__":
    main()
