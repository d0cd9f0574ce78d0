"""A pytest plugin for .ci/oldest: a test that ends because torch, llama.cpp or an extra is not
installed, or with the line that names a newer onnxruntime, is left out; every other failure counts.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

_ABSENT = re.compile(
    r"MissingExtraError: |(No module named|needs the package) '(torch|llama_cpp|matplotlib)'|"
    r"need onnxruntime [\d.]+, this is "
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Report a test that ends for want of a package as left out."""
    report = yield
    if report.failed and call.excinfo is not None and _ABSENT.search(call.excinfo.exconly()):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1], call.excinfo.exconly()[:200])
    return report
