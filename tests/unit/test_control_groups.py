"""Quotas of control groups bound the threads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_memory import fake_root

from mobilevlm import control_groups, plan
from mobilevlm.cli import main

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/a\n", {"a/cpu.max": "50000 100000\n"}, [0.5]),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, [3]),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "250000 100000"}, [2.5, 4]),
        ("0::/gone\n", {"cpu.max": "100000 100000\n"}, [1]),  # a container's own root
        (
            "2:cpu,cpuacct:/a\n0::/\n",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "150000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "50000\n",
            },
            [3],
        ),
        (
            "2:cpu:/a/b\n",
            {
                "cpu/a/b/cpu.cfs_quota_us": "-1\n",
                "cpu/a/b/cpu.cfs_period_us": "100000\n",
                "cpu/a/cpu.cfs_quota_us": "200000\n",
                "cpu/a/cpu.cfs_period_us": "100000\n",
            },
            [2],
        ),
        ("0::/a\n", {"a/cpu.max": "nonsense\n"}, []),
        ("0::/a\n", {"a/cpu.max": "5 0\n"}, []),
        ("4:memory:/a\n", {"cpu/a/cpu.cfs_quota_us": "1\n"}, []),
        ("", {}, []),
    ],
)
def test_quotas_of_both_versions_are_found_up_to_the_root(
    groups: str, limits: dict[str, str], expected: list[float], tmp_path: Path
) -> None:
    found = control_groups.processor_limits(fake_root(tmp_path, groups, limits))
    assert [limit.processors for limit in found] == expected


@pytest.mark.parametrize(("quota", "threads"), [(0.5, 1), (1.0, 1), (1.9, 1), (2.0, 2), (99.0, 8)])
def test_threads_are_whole_processors_of_the_quota_and_at_least_one(
    quota: float,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limit = control_groups.ProcessorLimit(quota, "/sys/fs/cgroup/cpu.max")
    monkeypatch.setattr(plan, "available_processors", lambda: 8)
    monkeypatch.setattr(plan, "processor_limits", lambda: [limit])
    monkeypatch.setattr(control_groups, "processor_limits", lambda: [limit])
    assert plan.default_threads() == plan.Plan().threads_of("decoder") == threads
    main(["doctor", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["machine"]["threads"] == threads
    assert shown["processor_limits"] == [{"processors": quota, "where": limit.where}]
