"""Facts about the machine: processor, memory, onnxruntime's providers, installed extras."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mobilevlm.plan import default_threads

FEATURES = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8",
    "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
"""Processor features that the kernels care about, as Linux names them."""
VNNI = frozenset(("avx512_vnni", "avx_vnni", "amx_int8"))
"""With one of these, x86 adds products of u8 and s8 in 32 bits."""
X86 = ("x86_64", "amd64", "i386", "i686")
ARM = "0x41"
"""``CPU implementer`` of cores that Arm designed"""
ARM_CORES = {
    "0xd03": "Cortex-A53", "0xd05": "Cortex-A55", "0xd08": "Cortex-A72", "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75", "0xd0b": "Cortex-A76", "0xd0c": "Neoverse-N1", "0xd0d": "Cortex-A77",
    "0xd40": "Neoverse-V1", "0xd41": "Cortex-A78", "0xd44": "Cortex-X1", "0xd46": "Cortex-A510",
    "0xd47": "Cortex-A710", "0xd48": "Cortex-X2", "0xd49": "Neoverse-N2", "0xd4d": "Cortex-A715",
    "0xd4e": "Cortex-X3", "0xd4f": "Neoverse-V2", "0xd80": "Cortex-A520", "0xd81": "Cortex-A720",
    "0xd82": "Cortex-X4",
}  # fmt: skip
"""By ``CPU part``; Linux gives no names on Arm."""

DEVICE_TREE = Path("/proc/device-tree/model")
"""File in which boards give their name."""

EXTRAS = {
    "export": (
        "gguf",
        "ml_dtypes",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "google.protobuf",
        "safetensors",
        "sentencepiece",
    ),
    "gguf": ("llama_cpp",),
    "reference": ("torch",),
    "batch": ("pyarrow",),
    "server": ("prometheus_client", "starlette", "uvicorn"),
    "video": ("av",),
    "heic": ("pillow_heif",),
    "hub": ("huggingface_hub",),
    "npu": ("onnxruntime_qnn",),
    "coreml": ("coremltools",),
    "plots": ("matplotlib",),
    "structured": ("llguidance",),
}


def describe_machine() -> dict[str, Any]:
    """Facts that belong beside any measurement."""
    import onnxruntime

    from mobilevlm._version import __version__

    cpu = _cpu_info()
    present = _features(cpu)
    return {
        "mobilevlm": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "board": _board(),
        "processor": _processor_name(cpu) or platform.processor() or "unknown",
        "threads": default_threads(),
        "features": [feature for feature in FEATURES if feature in present],
        "memory_gb": _memory_gb(),
        "onnxruntime": onnxruntime.__version__,
        "providers": onnxruntime.get_available_providers(),
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """Return board, processor, memory, system and onnxruntime's version in one line."""
    return ", ".join(
        [
            *([facts["board"]] if facts["board"] else []),
            facts["processor"],
            f"{facts['memory_gb']} GB",
            facts["system"],
            f"onnxruntime {facts['onnxruntime']}",
        ]
    )


def processor_key() -> str:
    """Return the key that measurements on this machine are stored by: processor, its features,
    processors in use and onnxruntime's version."""
    import onnxruntime

    cpu = _cpu_info()
    present = _features(cpu)
    name = _processor_name(cpu) or platform.processor() or platform.machine() or "unknown"
    features = " ".join(feature for feature in FEATURES if feature in present)
    cores = default_threads()
    return f"{name} | {features} | {cores} | onnxruntime {onnxruntime.__version__}"


def int8_weight_bits() -> Literal[7, 8] | None:
    """Bits that weights may have here which meet 8-bit activations; none where the system does not
    tell.

    8 unless sums of two products saturate in 16 bits, as they do on x86 without VNNI
    (onnxruntime's documentation, "Quantize ONNX models", on ``reduce_range``).
    """
    if platform.machine().lower() not in X86:
        return 8
    present = _features(_cpu_info())
    if not present:
        return None
    return 8 if present & VNNI else 7


def installed_extras() -> dict[str, list[str]]:
    """For each extra the packages that are missing."""
    return {
        extra: [module for module in modules if not _is_installed(module)]
        for extra, modules in EXTRAS.items()
    }


def peak_memory_mb() -> float:
    """The most memory that this process had resident so far (0 where the system does not tell)."""
    # ru_maxrss begins with that of the process which started this one.
    status = proc_bytes(Path("/proc/self/status"))
    if "VmHWM" in status:
        return status["VmHWM"] / 1e6
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def available_memory() -> float:
    """Bytes that programs may still take (0 where the system does not tell)."""
    return proc_bytes(Path("/proc/meminfo")).get("MemAvailable", 0.0)


def proc_bytes(path: Path) -> dict[str, float]:
    """Bytes by their names in a file of /proc that counts in kB; none where it is not there."""
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            found[words[0].rstrip(":")] = 1024.0 * int(words[1])
    return found


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _features(cpu: dict[str, str]) -> set[str]:
    return set(cpu.get("flags", cpu.get("Features", "")).split())


def _processor_name(cpu: dict[str, str]) -> str:
    """The model's, or on Arm the kinds of cores; empty where the system does not tell."""
    if "CPU part" not in cpu:
        return cpu.get("model name", "")
    found = re.findall(r"CPU implementer\s*: (\w+).*?CPU part\s*: (\w+)", _cpu_text(), re.DOTALL)
    cores = (ARM_CORES.get(part) if by == ARM else None for by, part in found)
    names = [name or f"core {by}/{part}" for name, (by, part) in zip(cores, found, strict=True)]
    return ", ".join(dict.fromkeys(names))


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    pairs = (
        line.split(":", 1) for line in _cpu_text().split("\n\n")[0].splitlines() if ":" in line
    )
    return {key.strip(): value.strip() for key, value in pairs}


def _board() -> str | None:
    """Return the device's own name: boards have it in their device tree, Android in its
    properties."""
    try:
        return DEVICE_TREE.read_text(encoding="utf-8", errors="replace").strip(" \0\n") or None
    except OSError:  # Android lets nobody read it
        names = ("manufacturer", "model")
        return " ".join(filter(None, (_property(f"ro.product.{name}") for name in names))) or None


def _property(name: str) -> str:
    program = shutil.which("getprop")
    if program is None:
        return ""
    import subprocess  # on Android only

    try:
        done = subprocess.run([program, name], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _cpu_text() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _memory_gb() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return 0.0
