"""The float32 torch reference: an independent second implementation that artifacts are measured
against. Needs the extra ``[reference]``; nothing at run time imports it.
"""

from mobilevlm.reference.model import ReferenceModel, load_reference

__all__ = ["ReferenceModel", "load_reference"]
