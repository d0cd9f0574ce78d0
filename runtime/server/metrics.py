"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from mobilevlm.runtime.answer.generation import Generation
from mobilevlm.runtime.machine import proc_bytes
from mobilevlm.runtime.server.turns import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


class Metrics:
    """Counts what a server does. ``load``: of its queue; ``models``: how many are loaded."""

    def __init__(self, load: Load, models: Callable[[], int]) -> None:
        disable_created_metrics()
        self._registry = registry = CollectorRegistry()
        by_model = {"labelnames": ("model",), "registry": registry}

        def gauge(name: str, told: str, value: Callable[[], float]) -> None:
            Gauge(f"mobilevlm_{name}", told, registry=registry).set_function(value)

        self._requests = Counter(
            "mobilevlm_requests", "Requests by route and status of the answer",
            ("route", "status"), registry=registry,
        )  # fmt: skip
        self._closed = Counter(
            "mobilevlm_abandoned", "Answers that stopped since the client went away", **by_model
        )
        self._ttft = Histogram(
            "mobilevlm_time_to_first_token_seconds", "From the request to the first piece of text, "
            "the queue included", buckets=_SECONDS, **by_model,
        )  # fmt: skip
        self._seconds = Histogram(
            "mobilevlm_answer_seconds", "From the request to the end of the answer",
            buckets=_SECONDS, **by_model,
        )  # fmt: skip
        self._rate = Histogram(
            "mobilevlm_tokens_per_second", "Of the tokens after the first of each answer",
            buckets=_RATES, **by_model,
        )  # fmt: skip
        counts = {
            "prompt_tokens": "Positions of prompts, those of images included",
            "generated_tokens": "Tokens of answers",
            "reused_tokens": "Positions of prompts that were in a cache",
            "visual_tokens": "Positions of images",
            "reused_images": "Images that were not encoded again",
            "drawn_images": "Images that were drawn",
        }
        self._counts = {
            name: Counter(f"mobilevlm_{name}", told, **by_model) for name, told in counts.items()
        }
        gauge("queue_waiting", "Requests that wait", lambda: load.waiting)
        gauge("answers_running", "Requests whose answers are being made", lambda: load.running)
        gauge("models_loaded", "Models in memory", models)
        gauge("resident_memory_bytes", "Resident memory of the process", _resident)

    def count_request(self, route: str, status: int) -> None:
        """Count a request that was answered. ``route``: as the application has it."""
        self._requests.labels(route, str(status)).inc()

    def count_abandoned(self, model: str) -> None:
        """Count an answer whose client went away."""
        self._closed.labels(model).inc()

    def count_answer(self, model: str, answer: Generation, ttft: float, seconds: float) -> None:
        """Count a finished answer. ``ttft``: seconds to its first piece; ``seconds``: to its
        end."""
        self._ttft.labels(model).observe(ttft)
        self._seconds.labels(model).observe(seconds)
        if answer.timings.tokens_per_second:
            self._rate.labels(model).observe(answer.timings.tokens_per_second)
        counted = {
            "prompt_tokens": answer.prompt_tokens,
            "generated_tokens": len(answer.token_ids),
            "reused_tokens": answer.reused.tokens,
            "visual_tokens": answer.visual_tokens,
            "reused_images": answer.reused.images,
        }
        for name, count in counted.items():
            self._counts[name].labels(model).inc(count)

    def count_drawing(self, model: str, images: int, seconds: float) -> None:
        """Count images of one request, which took so long."""
        self._seconds.labels(model).observe(seconds)
        self._counts["drawn_images"].labels(model).inc(images)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        found: bytes = generate_latest(self._registry)
        return found


def _resident() -> float:
    return proc_bytes(Path("/proc/self/status")).get("VmRSS", 0.0)
