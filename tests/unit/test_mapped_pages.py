"""Pages of mapped files are given back, and only pages that the file can bring again."""

from __future__ import annotations

import mmap
import platform
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path

import numpy as np
import pytest

from mobilevlm.runtime.engines.mapped_pages import give_back, unmapping

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="Linux only")
SIZE = 1 << 22


def resident(name: str) -> int:
    """Bytes of a file's mappings that this process holds."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(name)
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "weights.onnx_data"
    found.write_bytes(np.arange(SIZE, dtype=np.uint8).tobytes())
    return found


def test_pages_that_were_only_read_are_given_back_and_come_again(path: Path) -> None:
    mapped = np.memmap(path, np.uint8, "r")
    before = int(mapped.sum())
    assert resident(path.name) >= SIZE
    assert give_back(path) >= SIZE
    assert resident(path.name) == 0
    assert int(mapped.sum()) == before


def test_pages_that_were_written_to_stay(path: Path) -> None:
    with path.open("rb") as file:
        private = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    private[5] = 77
    assert give_back(path) == 0
    assert private[5] == 77 and resident(path.name) > 0


def test_a_file_that_is_not_mapped_or_not_there_is_nothing(path: Path) -> None:
    assert give_back(path) == 0
    assert give_back(path.with_name("none")) == 0


def test_nothing_is_given_back_while_a_session_is_opened_on_the_file(path: Path) -> None:
    mapped = np.memmap(path, np.uint8, "r")
    mapped.sum()
    with ThreadPoolExecutor(1) as beside:
        with unmapping(path):
            waiting = beside.submit(give_back, path)
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
            assert resident(path.name) >= SIZE
        assert waiting.result() >= SIZE
    assert resident(path.name) == 0
