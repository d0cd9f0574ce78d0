"""Nothing is sent, and nothing written but below the program's own cache folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BundleOf, Fixture

ASK = "import mobilevlm, sys\nwith mobilevlm.load(sys.argv[1]) as vlm:\n    "
ASK += "print(vlm.generate('Who?', [sys.argv[2]], max_new_tokens=2).text)"
OPENED = re.compile(r'\b(?:open|openat|creat|mkdir|mkdirat)\(.*?"([^"]*)"(.*)= \d')
"""A call that strace saw succeed: the path and the flags."""


def files_below(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def ask(
    home: Path, bundle: Path, image: Path, *watcher: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A question in a process with an empty home folder."""
    known = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    known |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    command = [*watcher, sys.executable, "-B", "-c", ASK, str(bundle), str(image)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**known, **environment},
        check=True,
        timeout=120,
    )


def test_an_answer_leaves_nothing_but_the_note_of_checked_files(
    bundle_of: BundleOf, mobilevlm_v2: Fixture, tmp_path: Path
) -> None:
    ask(tmp_path, bundle_of("tiny", "int4"), mobilevlm_v2.image)
    [found] = files_below(tmp_path)
    assert found.startswith("cache/mobilevlm/verified/")


def test_the_value_that_a_person_sets_wins(
    bundle_of: BundleOf, mobilevlm_v2: Fixture, tmp_path: Path
) -> None:
    show = "import os, mobilevlm; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for value, expected in ((None, "1"), ("0", "0")):
        known = {key: text for key, text in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
        if value is not None:
            known["ORT_DISABLE_TELEMETRY"] = value
        done = subprocess.run([sys.executable, "-c", show], capture_output=True, env=known)
        assert done.stdout.decode().strip() == expected


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_an_answer_opens_no_socket_and_writes_only_below_the_cache_folder(
    bundle_of: BundleOf, mobilevlm_v2: Fixture, tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    home = tmp_path / "home"
    home.mkdir()
    calls = "trace=socket,connect,open,openat,creat,mkdir,mkdirat,unlink,rename"
    ask(
        home,
        bundle_of("tiny", "int4"),
        mobilevlm_v2.image,
        *("strace", "-f", "-y", "-o", str(log), "-e", calls),
    )
    lines = log.read_text(errors="replace").splitlines()
    assert len(lines) > 100
    assert [line for line in lines if re.search(r"\b(socket|connect)\(", line)] == []
    written = {
        match[1]
        for line in lines
        if (match := OPENED.search(line))
        and ("mkdir" in line or re.search(r"O_WRONLY|O_RDWR|O_CREAT", match[2]))
    }
    own = str(home / "cache")
    assert {path for path in written if not path.startswith((own, "/dev/", "/proc/"))} == set()
