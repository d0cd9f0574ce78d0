"""Versions: the oldest that setup.cfg allows are those that .ci/oldest runs."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[2]
# Extras that .ci/oldest installs: pillow-heif 1.0 needs a newer Pillow than the oldest.
EXTRAS = ("audio", "batch", "export", "server", "structured", "video")


def test_the_oldest_versions_that_are_allowed_are_the_ones_that_are_run() -> None:
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    lists = config["options"]["install_requires"], *(extras[name] for name in EXTRAS)
    allowed = dict(re.findall(r"^([\w-]+) >= ([\d.]+)$", "\n".join(lists), re.MULTILINE))
    script = (ROOT / ".ci" / "oldest").read_text(encoding="utf-8")
    assert f".[{','.join(EXTRAS)}]" in script
    text = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8")
    run = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE))
    assert {name.lower() for name in allowed} == {name.lower() for name in run}
    oldest = {name.lower(): version for name, version in run.items()}
    for name, version in allowed.items():
        found = oldest[name.lower()]
        assert f"{found}.".startswith(f"{version}."), (name, version, found)
