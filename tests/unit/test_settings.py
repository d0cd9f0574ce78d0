"""Settings of a run: wrong values are one line before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import BundleOf

import mobilevlm
from mobilevlm.errors import MobileVLMError, PlanWarning, SessionError
from mobilevlm.plan import Plan, default_threads
from mobilevlm.runtime import VLM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "threads is 0, expected 1 or more"),
        ({"threads": -3}, "threads is -3, expected"),
        ({"threads": 1.5}, "threads is 1.5, expected a whole number"),
        ({"threads": "2"}, "threads is '2', expected"),
        ({"threads": True}, "threads is True, expected"),
        ({"engine": None}, "engine is None, expected a name"),
        ({"engine": "x" * 999}, "is not known: expected auto"),
        ({"plan": None}, "plan is None, expected 'auto', 'none' or a Plan"),
        ({"plan": "fast"}, "plan is 'fast', expected 'auto', 'none' or a Plan"),
        ({"plan": ["x" * 1000]}, "plan is \\['xxx"),
        ({"plan": Plan(decoder_threads=-1)}, "plan: decoder_threads is -1"),
        ({"plan": Plan(memory="slow")}, "plan: memory is 'slow', expected 'fast'"),  # type: ignore[arg-type]
        ({"plan": Plan(prefill_chunk=0)}, "plan: prefill_chunk is 0"),
        ({"plan": Plan("gpu")}, "engine 'gpu' is not known"),
        ({"cache_mb": None}, "cache_mb is None, expected megabytes, 0 or more"),
        ({"cache_mb": -1}, "cache_mb is -1"),
        ({"cache_mb": float("nan")}, "cache_mb is nan"),
        ({"max_memory_mb": 0}, "max_memory_mb is 0, expected megabytes, more than 0"),
        ({"max_memory_mb": "512MB"}, "max_memory_mb is '512MB', expected megabytes"),
        ({"max_tiles": 0}, "max_tiles is 0, expected 1 or more"),
        ({"max_tiles": 2.5}, "max_tiles is 2.5, expected a whole number"),
        ({"max_tiles": True}, "max_tiles is True, expected a whole number"),
        ({"max_resident_mb": float("inf")}, "max_resident_mb is inf, expected megabytes"),
    ],
    ids=str,
)
def test_a_setting_that_is_none_is_one_line(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MobileVLMError, match=message) as caught:
        mobilevlm.load(tmp_path, **arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("bundle", [None, 7, b"nano", ["nano"]])
def test_a_bundle_that_is_no_path_is_one_line(bundle: Any) -> None:
    with pytest.raises(MobileVLMError, match=r"bundle is .*, expected a path or a built-in name"):
        mobilevlm.load(bundle)


def test_threads_beyond_the_processors_are_reduced_with_a_warning(bundle_of: BundleOf) -> None:
    most, bundle = default_threads(), bundle_of("tiny", "fp32")
    with (
        pytest.warns(PlanWarning, match=f"^100000 threads were asked for.* it takes {most}$"),
        mobilevlm.load(bundle, threads=100_000) as vlm,
    ):
        assert vlm.threads == vlm.plan.vision_threads == most
    plan = Plan(vision_threads=5000, decoder_threads=1)
    with pytest.warns(PlanWarning), mobilevlm.load(bundle, plan=plan) as vlm:
        assert (vlm.plan.vision_threads, vlm.plan.decoder_threads) == (most, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": None}, "max_new_tokens is None, expected"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, expected"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected"),
        ({"stop": None}, "stop is None, expected a string or a list of strings"),
        ({"stop": [".", 3]}, "stop is .*, expected a string or a list of strings"),
        ({"stop": ""}, "stop is '', expected"),
        ({"session": "mine"}, "session is of type str, expected one that new_session"),
    ],
    ids=str,
)
def test_an_option_of_a_question_that_is_none_is_one_line(
    options: dict[str, Any], message: str, vlm: VLM
) -> None:
    with pytest.raises(MobileVLMError, match=message):
        vlm.stream("What is it?", **options)


def test_a_session_of_another_model_is_refused(vlm: VLM, bundle_of: BundleOf) -> None:
    with mobilevlm.load(bundle_of("tiny", "fp32")) as other:
        session = other.new_session()
        with pytest.raises(SessionError, match="the session is of another model"):
            vlm.stream("What is it?", session=session)
