"""Many questions and many openings in one process: nothing grows. (Long: benchmarks/soak.py.)"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import soak
from conftest import BundleOf
from soak import Look, growth

import mobilevlm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module", autouse=True)
def warm(bundle_of: BundleOf) -> Iterator[None]:
    """Opens a model once, so that libraries are loaded."""
    with mobilevlm.load(bundle_of("llava_v1", "fp32")) as vlm:
        vlm.generate("What is it?", max_new_tokens=2)
    yield


def test_questions_leave_nothing_behind(bundle_of: BundleOf) -> None:
    with mobilevlm.load(bundle_of("llava_v1", "fp32"), cache_mb=4) as vlm:
        looks = soak.soak(300, soak.asking(vlm))
    assert [look.done for look in looks] == [30, 150, 300]
    assert growth(looks) == [], [look.line() for look in looks]


def test_openings_leave_nothing_behind(bundle_of: BundleOf) -> None:
    looks = soak.soak(40, soak.opening(str(bundle_of("llava_v1", "fp32")), "onnx"))
    assert growth(looks) == [], [look.line() for look in looks]


def test_what_grows_is_told() -> None:
    assert growth([Look(1, 100, 2, 3), Look(2, 100, 2, 3)]) == []
    grown = growth([Look(1, 100, 2, 3), Look(2, 100 + 2 * soak.ALLOWED, 3, 5)])
    assert grown == ["memory by 33.6 MB", "threads from 2 to 3", "files from 3 to 5"]
