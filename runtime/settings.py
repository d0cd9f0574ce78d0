"""Settings of how a model runs, checked before anything is read."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields, replace
from os import PathLike
from typing import Any

from mobilevlm.errors import MobileVLMError, PlanWarning
from mobilevlm.plan import Plan, check_engine, default_threads

MOST_TOP_LOGPROBS = 20
"""OpenAI's limit."""
MOST_TEXT = 80
"""Characters of a wrong value that a message repeats."""


def check_settings(
    bundle: object,
    engine: object,
    threads: object,
    plan: object,
    cache_mb: object,
    max_resident_mb: object,
    max_memory_mb: object,
    max_tiles: object,
    max_image_tokens: object,
    image_tokens: object = None,
) -> None:
    """Refuse arguments of ``load`` that are no settings: a wrong type, name or range.

    Raises:
        MobileVLMError: names the first of them.
    """
    if not isinstance(bundle, (str, PathLike)):
        raise MobileVLMError(f"bundle is {_shown(bundle)}, expected a path or a built-in name")
    if not isinstance(engine, str):
        raise MobileVLMError(f"engine is {_shown(engine)}, expected a name: 'auto', 'onnx' …")
    check_engine(engine)
    if threads is not None:
        _check_count("threads", threads)
    if isinstance(plan, Plan):
        _check_plan(plan)
    elif plan not in ("auto", "none"):
        raise MobileVLMError(f"plan is {_shown(plan)}, expected 'auto', 'none' or a Plan")
    _check_size("cache_mb", cache_mb, 0)
    for name, size in {"max_resident_mb": max_resident_mb, "max_memory_mb": max_memory_mb}.items():
        if size is not None:
            _check_size(name, size, 1)
    check_max_tiles(max_tiles)
    counts = {"max_image_tokens": max_image_tokens, "image_tokens": image_tokens}
    for name, count in counts.items():
        if count is not None:
            _check_count(name, count)


def check_cache_dir(folder: object, megabytes: object) -> None:
    """Refuse a ``cache_dir`` or ``cache_dir_mb`` that is no setting.

    Raises:
        MobileVLMError: a wrong type or range, or a size without a folder.
    """
    if folder is not None and (not isinstance(folder, (str, PathLike)) or folder == ""):
        raise MobileVLMError(f"cache_dir is {_shown(folder)}, expected the path of a folder")
    if megabytes is not None:
        _check_size("cache_dir_mb", megabytes, 1)
        if folder is None:
            raise MobileVLMError("cache_dir_mb goes with cache_dir: give a folder")


def check_max_tiles(most: object) -> None:
    """Refuse a ``max_tiles`` that is neither none nor a number of tiles.

    Raises:
        MobileVLMError: it is not 1 or more.
    """
    if most is not None:
        _check_count("max_tiles", most)


def fitting_threads(threads: int) -> int:
    """Return a number of threads, reduced to the processors that this process may use; a warning
    says so. More only wait for each other.

    Raises:
        MobileVLMError: it is not 1 or more.
    """
    _check_count("threads", threads)
    most = default_threads()
    if threads <= most:
        return threads
    warnings.warn(
        f"{threads} threads were asked for, this process may use {most} "
        f"processor{'s' * (most > 1)}: it takes {most}",
        PlanWarning,
        stacklevel=3,
    )
    return most


def fitting_plan(plan: Plan) -> Plan:
    """Return a person's own plan with threads that fit; see :func:`fitting_threads`."""
    fitting: dict[str, Any] = {
        name: fitting_threads(getattr(plan, name))
        for name in ("vision_threads", "decoder_threads")
        if getattr(plan, name)
    }
    return replace(plan, **fitting)


def check_new_tokens(count: object) -> None:
    """Refuse a ``max_new_tokens`` that is no number of tokens.

    Raises:
        MobileVLMError: it is not 1 or more.
    """
    _check_count("max_new_tokens", count)


def stop_strings(stop: object) -> tuple[str, ...]:
    """Return the strings of ``stop``: one, several, or none.

    Raises:
        MobileVLMError: something else, or an empty one, which would end each answer at once.
    """
    found = (stop,) if isinstance(stop, str) else stop
    if not isinstance(found, (list, tuple, set, frozenset)) or not all(
        isinstance(text, str) and text for text in found
    ):
        raise MobileVLMError(f"stop is {_shown(stop)}, expected a string or a list of strings")
    return tuple(found)


def check_logprobs(wanted: object, top: object) -> int | None:
    """Return how many likeliest tokens go with each; none if no log probabilities are wanted.

    Raises:
        MobileVLMError: wrong types, out of range, or ``top`` without ``wanted``.
    """
    if not isinstance(wanted, bool):
        raise MobileVLMError(f"logprobs is {_shown(wanted)}, expected True or False")
    if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= MOST_TOP_LOGPROBS:
        raise MobileVLMError(f"top_logprobs is {_shown(top)}, expected 0 to {MOST_TOP_LOGPROBS}")
    if top and not wanted:
        raise MobileVLMError("top_logprobs goes with logprobs: set logprobs to True")
    return top if wanted else None


def _check_plan(plan: Plan) -> None:
    choices = {
        "spinning": (True, False),
        "vision_weights": ("mapped", "packed"),
        "prefill_weights": ("mapped", "released", "packed"),
        "memory": ("fast", "compact", "in turn"),
    }
    for item in fields(plan):
        name, value = item.name, getattr(plan, item.name)
        if name in choices:
            if value not in choices[name]:
                known = ", ".join(map(repr, choices[name]))
                raise MobileVLMError(f"plan: {name} is {_shown(value)}, expected {known}")
        elif name == "engine":
            check_engine(value)
        elif name == "max_resident_mb":
            if value is not None:
                _check_size(f"plan: {name}", value, 1)
        elif not (name == "draft_tokens" and value is None):
            _check_count(f"plan: {name}", value, int(name.startswith("prefill")))


def _check_count(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise MobileVLMError(f"{name} is {_shown(value)}, expected a whole number")
    if value < least:
        raise MobileVLMError(f"{name} is {_shown(value)}, expected {least} or more")


def _check_size(name: str, value: object, least: int) -> None:
    """``least``: 0 where nothing at all is a size too."""
    wrong = isinstance(value, bool) or not isinstance(value, (int, float))
    if wrong or not (math.isfinite(value) and (value > 0 or value == least)):  # type: ignore[arg-type, operator]
        wanted = "more than 0" if least else "0 or more"
        raise MobileVLMError(f"{name} is {_shown(value)}, expected megabytes, {wanted}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…"
