"""Processors that qemu emulates, and programs on them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

from emulation.root import PYTHON, QEMU
from mobilevlm.errors import MobileVLMError

READ_FEATURES = """\
import ctypes
read = ctypes.CDLL(None).getauxval
read.restype, read.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
print(read(16), read(26))  # AT_HWCAP, AT_HWCAP2
"""
FEATURES = (
    {0: "fp", 1: "asimd", 3: "aes", 7: "crc32", 8: "atomics", 9: "fphp", 10: "asimdhp",
     11: "cpuid", 12: "asimdrdm", 20: "asimddp", 22: "sve", 23: "asimdfhm"},
    {1: "sve2", 9: "svei8mm", 13: "i8mm", 14: "bf16", 23: "sme", 26: "smei8i32"},
)  # fmt: skip
"""By bits of AT_HWCAP and AT_HWCAP2 (Linux, arch/arm64/include/uapi/asm/hwcap.h): those that
kernels for matrices ask for, as /proc/cpuinfo calls them."""


@dataclass(frozen=True)
class Processor:
    """A core as qemu names it."""

    name: str
    part: int
    """``CPU part`` of /proc/cpuinfo"""
    example: str
    implementer: int = 0x41
    """Arm"""


PROCESSORS = {
    item.name: item
    for item in (
        Processor("cortex-a53", 0xD03, "Raspberry Pi 3, phones of 2015"),
        Processor("cortex-a72", 0xD08, "Raspberry Pi 4"),
        Processor("cortex-a76", 0xD0B, "Raspberry Pi 5"),
        Processor("neoverse-n1", 0xD0C, "Graviton 2"),
        Processor("max", 0x051, "all that qemu has", implementer=0),
    )
}


@dataclass(frozen=True)
class Machine:
    """A root as a processor sees it."""

    place: Path
    processor: Processor
    path: tuple[Path, ...]
    """Folders of Python packages beside the root's"""

    def python(
        self, *arguments: object, environment: Mapping[str, str] = MappingProxyType({})
    ) -> str:
        """Return the output of the root's Python.

        Raises:
            MobileVLMError: it ends with another exit code than 0.
        """
        python = str(self.place / PYTHON)
        done = subprocess.run(
            [QEMU, "-L", self.place, "-cpu", self.processor.name, python, *map(str, arguments)],
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": ":".join(map(str, self.path)), **environment},
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise MobileVLMError(
                f"{self.processor.name}: python ended with {done.returncode}: {last:.300}"
            )
        return done.stdout


@contextmanager
def machine(root: Path, processor: Processor, *path: Path) -> Iterator[Machine]:
    """A root whose /proc/cpuinfo is the processor's.

    Without it the one of this machine shows, and onnxruntime for Arm, which looks for the cores
    there, ends at its import. Its features are those that the emulated processor reports.
    """
    with TemporaryDirectory() as folder:
        place = Path(folder)
        for entry in root.iterdir():
            (place / entry.name).symlink_to(entry)
        made = Machine(place, processor, path)
        words = map(int, made.python("-c", READ_FEATURES).split())
        (place / "proc").mkdir()
        (place / "proc" / "cpuinfo").write_text(_cpuinfo(processor, *words))
        yield made


def _cpuinfo(processor: Processor, *words: int) -> str:
    """Return the content of /proc/cpuinfo that Linux would write."""
    features = " ".join(
        name
        for word, names in zip(words, FEATURES, strict=True)
        for bit, name in names.items()
        if word >> bit & 1
    )
    return "".join(
        f"processor\t: {index}\nBogoMIPS\t: 108.00\nFeatures\t: {features}\n"
        f"CPU implementer\t: {processor.implementer:#04x}\nCPU architecture: 8\n"
        f"CPU variant\t: 0x0\nCPU part\t: {processor.part:#05x}\nCPU revision\t: 0\n\n"
        for index in range(os.cpu_count() or 1)
    )
