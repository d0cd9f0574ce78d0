"""Operators that accelerators take through ONNX Runtime: a file with a table for each provider.

A provider takes a node if its operator is in the table, in a version that the provider knows, and
no rule speaks against it. The tables are those of one version of onnxruntime: its documentation
names the operators, its source (``IsOpSupported`` and the like) what restricts them.
"""

from __future__ import annotations

from mobilevlm.export.targets.providers.coreml import ML_PROGRAM, NEURAL_NETWORK
from mobilevlm.export.targets.providers.table import Provider
from mobilevlm.export.targets.providers.xnnpack import XNNPACK

ONNXRUNTIME = "1.32"
"""The version that the tables are about"""

_PROVIDERS = {table.name: table for table in (ML_PROGRAM, NEURAL_NETWORK, XNNPACK)}


def find_provider(name: str) -> Provider:
    """Return the table of a provider."""
    return _PROVIDERS[name]
