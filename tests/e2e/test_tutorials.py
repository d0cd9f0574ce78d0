"""Tutorials: their shell blocks run as they stand, on the built-in model."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
EXPECTED = {
    "first-answer": "ms to the first token)",
    "checkpoint-to-phone": "vision_encoder.ort",
    "gate-in-ci": "exit code 0",
    "server-for-an-app": '"error"',
    "benchmark-a-board": "written to board/plan.json",
}
"""Text that the blocks of each print."""
INSTALLED = """
set -eo pipefail
pip() { :; }
source() { :; }
python3() { if [ "$2" != venv ]; then command python3 "$@"; fi; }
"""
"""Commands that the tests' environment has already, and the end at the first failure."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_every_tutorial_is_tried() -> None:
    assert {path.stem for path in TUTORIALS.glob("*.md")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_shell_blocks_of_a_tutorial_run(name: str, tmp_path: Path) -> None:
    if name == "server-for-an-app" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    text = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    script = INSTALLED + "\n".join(blocks).replace(":8080", f":{(port := free_port())}")
    done = subprocess.run(
        ["bash", "-c", script.replace("--port 8080", f"--port {port}")],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert EXPECTED[name] in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
