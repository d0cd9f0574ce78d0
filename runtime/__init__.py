"""Runtime: a bundle in, a streamed answer out. Imports neither torch, transformers nor onnx."""

from mobilevlm.runtime.answer.generation import Generation, TextStream, Timings
from mobilevlm.runtime.answer.options import AnswerOptions
from mobilevlm.runtime.answer.sampling import SamplingOptions
from mobilevlm.runtime.loading import load
from mobilevlm.runtime.sequence.session import Session
from mobilevlm.runtime.vlm import VLM

__all__ = [
    "VLM",
    "AnswerOptions",
    "Generation",
    "SamplingOptions",
    "Session",
    "TextStream",
    "Timings",
    "load",
]
