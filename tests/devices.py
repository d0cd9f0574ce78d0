"""A Python as a device has it: the packages of the base install, without this program."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mobilevlm.runtime.bench.devices.contracts import Ended
from mobilevlm.runtime.bench.devices.ssh import SshCommand

NOT_THERE = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir",
             "safetensors", "sentencepiece", "gguf", "llama_cpp")  # fmt: skip


def device_python(folder: Path, without: Sequence[str] = ()) -> Path:
    """Made of links to the packages that the tests run with; ``without``: module names."""
    venv.create(folder, with_pip=False, symlinks=True)
    there = next((folder / "lib").glob("python*")) / "site-packages"
    absent = {name.lower() for name in (*NOT_THERE, *without)}
    for place in (Path(entry) for entry in sys.path if entry.endswith("-packages")):
        for path in place.iterdir():
            name = path.name.lower()
            first = name.split("-")[0].split(".")[0]
            ours = name.startswith(("mobilevlm", "_")) or name.endswith(".pth")
            if first not in absent and not ours and not (there / path.name).exists():
                (there / path.name).symlink_to(path)
    python = folder / "bin" / "python"
    for name in ("mobilevlm", "onnx"):
        command = [str(python), "-c", f"import {name}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert f"No module named '{name}'" in done.stderr
    return python


@dataclass(frozen=True)
class LocalDevice:
    """A shell on this machine."""

    folders: tuple[str, ...]
    pythons: tuple[str, ...] = (sys.executable,)
    name: str = "here"
    before: str = ""
    """Commands that its shell runs first."""

    def start(self, command: str) -> SshCommand:
        return SshCommand(["/bin/sh", "-c", self.before + command])

    def explain(self, ended: Ended) -> str:
        return f"code {ended.code}: {ended.stderr}"
