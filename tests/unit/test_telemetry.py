"""Sensors of made-up /sys trees, and what follows from the samples."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mobilevlm.runtime.bench.sensors import Sample, Sensors
from mobilevlm.runtime.bench.telemetry import (
    FEWEST,
    Course,
    Limits,
    describe,
    judge,
    new_flags,
    recorded,
    summarize,
)
from mobilevlm.runtime.machine import describe_machine


def write(root: Path, **values: object) -> None:
    """Files by their path, with ``__`` for ``/``."""
    for name, value in values.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """A machine with two clusters, a hot and a broken sensor, a battery and a charger."""
    zones, cpus = "class__thermal__thermal_zone", "devices__system__cpu__cpu"
    write(tmp_path, **{
        f"{zones}0__type": "cpu-thermal", f"{zones}0__temp": 48300,
        f"{zones}0__trip_point_0_type": "passive", f"{zones}0__trip_point_0_temp": 80000,
        f"{zones}0__trip_point_1_type": "critical", f"{zones}0__trip_point_1_temp": 40000,
        f"{zones}10__type": "off", f"{zones}10__temp": -273000,
        f"{zones}10__trip_point_0_type": "passive", f"{zones}10__trip_point_0_temp": 0,
        f"{cpus}0__cpufreq__scaling_cur_freq": 1800000,
        f"{cpus}0__cpufreq__scaling_max_freq": 1800000,
        f"{cpus}10__cpufreq__scaling_cur_freq": 2400000,
        f"{cpus}10__cpufreq__scaling_max_freq": 2400000,
        "devices__system__cpu__cpuidle__current_driver": "none",
        "class__power_supply__battery__type": "Battery",
        "class__power_supply__battery__status": "Discharging",
        "class__power_supply__battery__capacity": 87,
        "class__power_supply__battery__current_now": -500000,
        "class__power_supply__battery__voltage_now": 4000000,
        "class__power_supply__usb__type": "USB",
        "class__power_supply__usb__current_now": 900000,
        "class__power_supply__usb__voltage_now": 5000000,
    })  # fmt: skip
    return tmp_path


STAYED = "the clock never fell by 10%"


def clocks(*values: float) -> list[Sample]:
    return [Sample(0.5 * i, megahertz={"cpu0": v}) for i, v in enumerate(values)]


def test_a_sample_has_what_the_system_shows(board: Path) -> None:
    sensors = Sensors(board)
    assert sensors.passive_celsius == {"0 cpu-thermal": 80.0}
    assert sensors.sample(1.5) == Sample(
        seconds=1.5,
        celsius={"0 cpu-thermal": 48.3},  # the other one is off
        megahertz={"cpu0": 1800.0, "cpu10": 2400.0},
        limit_megahertz={"cpu0": 1800.0, "cpu10": 2400.0},
        battery_watts={"battery": 2.0},  # 0.5 A at 4 V
        battery_percent={"battery": 87.0},
    )


def test_power_is_told_only_of_a_battery_on_its_own(board: Path) -> None:
    write(board, class__power_supply__battery__power_now=1250000)
    assert Sensors(board).sample(0).battery_watts == {"battery": 1.25}
    write(board, class__power_supply__battery__status="Charging")
    assert Sensors(board).sample(0).battery_watts == {}


def test_a_system_that_shows_nothing_gives_no_telemetry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with recorded(Sensors(tmp_path), 0.01) as recorder:
        assert recorder.stop() is None
    assert describe(None).startswith("Throttled: unknown")


def test_samples_are_taken_while_the_block_runs_and_at_both_ends(board: Path) -> None:
    with recorded(Sensors(board), 0.02) as recorder:
        time.sleep(0.2)
        write(board, class__thermal__thermal_zone0__temp=61000)
        found = recorder.stop()
    assert found is not None and len(found.samples) >= 3
    assert found.celsius["0 cpu-thermal"] == Course(48.3, 61.0, 61.0)
    assert found.samples[0].seconds < 0.05 < 0.2 <= found.samples[-1].seconds
    seconds = [sample.seconds for sample in found.samples]
    assert seconds == sorted(seconds)


def test_the_thread_ends_even_if_the_block_fails(board: Path) -> None:
    with pytest.raises(KeyError), recorded(Sensors(board), 0.01) as recorder:
        raise KeyError
    recorder._thread.join(5)
    assert not recorder._thread.is_alive()


def test_a_clock_that_falls_by_more_than_a_tenth_means_throttled() -> None:
    assert judge(clocks(*[2400] * 6, *[1800] * 6), Limits()) == (
        True,
        "the clock fell from 2400 to 1800 MHz",
    )
    assert judge(clocks(*[2400] * 6, *[2170] * 6), Limits()) == (False, STAYED)


def test_the_clock_may_fall_at_any_time_and_come_back() -> None:
    for early, late in ((4, 40), (40, 4), (20, 20)):
        samples = clocks(*[2400] * early, *[1500, 1480, 1500], *[2400] * late)
        assert judge(samples, Limits()) == (True, "the clock fell from 2400 to 1500 MHz")


def test_a_processor_that_begins_idle_or_dips_once_is_not_throttled() -> None:
    assert judge(clocks(600, *[2400] * 10), Limits())[0] is False
    assert judge(clocks(*[2400] * 9, 600, 600, 2400, 600), Limits())[0] is False
    assert judge(clocks(600, 900, 1300, 1800, *[2400] * 10), Limits()) == (False, STAYED)


def test_one_processors_higher_clock_before_all_work_is_no_throttling() -> None:
    assert judge(clocks(*[4700] * 3, *[4000] * 10), Limits()) == (False, STAYED)


def test_the_fastest_processor_counts_since_idle_ones_slow_down() -> None:
    samples = [
        Sample(i, megahertz={"cpu0": 1800.0 if i < 6 else 300.0, "cpu4": 2400.0})
        for i in range(FEWEST)
    ]
    assert judge(samples, Limits())[0] is False


def test_few_samples_of_the_clock_alone_tell_nothing() -> None:
    assert judge(clocks(*[2400] * (FEWEST - 1)), Limits()) == (
        None,
        f"fewer than {FEWEST} samples of the clock",
    )
    assert judge([Sample(0.0)], Limits()) == (
        None,
        "the system shows neither clocks nor limits",
    )


def test_a_lowered_limit_means_throttled_even_if_it_came_back() -> None:
    limits = [2400.0, 2400.0, 2208.0, 2400.0]
    samples = [Sample(i, limit_megahertz={"cpu4": v}) for i, v in enumerate(limits)]
    assert judge(samples, Limits()) == (True, "cpu4's limit fell from 2400 to 2208 MHz")
    assert judge(samples[:2], Limits()) == (False, "no clock's limit lowered")


def test_a_zone_at_its_passive_trip_point_means_throttled() -> None:
    samples = [Sample(i, celsius={"0 cpu": v}) for i, v in enumerate((60.0, 80.0, 70.0))]
    throttled, reason = judge(samples, Limits({"0 cpu": 80.0}))
    assert throttled is True and reason == "0 cpu reached 80.0 °C (its trip point is 80.0)"
    assert judge(samples, Limits({"0 cpu": 80.1})) == (False, "no trip point reached")
    assert judge(samples, Limits({"1 gpu": 50.0}))[0] is None  # that one was never read


def test_events_that_processors_count_during_the_run_mean_throttled(tmp_path: Path) -> None:
    counter = "devices__system__cpu__cpu0__thermal_throttle__package_throttle_count"
    write(tmp_path, **{counter: 7})
    with recorded(Sensors(tmp_path), 1) as recorder:
        found = recorder.stop()
    assert found is not None
    assert (found.throttled, found.reason) == (False, "no event counted")
    with recorded(Sensors(tmp_path), 1) as recorder:
        write(tmp_path, **{counter: 10})
        found = recorder.stop()
    assert found is not None
    assert (found.throttled, found.reason) == (True, "the processors slowed down 3 times for heat")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (0x0, 0x0, ()),
        (0x0, 0x20000, ("clock capped",)),  # happened in between
        (0x20000, 0x20000, ()),  # before
        (0x0, 0x50005, ("under-voltage", "throttled")),
        (0x0, 0x8, ("soft temperature limit",)),
        (None, 0x0, None),
    ],
)
def test_flags_of_the_raspberry_pi(
    before: int | None, after: int, expected: tuple[str, ...] | None
) -> None:
    assert new_flags(before, after) == expected


def test_vcgencmd_is_asked_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "vcgencmd"
    program.write_text('#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0x50000\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    sensors = Sensors(tmp_path)
    assert sensors.flags() == 0x50000
    with recorded(sensors, 1) as recorder:
        program.write_text("#!/bin/sh\necho throttled=0x50004\n")
        found = recorder.stop()
    assert found is not None
    assert (found.throttled, found.reason) == (True, "vcgencmd: throttled")
    program.write_text("#!/bin/sh\necho VCHI initialization failed\n")
    assert sensors.flags() is None


def test_a_phone_is_named_by_its_properties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "getprop"
    program.write_text(
        "#!/bin/sh\ncase $1 in ro.product.manufacturer) echo Google;; "
        "ro.product.model) echo 'Pixel 8';; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("mobilevlm.runtime.machine.DEVICE_TREE", tmp_path / "none")
    assert describe_machine()["board"] == "Google Pixel 8"
    (tmp_path / "model").write_text("Raspberry Pi 5 Model B Rev 1.0\0")
    monkeypatch.setattr("mobilevlm.runtime.machine.DEVICE_TREE", tmp_path / "model")
    assert describe_machine()["board"] == "Raspberry Pi 5 Model B Rev 1.0"


def test_energy_of_the_packages_gives_power_across_the_counters_end(tmp_path: Path) -> None:
    zones = "class__powercap__intel-rapl:"
    write(tmp_path, **{
        f"{zones}0__name": "package-0", f"{zones}0__energy_uj": 90000000,
        f"{zones}0__max_energy_range_uj": 100000000,
        f"{zones}1__name": "psys", f"{zones}1__energy_uj": 5,
    })  # fmt: skip
    sensors = Sensors(tmp_path)
    assert sensors.sample(0).joules == {"intel-rapl:0 package-0": 90.0}
    samples = [Sample(s, joules={"p": j}) for s, j in ((0.0, 90.0), (1.0, 98.0), (2.0, 4.0))]
    found = summarize(samples, Limits(), joules_range={"p": 100.0})
    assert found is not None and found.processor_watts == pytest.approx((8 + 6) / 2)
    assert list(sensors.joules_range.values()) == [100.0]


def test_the_line_says_the_verdict_and_what_was_seen() -> None:
    samples = [
        Sample(
            float(i),
            celsius={"0 cpu": 50.0 + i, "1 case": 30.0},
            megahertz={"cpu0": 2000.0 - 200 * i},
            battery_watts={"b": 2.0 + i},
            battery_percent={"b": 90.0 - i},
        )
        for i in range(FEWEST)
    ]
    assert describe(summarize(samples, Limits())) == (
        "Throttled: yes (the clock fell from 1400 to 1200 MHz); clock 2000 → 600 MHz; "
        "hottest 0 cpu 50.0 → 57.0 °C, at most 57.0; battery 5.5 W; charge 90 → 83 %"
    )
