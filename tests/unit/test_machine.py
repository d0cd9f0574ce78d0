"""Report of the processor."""

from __future__ import annotations

import pytest

from mobilevlm.runtime import machine

pytestmark = pytest.mark.pure

PHONE = "".join(
    f"processor\t: {index}\nBogoMIPS\t: 38.40\nFeatures\t: fp asimd aes asimddp i8mm\n"
    f"CPU implementer\t: {by}\nCPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: {part}\n\n"
    for index, (by, part) in enumerate(
        [("0x41", "0xd46")] * 3 + [("0x41", "0xd4d")] * 2 + [("0x51", "0xd4d")]
    )
)


def test_cores_of_a_phone_are_named_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cpu_text", lambda: PHONE)
    about = machine.describe_machine()
    assert about["processor"] == "Cortex-A510, Cortex-A715, core 0x51/0xd4d"
    assert about["features"] == ["asimd", "asimddp", "i8mm"]
    assert machine.processor_key().startswith("Cortex-A510, Cortex-A715, core 0x51/0xd4d | asimd ")


def test_a_processor_with_a_name_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2\n\nprocessor\t: 1\n"
    monkeypatch.setattr(machine, "_cpu_text", lambda: text)
    assert machine.describe_machine()["processor"] == "AMD EPYC"
    assert machine.describe_machine()["features"] == ["avx2"]
