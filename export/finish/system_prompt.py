"""Keys and values of the system prompt, computed by the exported decoder and kept in the bundle."""

from __future__ import annotations

from collections.abc import Sequence

from mobilevlm.bundle import Bundle, SystemPrompt
from mobilevlm.plan import Plan
from mobilevlm.runtime.engines import token_rows
from mobilevlm.runtime.engines.onnx.stored_segment import write_segment
from mobilevlm.runtime.engines.opening import onnx_decoder

PATH = "onnx/system_prompt.bin"


def write_system_prompt(bundle: Bundle, ids: Sequence[int]) -> SystemPrompt:
    """Runs the ONNX decoder over ``ids`` as the runtime would without a plan, and writes what it
    leaves in the state's buffers, see :class:`mobilevlm.bundle.SystemPrompt`.
    (float16 would take half the bytes, 1 % of a large model's bundle, and change the answers.)"""
    path = bundle.path(bundle.artifact("decoder", "onnx").path)
    decoder = onnx_decoder(bundle, path, Plan())
    state = decoder.new_state()
    decoder.extend(state, token_rows(decoder, ids))
    write_segment(bundle.path(PATH), decoder.save(state, 0))
    decoder.close()
    return SystemPrompt(PATH, tuple(ids))
